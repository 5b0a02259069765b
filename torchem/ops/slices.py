"""Cut central slices out of a Fourier volume and insert them again: trilinear interpolation and its adjoint.

The volume is the half x >= 0 of a padded transform, centred: `(D, D, D//2 + 1)` for a 3D reference (z, y, x) and
`(D, D//2 + 1)` for a 2D one (y, x), with D odd and the origin at (D//2, D//2, 0). Slice(kx, ky) = V(p·Aᵀ(kx, ky, 0)),
the conjugate of the mate where x < 0 (Zhang et al. 2018, §2; RELION's Projector).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slices:
    """Central slices of k volumes at u orientations, cut when they are asked for.

    Attributes
    ----------
    volumes
        `(k, D, D, D//2 + 1)` or `(k, D, D//2 + 1)` complex.
    classes, matrices
        `(u,)` int64, the volume of each slice, and `(u, 3, 3)` its orientation.
    kx, ky, padding, r_max
        as in :func:`project`.
    """

    volumes: Tensor
    classes: Tensor
    matrices: Tensor
    kx: Tensor
    ky: Tensor
    padding: int
    r_max: int

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, which: Tensor | slice) -> "Slices":
        return replace(self, classes=self.classes[which], matrices=self.matrices[which])

    def cut(self) -> Tensor:
        """`(u, p)` complex."""
        if len(self.volumes) == 1:
            return project(self.volumes[0], self.matrices, self.kx, self.ky, self.padding, self.r_max)
        cut = torch.empty((len(self), len(self.kx)), dtype=self.volumes.dtype, device=self.volumes.device)
        for k, volume in enumerate(self.volumes):
            mine = torch.nonzero(self.classes == k)[:, 0]
            cut[mine] = project(volume, self.matrices[mine], self.kx, self.ky, self.padding, self.r_max)
        return cut

    def insert(self, data: Tensor, weight: Tensor, slices: Tensor, slice_weights: Tensor) -> None:
        """Add slices `(u, p)` and their weights to the accumulators `(k, …)` of the volumes, in place."""
        for k in range(len(self.volumes)):
            mine = slice(None) if len(self.volumes) == 1 else torch.nonzero(self.classes == k)[:, 0]
            backproject(
                data[k], weight[k], slices[mine], slice_weights[mine], self.matrices[mine], self.kx, self.ky,
                self.padding, self.r_max,
            )  # fmt: skip



def project(volume: Tensor, matrices: Tensor, kx: Tensor, ky: Tensor, padding: int, r_max: int) -> Tensor:
    """Central slices of a Fourier volume, trilinear in the padded grid.

    Parameters
    ----------
    volume
        `(D, D, D//2 + 1)` or, for a 2D reference, `(D, D//2 + 1)` complex.
    matrices
        `(r, 3, 3)` rotation matrices A (2D: the upper left 2 × 2 counts), real dtype of the volume.
    kx, ky
        `(p,)` Fourier pixels, unpadded.
    padding
        p, padding factor of the volume.
    r_max
        pixels; slices are zero beyond it.

    Returns
    -------
    `(r, p)` complex.
    """
    ndim, half = volume.ndim, volume.shape[0] // 2
    points, sign = _points(matrices, kx, ky, padding, ndim)  # (r, p, ndim), (r, p)
    # grid_sample wants [-1, 1] from the first to the last voxel, x first
    points[..., 0].mul_(2 / half).sub_(1)
    points[..., 1:].div_(half)
    # the CPU kernel runs in parallel over its batch axis only, so the points are dealt to one batch a thread
    lanes = torch.get_num_threads() if volume.device.type == "cpu" else 1
    n = sign.numel()
    points = torch.nn.functional.pad(points.reshape(n, ndim), (0, 0, 0, -n % lanes))
    channels = torch.view_as_real(volume).movedim(-1, 0)
    sampled = torch.nn.functional.grid_sample(
        channels.expand(lanes, *channels.shape), points.reshape(lanes, *([1] * (ndim - 1)), -1, ndim),
        mode="bilinear", padding_mode="zeros", align_corners=True,
    )  # fmt: skip
    real, imaginary = sampled.movedim(1, 0).reshape(2, -1)[:, :n].reshape(2, *sign.shape)
    inside = kx * kx + ky * ky <= r_max * r_max
    return torch.complex(real * inside, imaginary * (sign * inside))


def backproject(
    volume: Tensor, weight: Tensor, slices: Tensor, slice_weights: Tensor, matrices: Tensor,
    kx: Tensor, ky: Tensor, padding: int, r_max: int,
) -> None:  # fmt: skip
    """Add slices and their weights into a Fourier volume in place: the adjoint of :func:`project`.

    Parameters
    ----------
    volume, weight
        complex and real accumulators, `(D, D, D//2 + 1)` (or `(D, D//2 + 1)`), contiguous.
    slices, slice_weights
        `(r, p)` complex and real; pixels beyond ``r_max`` are left out.
    matrices, kx, ky, padding, r_max
        as in :func:`project`.
    """
    ndim = volume.ndim
    inside = kx * kx + ky * ky <= r_max * r_max
    kx, ky, slices, slice_weights = kx[inside], ky[inside], slices[:, inside], slice_weights[:, inside]
    points, sign = _points(matrices, kx, ky, padding, ndim)
    slices_imag = slices.imag * sign
    real, imaginary = torch.view_as_real(volume).reshape(-1, 2).unbind(-1)
    flat_weight = weight.view(-1)
    for index, share in _corners(points, tuple(weight.shape)):
        where = index.reshape(-1)
        real.index_add_(0, where, (slices.real * share).reshape(-1))
        imaginary.index_add_(0, where, (slices_imag * share).reshape(-1))
        flat_weight.index_add_(0, where, (slice_weights * share).reshape(-1))


def interpolate(values: Tensor, points: Tensor) -> Tensor:
    """Trilinear values of a centred half grid at any points, exact at the grid's own points.

    Parameters
    ----------
    values
        `(D, D, D//2 + 1)`.
    points
        `(v, 3)` x, y, z from the origin, x >= 0, inside the grid.

    Returns
    -------
    `(v,)` in the dtype of ``values``.
    """
    flat = values.reshape(-1)
    real = values.real.dtype if values.is_complex() else values.dtype
    total = torch.zeros(points.shape[:-1], dtype=values.dtype, device=values.device)
    for index, share in _corners(points, tuple(values.shape)):
        total += flat[index] * share.to(real)
    return total


def _corners(points: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """The 2^d voxels around each of `points` (..., d), as flat indices, and the share of each."""
    half, width, ndim = shape[0] // 2, shape[-1], len(shape)
    floor = points.floor()
    fraction = points - floor
    cell = floor.long()
    base = cell[..., 0] + width * (cell[..., 1] + half)
    if ndim == 3:
        base = base + width * shape[1] * (cell[..., 2] + half)
    strides = (1, width, width * shape[-2])[:ndim]
    for corner in range(2**ndim):
        upper = [(corner >> axis) & 1 for axis in range(ndim)]
        share = fraction[..., 0] if upper[0] else 1 - fraction[..., 0]
        for axis in range(1, ndim):
            share = share * (fraction[..., axis] if upper[axis] else 1 - fraction[..., axis])
        offset = sum(u * stride for u, stride in zip(upper, strides, strict=True))
        yield base + offset, share


def _points(matrices: Tensor, kx: Tensor, ky: Tensor, padding: int, ndim: int) -> tuple[Tensor, Tensor]:
    """Padded positions `(r, p, ndim)` of slice pixels, x first and turned to x >= 0, and -1 where turned, 1 else."""
    k = torch.stack((kx, ky), dim=-1).to(matrices.dtype)
    points = torch.matmul(k * padding, matrices[:, :2, :ndim])  # (p, 2) @ (r, 2, ndim)
    sign = 1 - 2 * (points[..., 0] < 0).to(points.dtype)
    return points.mul_(sign[..., None]), sign
