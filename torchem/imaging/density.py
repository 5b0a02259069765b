"""Densities and projections of weighted points, made in real space.

Points are atoms, or the voxels of a map. They are spread on a finer grid with cubic B-splines and the spline is
divided out again in Fourier space, where the density is cut to the sphere of the Nyquist frequency and low-passed by
:math:`e^{-\\ln 2\\,k^2 d^2}` (one half at the resolution d). A projection is the same in two dimensions: the points
are rotated and summed along the beam. For voxels of a map that is band-limited to that sphere this is exact, since
the spectral copies of their lattice lie outside it. Nothing is shared with :mod:`torchem.imaging.projection`, which
cuts slices out of a padded Fourier volume.
"""

import math
from itertools import product

import numpy as np
import torch
from torch import Tensor

from torchem.errors import InputError

FINER = 2  # grid points a pixel that points are spread on


def density(
    xyz: np.ndarray,
    weights: np.ndarray,
    box: int,
    pixel_size: float,
    resolution: float,
    centre: str = "mass",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Density of point atoms, low-passed by one half at the resolution and cut at the Nyquist frequency.

    Parameters
    ----------
    xyz, weights
        `(n, 3)` Å (x, y, z) and `(n,)`, for instance atomic numbers.
    resolution
        Å; 0 for the cut at the Nyquist frequency alone.
    centre
        ``"mass"`` puts the centre of mass at the origin, pixel L//2; ``"keep"`` puts the point (0, 0, 0) there.

    Returns
    -------
    `(L, L, L)` float32 (z, y, x); its sum is that of the weights.

    Raises
    ------
    InputError
        where atoms lie outside the box.
    """
    if centre == "mass":
        xyz = xyz - (weights[:, None] * xyz).sum(0) / weights.sum()
    elif centre != "keep":
        raise ValueError(f"centre is {centre!r}; give 'mass' or 'keep'")
    reach, half = float(np.abs(xyz).max()), (box // 2 - 1) * pixel_size
    if reach > half:
        raise InputError(
            f"atoms reach {reach:.0f} Å from the centre, and the box of {box} px x {pixel_size:g} Å ends at "
            f"{half:.0f} Å; give a larger box or pixel size"
        )
    points = torch.from_numpy(np.ascontiguousarray(xyz, np.float32)).to(device)
    return spread_density(points, torch.from_numpy(np.float32(weights)).to(device), box, pixel_size, resolution)


def project(
    points: Tensor, weights: Tensor, rotations: Tensor, box: int, pixel_size: float, resolution: float = 0.0
) -> Tensor:
    """Project weighted points along the beam: image(x) = ∫ ρ(Aᵀ x) dz of the density of the same resolution.

    Parameters
    ----------
    points, weights
        `(n, 3)` Å and `(n,)` float32; points off the image wrap around.
    rotations
        `(b, 3, 3)` matrices A; row 3 is the viewing direction.
    resolution
        Å, as in :func:`density`.

    Returns
    -------
    `(b, L, L)` float32 on the points' device; with `density`, sums along z at A = 1.
    """
    size = FINER * box
    flat = (FINER / pixel_size * rotations[:, :2]).to(points)[..., None]  # (b, 2, 3, 1), to fine pixels
    spectrum_filter = _spread_filter(box, pixel_size, resolution, 2, points.device)
    # on a CPU what fits its cache, on a GPU what fills it
    together = max(1, (2**17 if points.device.type == "cpu" else 2**24) // len(points))
    images = points.new_empty(len(rotations), box, box)
    for start in range(0, len(rotations), together):
        some = flat[start : start + together]
        # no matrix product, which may be rounded to TF32
        seen = some[:, :, 0] * points[:, 0] + some[:, :, 1] * points[:, 1] + some[:, :, 2] * points[:, 2] + size // 2
        transform = _crop(torch.fft.rfft2(_spread(seen, weights, size)), box) * spectrum_filter
        images[start : start + together] = torch.fft.irfft2(transform, s=(box, box))
    return images


def spread_density(
    points: Tensor, weights: Tensor, box: int, pixel_size: float, resolution: float = 0.0, finest: float = 0.0
) -> Tensor:
    """Density of weighted points `(n, 3)` Å and `(n,)` as they are, `(L, L, L)` (z, y, x), see :func:`density`.

    ``finest`` (Å) also cuts the band, where the points are the voxels of a coarser map. Points off the box wrap
    around.
    """
    size = FINER * box
    grid = points.new_zeros(size, size, size)
    for some, weight in zip(points.split(2**18), weights.split(2**18), strict=True):
        grid += _spread((some.T * (FINER / pixel_size) + size // 2)[None], weight, size)[0]
    transform = _crop(torch.fft.rfftn(grid)[None], box)[0]
    transform *= _spread_filter(box, pixel_size, resolution, 3, points.device, finest)
    return torch.fft.irfftn(transform, s=(box, box, box))


def _spread(positions: Tensor, weights: Tensor, size: int) -> Tensor:
    """Add points to a periodic grid with cubic B-splines.

    Parameters
    ----------
    positions
        `(b, d, n)` grid pixels, x first; d = 2 or 3.
    weights
        `(n,)`.

    Returns
    -------
    `(b, size, size)` or `(b, size, size, size)`, x last.
    """
    b, d = positions.shape[:2]
    cell = positions.floor()
    f = positions - cell
    square, cube = f * f, f * f * f
    first, second, last = (1 - cube) / 6 - (f - square) / 2, 2 / 3 - square + cube / 2, cube / 6
    splines = torch.stack([first, second, 1 - first - second - last, last])  # (4, b, d, n)
    taps = torch.arange(-1, 3, device=positions.device)[:, None, None, None]
    strides = size ** torch.arange(d, device=positions.device)[:, None]
    index = ((cell.long() + taps) % size) * strides  # (4, b, d, n)
    start = torch.arange(b, device=positions.device)[:, None] * size**d
    grid = positions.new_zeros(b * size**d)
    for slow in product(range(4), repeat=d - 1):
        row, row_weight = start, weights
        for axis, tap in enumerate(slow, 1):
            row = row + index[tap, :, axis]
            row_weight = row_weight * splines[tap, :, axis]
        for tap in range(4):
            where, value = row + index[tap, :, 0], row_weight * splines[tap, :, 0]
            grid.index_add_(0, where.reshape(-1), value.reshape(-1))
    return grid.reshape(b, *[size] * d)


def _spread_filter(
    box: int, pixel_size: float, resolution: float, d: int, device: torch.device, finest: float = 0.0
) -> Tensor:
    """`(…, L, L//2 + 1)`: low-pass and sphere of the Nyquist frequency, over the cubic B-spline's transform sinc⁴."""
    full, half = torch.fft.fftfreq(box, 1 / box, device=device), torch.fft.rfftfreq(box, 1 / box, device=device)
    axes = torch.meshgrid(*[full] * (d - 1), half, indexing="ij")
    k2 = torch.stack(axes).square().sum(0)
    spline = torch.sinc(torch.stack(axes) / (FINER * box)).prod(0) ** 4
    length = box * pixel_size
    limit = min(box / 2, length / finest if finest else math.inf)
    return torch.where(k2 < limit**2, torch.exp(-math.log(2) * (resolution / length) ** 2 * k2) / spline, 0.0)


def _crop(transform: Tensor, box: int) -> Tensor:
    """Half transforms `(b, M, …, M//2 + 1)` cut to the frequencies of L pixels, `(b, L, …, L//2 + 1)`."""
    full = torch.fft.fftfreq(box, 1 / box, device=transform.device).long()
    for axis in range(1, transform.ndim - 1):
        transform = transform.index_select(axis, full % transform.shape[axis])
    return transform[..., : box // 2 + 1]
