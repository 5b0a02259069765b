"""Cut central slices out of a Fourier volume and insert them again: trilinear interpolation and its adjoint.

The volume is the half x >= 0 of a padded transform, centred: `(D, D, D//2 + 1)` for a 3D reference (z, y, x) and
`(D, D//2 + 1)` for a 2D one (y, x), with D odd and the origin at (D//2, D//2, 0). Slice(kx, ky) = V(p·Aᵀ(kx, ky, 0)),
the conjugate of the mate where x < 0 (Zhang et al. 2018, §2; RELION's Projector).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchem.runtime.cpu import MOST_WORKERS, side_by_side

# of the fixed point numbers that deterministic sums are made of: room for 2^23 contributions as large as the largest
FIXED_POINT = 2.0**39


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

    @property
    def on_gpu(self) -> bool:
        """Whether kernels cut and insert them."""
        return kernels_serve(self.volumes)

    def cells(self) -> tuple[Tensor, Tensor]:
        """For kernels: `(u,)` where each slice's volume begins, and `(u, 6)` padded x, y, z a step in kx and in ky."""
        first = self.classes * self.volumes[0].numel()
        turns = self.matrices[:, :2].transpose(1, 2) * self.padding
        return first, turns.to(torch.float32).contiguous()

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
        if self.on_gpu:
            _insert_on_gpu(self, data, weight, slices, slice_weights)
            return
        for k in range(len(self.volumes)):
            mine = slice(None) if len(self.volumes) == 1 else torch.nonzero(self.classes == k)[:, 0]
            backproject(
                data[k], weight[k], slices[mine], slice_weights[mine], self.matrices[mine], self.kx, self.ky,
                self.padding, self.r_max,
            )  # fmt: skip


def kernels_serve(volumes: Tensor) -> bool:
    """Whether :mod:`torchem.kernels.pairs` does: single precision, 3D references."""
    return volumes.is_cuda and volumes.dtype == torch.complex64 and volumes.ndim == 4


def packed(values: Tensor) -> Tensor:
    """Complex64 as int64, so that a kernel loads a value at once."""
    return values.resolve_conj().contiguous().view(torch.int64)


def accumulators(weight: Tensor) -> Tensor:
    """`(v, 4)`: sums of real and imaginary part and weight, and nothing, of each of v voxels, side by side.

    Whole numbers where the result must not depend on the order in which they are added up.
    """
    dtype = torch.int64 if torch.are_deterministic_algorithms_enabled() else torch.float32
    return torch.zeros((weight.numel(), 4), dtype=dtype, device=weight.device)


def add_accumulated(data: Tensor, weight: Tensor, sums: Tensor, unit: Tensor) -> None:
    """Add :func:`accumulators` to volumes `(k, …)` in place; `unit` is how many whole numbers a 1 is."""
    if sums.dtype == torch.int64:
        sums = sums.double() / unit
    real, imaginary, share, _ = sums.to(weight.dtype).reshape(*weight.shape, 4).unbind(-1)
    data += torch.complex(real, imaginary)
    weight += share


def _insert_on_gpu(cut: Slices, data: Tensor, weight: Tensor, slices: Tensor, slice_weights: Tensor) -> None:
    from torchem.kernels.pairs import insert_slices_kernel

    u, n_pixels = slice_weights.shape
    sums, unit = accumulators(weight), weight.new_ones(())
    if u and sums.dtype == torch.int64:
        largest = torch.maximum(torch.view_as_real(slices).abs().amax(), slice_weights.abs().amax())
        unit = FIXED_POINT / largest.clamp(min=1e-30)
    if u:
        insert_slices_kernel[(-(-u // 16), -(-n_pixels // 32))](
            *cut.cells(), cut.kx, cut.ky, packed(slices), slice_weights.contiguous(), sums, unit, u, n_pixels,
            cut.volumes.shape[1] // 2, float(cut.r_max**2), BLOCK_M=16, BLOCK_P=32, FIXED=sums.dtype == torch.int64,
            num_warps=4,
        )  # fmt: skip
    add_accumulated(data, weight, sums, unit)


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
    if volume.is_cuda:
        return _project_on_gpu(volume, matrices, kx, ky, padding, r_max)
    slices = torch.empty((len(matrices), len(kx)), dtype=volume.dtype)

    def cut(part: slice) -> None:
        cells = _cells(matrices[part], kx, ky, padding, r_max, volume.shape)
        values = _interpolate(volume.view(1, -1).expand(len(cells.index), -1), cells.index, cells.shares, cells.steps)
        torch.mul(values, torch.view_as_real(cells.factor), out=torch.view_as_real(slices[part]))

    side_by_side(cut, _blocks(volume, matrices, kx))
    return slices


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
    blocks = _blocks(volume, matrices, kx)

    def add(parts: list[slice], volume: Tensor, weight: Tensor) -> None:
        for part in parts:
            cells = _cells(matrices[part], kx, ky, padding, r_max, volume.shape)
            values = torch.view_as_real(slices[part].contiguous()) * torch.view_as_real(cells.factor)
            _spread(
                volume.view(-1), weight.view(-1), cells.index.flatten(), values.flatten(0, 1),
                (slice_weights[part] * cells.factor.real).flatten(), [share.flatten(0, 1) for share in cells.shares],
                cells.steps,
            )  # fmt: skip

    def add_apart(parts: list[slice]) -> tuple[Tensor, Tensor]:
        apart = torch.zeros_like(volume), torch.zeros_like(weight)
        add(parts, *apart)
        return apart

    # where there is much to add, every thread has a volume of its own
    threads = 1 if volume.is_cuda else min(torch.get_num_threads(), MOST_WORKERS, slices.numel() // volume.numel())
    if threads < 2:
        add(blocks, volume, weight)
        return
    for values, weights in side_by_side(add_apart, [blocks[i::threads] for i in range(threads)]):
        volume += values
        weight += weights


# complex values in a temporary on a CPU: all of them together stay in its caches
BLOCK = 2**17


def _blocks(volume: Tensor, matrices: Tensor, kx: Tensor) -> list[slice]:
    """Ranges of the slices that are worked on at once."""
    n = len(matrices) if volume.is_cuda else max(1, BLOCK // len(kx))
    return [slice(start, start + n) for start in range(0, len(matrices), max(n, 1))]


@dataclass(frozen=True)
class _Cells:
    """Where slice pixels lie in a volume.

    Attributes
    ----------
    index
        `(r, p)` int64: the voxel below each, in the flat volume.
    shares
        of the voxel above it, for each axis, x first: `(r, p, 2)`, for real and imaginary part.
    steps
        from a voxel to the next one along each axis.
    factor
        `(r, p)` complex: what real and imaginary part are multiplied by: 1 and -1 where the mate is in the volume,
        0 beyond r_max.
    """

    index: Tensor
    shares: list[Tensor]
    steps: tuple[int, ...]
    factor: Tensor


def _cells(matrices: Tensor, kx: Tensor, ky: Tensor, padding: int, r_max: int, shape: tuple[int, ...]) -> _Cells:
    ndim, half, width = len(shape), shape[0] // 2, shape[-1]
    inside = (kx * kx + ky * ky <= r_max * r_max).to(matrices.dtype)
    # what lies beyond is looked up at the origin, and multiplied by 0
    kx, ky = kx * inside * padding, ky * inside * padding
    right, up = matrices[:, :2, :ndim, None].permute(1, 2, 0, 3)  # (axes, r, 1), x first
    position = (right * kx).addcmul_(up, ky)  # (axes, r, p)
    sign = torch.where(position[0] < 0, -1, 1).to(matrices.dtype)
    position *= sign
    cell = position.floor()
    position -= cell
    steps = (1, width, width * shape[-2])[:ndim]
    # half the bytes of what gather wants, where it fits
    index, *others = cell.to(torch.int32 if steps[-1] * shape[0] < 2**31 else torch.int64)
    for other, step in zip(others, steps[1:], strict=True):
        index.add_(other, alpha=step)
    index += half * sum(steps[1:])
    shares = torch.view_as_real(torch.complex(position, position)).unbind(0)
    return _Cells(index.long(), list(shares), steps, torch.complex(inside.expand_as(sign), sign * inside))


def _interpolate(volumes: Tensor, index: Tensor, shares: list[Tensor], steps: tuple[int, ...]) -> Tensor:
    """`(r, p, 2)`: values of the flat volumes `(r, v)` between `index` and the next voxel along each axis."""
    if not steps:
        return torch.view_as_real(volumes.gather(1, index))
    lower, upper = (_interpolate(volumes, i, shares[:-1], steps[:-1]) for i in (index, index + steps[-1]))
    return lower.lerp_(upper, shares[-1])


def _spread(
    volume: Tensor, weight: Tensor, index: Tensor, values: Tensor, weights: Tensor, shares: list[Tensor],
    steps: tuple[int, ...],
) -> None:  # fmt: skip
    """Share values `(m, 2)` and weights `(m,)` between `index` and the next voxel along each axis, in place."""
    if not steps:
        volume.scatter_add_(0, index, torch.view_as_complex(values))
        weight.scatter_add_(0, index, weights)
        return
    upper, upper_weights = values * shares[-1], weights * shares[-1][:, 0]
    _spread(volume, weight, index + steps[-1], upper, upper_weights, shares[:-1], steps[:-1])
    _spread(volume, weight, index, values - upper, weights - upper_weights, shares[:-1], steps[:-1])


def _project_on_gpu(volume: Tensor, matrices: Tensor, kx: Tensor, ky: Tensor, padding: int, r_max: int) -> Tensor:
    """:func:`project` in one kernel."""
    ndim, half = volume.ndim, volume.shape[0] // 2
    k = torch.stack((kx, ky), dim=-1).to(matrices.dtype)
    points = torch.matmul(k * (padding / half), matrices[:, :2, :ndim])  # (p, 2) @ (r, 2, ndim)
    sign = torch.where(points[..., 0] < 0, -1.0, 1.0).to(points.dtype)
    points.mul_(sign[..., None])
    # grid_sample wants [-1, 1] from the first to the last voxel, x first
    points[..., 0].mul_(2).sub_(1)
    sampled = torch.nn.functional.grid_sample(
        torch.view_as_real(volume).movedim(-1, 0)[None], points.reshape(1, *([1] * (ndim - 1)), -1, ndim),
        mode="bilinear", padding_mode="zeros", align_corners=True,
    )  # fmt: skip
    real, imaginary = sampled.reshape(2, *sign.shape)
    inside = k.square().sum(-1) <= r_max * r_max
    return torch.complex(real * inside, imaginary * (sign * inside))
