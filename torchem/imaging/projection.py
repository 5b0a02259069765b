"""The padded Fourier volume of a map: made from it, symmetrised, and turned back into it.

A volume holds the transform of the zero-padded map for |k| <= p·r_max only, the half x >= 0, centred (see
:mod:`torchem.ops.slices`). Its values are scaled so that a central slice equals the transform of a projection image
(:func:`torchem.imaging.fourier.half_transform`). Everything serves maps `(L, L, L)` and 2D references `(L, L)`.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from torchem.imaging.fourier import half_transform
from torchem.runtime import memory

# padded pixels: rotated points nearer than this to a grid point are meant to be it
SNAP = 1e-9


def volume_shape(r_max: int, padding: int, ndim: int) -> tuple[int, ...]:
    """Shape of the Fourier volume that holds |k| <= p·r_max and one voxel more for the interpolation."""
    half = padding * r_max + 1
    return (2 * half + 1,) * (ndim - 1) + (half + 1,)


def volume_radius2(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Squared distance of each voxel of a Fourier volume from its origin, padded pixels, int32."""
    half = shape[0] // 2
    axis = torch.arange(-half, half + 1, dtype=torch.int32, device=device) ** 2
    radius2 = axis
    for _ in range(len(shape) - 2):
        radius2 = radius2[..., None] + axis
    return radius2[..., None] + axis[half:]


@lru_cache(maxsize=4)
def gridding_correction(box: int, padding: int, ndim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The real-space falloff sinc²(r / (pL)) that trilinear interpolation in the padded transform causes (kept)."""
    axis = ((torch.arange(box, dtype=dtype, device=device) - box // 2) / (padding * box)) ** 2
    radius2 = axis
    for _ in range(ndim - 1):
        radius2 = radius2[..., None] + axis
    return memory.keep(torch.sinc(radius2.sqrt_()).square_(), "run")


def fourier_volume(map_: Tensor, r_max: int, padding: int) -> Tensor:
    """The padded Fourier volume of a map, ready to cut slices from (RELION's computeFourierTransformMap).

    Parameters
    ----------
    map_
        `(L, L, L)` or `(L, L)` real-space reference, origin at L//2.
    r_max
        pixels: spectrum kept for |k| <= p·r_max.
    padding
        p.

    Returns
    -------
    complex, `volume_shape(r_max, padding, ndim)`.
    """
    ndim, box = map_.ndim, map_.shape[0]
    map_ = map_ / gridding_correction(box, padding, ndim, map_.dtype, map_.device)
    before = padding * box // 2 - box // 2
    after = padding * box - box - before
    transform = half_transform(torch.nn.functional.pad(map_, (before, after) * ndim), ndim)
    shape = volume_shape(r_max, padding, ndim)
    half = shape[0] // 2
    rows = torch.arange(-half, half + 1, device=map_.device) % (padding * box)
    columns = torch.arange(half + 1, device=map_.device).clamp(max=transform.shape[-1] - 1)
    for axis in range(ndim - 1):
        transform = transform.index_select(axis, rows)
    volume = transform.index_select(ndim - 1, columns)
    inside = volume_radius2(shape, map_.device) <= (padding * r_max) ** 2
    # half_transform carries 1/(pL)^d, an image's transform 1/L²
    return volume * (inside * float((padding * box) ** ndim / box**2))


def real_space_map(volume: Tensor, box: int, padding: int) -> Tensor:
    """The map `(L, ...)` of a Fourier volume: the inverse of :func:`fourier_volume` but for the gridding correction."""
    ndim = volume.ndim
    half = min(volume.shape[0] // 2, padding * box // 2)
    trim = volume.shape[0] // 2 - half
    centre = slice(trim, volume.shape[0] - trim)
    volume = volume[(*[centre] * (ndim - 1), slice(0, half + 1))]
    padded = torch.zeros(
        (*[padding * box] * (ndim - 1), padding * box // 2 + 1), dtype=volume.dtype, device=volume.device
    )
    rows = torch.arange(-half, half + 1, device=volume.device) % (padding * box)
    index = [rows.reshape(-1, *([1] * (ndim - 1 - axis))) for axis in range(ndim - 1)]
    padded[(*index, torch.arange(half + 1, device=volume.device))] = volume
    real = torch.fft.irfftn(padded, s=(padding * box,) * ndim, norm="forward")
    del padded
    # the box around the origin, which is the first voxel
    inside = torch.arange(-(box // 2), box - box // 2, device=volume.device) % (padding * box)
    for axis in range(ndim):
        real = real.index_select(axis, inside)
    return real * float(box**2 / (padding * box) ** ndim)


def make_hermitian(volume: Tensor, weight: Tensor) -> None:
    """Add each point of the plane x = 0 to its conjugate mate, in place: back-projected slices fill either of both.

    The origin, its own mate, is added once.
    """
    axes = tuple(range(volume.ndim - 1))
    origin = (*(half // 2 for half in volume.shape[:-1]), 0)
    for values in (volume, weight):
        alone = values[origin].clone()
        values[..., 0].add_(values[..., 0].flip(axes).conj())
        values[origin].copy_(alone)


def symmetrise(sums: Sequence[tuple[Tensor, Tensor]], operators: Tensor, radius: int) -> None:
    """Sum Fourier volumes and their weights over the rotated copies of a point group, in place and without dividing.

    Parameters
    ----------
    sums
        volume and weight `(D, D, D//2 + 1)`, complex and real, of each map.
    operators
        `(g, 3, 3)` rotations, the identity first.
    radius
        padded pixels: what lies beyond stays as it is.
    """
    weight = sums[0][1]
    half, width = weight.shape[0] // 2, weight.shape[2]
    others = operators[1:].double()
    # no interpolation along axes where all operators bring grid points to grid points
    on_grid = ((others - others.round()).abs() < SNAP).all(2).all(0).tolist()
    corners = list(product(*((0,) if on_it else (0, 1) for on_it in on_grid)))
    whole = all(on_grid)
    if whole:
        others = others.round()
    # data and weight are looked up together
    before = [torch.cat((torch.view_as_real(v), w[..., None]), -1).flatten(0, 2) for v, w in sums]  # (D·D·width, 3)
    inside = torch.nonzero((volume_radius2(tuple(weight.shape), weight.device) <= radius**2).flatten())[:, 0]
    # on a CPU what is looked up at once should stay near its caches
    most = 2**18 if weight.device.type == "cpu" else 2**24 if whole else 2**23

    def add_copies(voxels: Tensor) -> None:
        x, y, z = voxels % width, voxels // width % len(weight) - half, voxels // (width * len(weight)) - half
        points = torch.stack((x, y, z), dim=-1).double() @ others.mT  # (g - 1, v, 3)
        if not whole:
            # rounding must not leak a trace of a neighbour into a voxel that nothing reached: its quotient were noise
            nearest = points.round()
            points = torch.where((points - nearest).abs() < SNAP, nearest, points)
        mirrored = points[..., :1] < 0
        points = torch.where(mirrored, -points, points)
        floor = points.floor()
        x, y, z = floor.long().unbind(-1)
        first = x + width * (y + half + len(weight) * (z + half))
        sign = torch.where(mirrored, -1.0, 1.0).to(weight.dtype)
        fraction = floor[..., :0] if whole else (points - floor).to(weight.dtype)
        for values, (volume, own_weight) in zip(before, sums, strict=True):
            if whole:
                found = values[first]
            else:
                found = torch.zeros_like(fraction)
                for corner in corners:
                    share = torch.ones_like(fraction[..., 0])
                    for axis, upper in enumerate(corner):
                        if not on_grid[axis]:
                            share = share * (fraction[..., axis] if upper else 1 - fraction[..., axis])
                    offset = corner[0] + width * (corner[1] + len(weight) * corner[2])
                    found.addcmul_(values[first + offset], share[..., None])
            found[..., 1:2].mul_(sign)
            total = found.sum(0).add_(values[voxels])
            volume.view(-1)[voxels] = torch.view_as_complex(total[:, :2].contiguous())
            own_weight.view(-1)[voxels] = total[:, 2]

    for voxels in inside.split(max(1, most // len(operators))):
        add_copies(voxels)
