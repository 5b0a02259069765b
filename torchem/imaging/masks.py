"""Soft-edged circles and spheres, and images and maps whose outside is replaced."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from torchem.runtime import memory


def soft_sphere(
    box: int,
    radius_px: float,
    edge_px: float = 5.0,
    ndim: int = 3,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sphere (``ndim=3``) or disc (2) with a raised-cosine edge outwards, origin at pixel L//2.

    1 for r <= radius, 0 for r >= radius + edge, ½ + ½cos(π(r − radius)/edge) between; lengths in pixels.

    Returns
    -------
    `(L, L, L)` or `(L, L)` in [0, 1].
    """
    axis = torch.arange(box, dtype=torch.float64, device=device) - box // 2
    square = torch.zeros((), dtype=torch.float64, device=device)
    for _ in range(ndim):
        square = square[..., None] + axis * axis
    beyond = square.sqrt() - radius_px
    if edge_px <= 0:
        return (beyond <= 0).to(dtype)
    return (0.5 + 0.5 * torch.cos(math.pi * (beyond / edge_px).clamp(0, 1))).to(dtype)


def apply_circular_mask(images: Tensor, radius_px: float, edge_px: float = 5.0, fill: Tensor | None = None) -> Tensor:
    """Keep a soft disc of every image; outside goes background or noise (RELION's softMaskOutsideMap).

    Parameters
    ----------
    images
        `(n, L, L)`, origin at L//2.
    radius_px, edge_px
        pixels, as in :func:`soft_sphere`.
    fill
        `(n, L, L)` noise to blend in; without it the mean of each image weighted by 1 − mask (not 0).

    Returns
    -------
    `(n, L, L)`: mask · image + (1 − mask) · background.
    """
    return _replace_outside(images, _kept(images.shape[-1], radius_px, edge_px, 2, images.dtype, images.device), fill)


def remove_outside(volume: Tensor, radius_px: float, edge_px: float = 3.0) -> Tensor:
    """Replace what lies outside a soft sphere (disc) by its mean weighted by 1 − mask; `(L, L, L)` or `(L, L)`."""
    mask = _kept(volume.shape[-1], radius_px, edge_px, volume.ndim, volume.dtype, volume.device)
    return _replace_outside(volume, mask, None)


@lru_cache(maxsize=8)
def _kept(
    box: int, radius_px: float, edge_px: float, ndim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A mask, and the sum of 1 − mask (kept: all images of an optics group have the same, and all maps)."""
    mask = soft_sphere(box, radius_px, edge_px, ndim, dtype, device)
    # a mask that covers the whole box leaves nothing to average, and nothing to fill
    return memory.keep((mask, (1 - mask).sum().clamp_min(torch.finfo(dtype).tiny)), "run")


def _replace_outside(values: Tensor, kept: tuple[Tensor, Tensor], fill: Tensor | None) -> Tensor:
    mask, outside = kept
    if fill is None:
        axes = tuple(range(-mask.ndim, 0))
        fill = (values * (1 - mask)).sum(axes, keepdim=True) / outside
    return torch.lerp(fill, values, mask)
