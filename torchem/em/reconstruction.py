"""From back-projected sums to a map: the Wiener reconstruction and the spectra that regularise it.

Volumes are those of :mod:`torchem.imaging.projection`, spectra double, by shell of the box. RELION's backprojector
in its order and with its constants; no iterative gridding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from torchem.imaging.fourier import squared_magnitude
from torchem.imaging.masks import remove_outside
from torchem.imaging.projection import (
    gridding_correction,
    make_hermitian,
    real_space_map,
    symmetrise,
    volume_radius2,
    volume_shape,
)
from torchem.runtime import memory

# voxels of which something is computed at once
PIECE = 2**22
# no prior below this shell: the lowest frequencies are trusted as they are
FIRST_REGULARISED_SHELL = 5
# weights are not taken below this share of the mean of their shell
WEIGHT_FLOOR = 0.001
# RELION's bounds of the FSC where it becomes a signal-to-noise ratio
FSC_MINIMUM, FSC_MAXIMUM = 0.001, 0.999


@dataclass(frozen=True)
class Voxels:
    """The voxels |k| <= p·r_max of a Fourier volume, sorted by |k|, so that every shell is a range of them.

    Attributes
    ----------
    index
        `(v,)` int64: where they are in the flattened volume.
    half_shell
        `(v,)` int32, ascending: twice the distance from the origin in shells of the box, rounded down.
    pieces
        the same voxels, so many at once that what is computed of them takes little memory.
    """

    r_max: int
    index: Tensor
    half_shell: Tensor
    pieces: list["Voxels"] = field(default_factory=list)
    _starts: dict[tuple[int, bool, bool], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(r_max: int, padding: int, ndim: int, device: torch.device) -> "Voxels":
        """The voxels of one volume shape (kept: both halves and most iterations share it)."""
        key = r_max, padding, ndim, device
        if key not in _KEPT:
            # those of another size go before these are made
            for other in [other for other in _KEPT if other[0] != r_max]:
                del _KEPT[other]
            _KEPT[key] = Voxels._made(*key)
        return _KEPT[key]

    @staticmethod
    def _made(r_max: int, padding: int, ndim: int, device: torch.device) -> "Voxels":
        radius2 = volume_radius2(volume_shape(r_max, padding, ndim), device).flatten()
        inside = torch.nonzero(radius2 <= (padding * r_max) ** 2)[:, 0]
        radius2, order = radius2[inside].sort(stable=True)
        half_shell = (radius2.double().sqrt() * (2 / padding)).int()
        index, half_shell = memory.keep((inside[order], half_shell), "run")
        parts = [slice(start, start + PIECE) for start in range(0, len(index), PIECE)]
        return Voxels(r_max, index, half_shell, [Voxels(r_max, index[part], half_shell[part]) for part in parts])

    def spread(self, values: Tensor, rounded: bool = True, border: bool = True) -> Tensor:
        """`(v,)`: of values by shell the one of each voxel's; 0 at r_max without border, see :meth:`shell_sums`."""
        twice = values.repeat_interleave(2)[1 if rounded else 0 :]
        if not border:
            twice[2 * self.r_max] = 0
        return twice.index_select(0, self.half_shell)

    def shell_sums(
        self, values: Callable[["Voxels"], Tensor], shells: int, rounded: bool = True, border: bool = False
    ) -> Tensor:
        """Sums over the voxels of each shell inside r_max, `(shells,)` double.

        Parameters
        ----------
        values
            gives those of a piece of the voxels `(v,)`.
        rounded
            a voxel belongs to the nearest shell, else to the one below.
        border
            voxels at r_max itself are counted; not, as a rule, in RELION.
        """
        sums = [
            torch.segment_reduce(
                values(piece).double(), "sum", offsets=piece._offsets(shells, rounded, border), unsafe=True, initial=0
            )
            for piece in self.pieces
        ]  # fmt: skip
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def _offsets(self, shells: int, rounded: bool, border: bool) -> Tensor:
        """`(shells + 1,)`: where each shell begins, see :meth:`shell_sums`."""
        key = shells, rounded, border
        if key not in self._starts:
            starts = torch.arange(shells + 1, dtype=torch.int32, device=self.index.device) * 2 - int(rounded)
            end = 2 * self.r_max + int(border)
            self._starts[key] = memory.keep(torch.searchsorted(self.half_shell, starts.clamp(max=end)), "run")
        return self._starts[key]

    def shell_mean(
        self, values: Callable[["Voxels"], Tensor], shells: int, rounded: bool = True, border: bool = False
    ) -> Tensor:
        """Mean in place of :meth:`shell_sums`; 0 in empty shells."""
        counts = self._offsets(shells, rounded, border).diff()
        return self.shell_sums(values, shells, rounded, border) / counts.clamp_(min=1)


_KEPT: dict[tuple[int, int, int, torch.device], Voxels] = {}


@dataclass
class Backprojection:
    """Hermitian, symmetrised numerator and denominator of one map."""

    data: Tensor
    weight: Tensor
    padding: int
    box: int

    @property
    def r_max(self) -> int:
        return (self.data.shape[0] // 2 - 1) // self.padding

    @property
    def shells(self) -> int:
        return self.box // 2 + 1

    @property
    def voxels(self) -> Voxels:
        return Voxels.of(self.r_max, self.padding, self.data.ndim, self.data.device)

    @staticmethod
    def of(sums: list[tuple[Tensor, Tensor]], operators: Tensor, padding: int, box: int) -> list["Backprojection"]:
        """Finish what the E-step summed, data and weights, in place: conjugate mates, then copies by symmetry (3D)."""
        for data, weight in sums:
            make_hermitian(data, weight)
        if len(operators) > 1:
            symmetrise(sums, operators, sums[0][0].shape[0] // 2 - 1)
        return [Backprojection(data, weight, padding, box) for data, weight in sums]

    def __add__(self, other: "Backprojection") -> "Backprojection":
        return Backprojection(self.data + other.data, self.weight + other.weight, self.padding, self.box)

    def weights(self, voxels: Voxels) -> Tensor:
        """The weight of each voxel, `(v,)` double."""
        return self.weight.view(-1)[voxels.index].double()

    def numerators(self, voxels: Voxels) -> Tensor:
        """The data of each voxel, `(v,)` complex double."""
        return self.data.view(-1)[voxels.index].to(torch.complex128)

    def reconstruct(self, tau2: Tensor | None = None, tau2_fudge: float = 1.0) -> Tensor:
        """The map: data / (weight + 1/(p^d·fudge·τ²)), back in real space.

        Parameters
        ----------
        tau2
            `(box//2 + 1,)` prior power; None: unregularised.

        Returns
        -------
        `(box, box, box)` or `(box, box)` real.
        """
        prior = torch.zeros(self.shells, dtype=torch.float64, device=self.weight.device)
        if tau2 is not None:
            prior = torch.where(tau2 > 0, 1 / (self.padding**self.data.ndim * tau2_fudge * tau2), torch.inf)
            prior[:FIRST_REGULARISED_SHELL] = 0

        def regularised(voxels: Voxels) -> Tensor:
            return self.weights(voxels).add_(voxels.spread(prior, border=False))

        floor = self.voxels.shell_mean(
            lambda voxels: torch.nan_to_num_(regularised(voxels), posinf=0.0), self.shells, rounded=False
        ).mul_(WEIGHT_FLOOR)  # fmt: skip
        floor[self.r_max :] = floor[self.r_max - 1]
        volume = torch.zeros_like(self.data)
        for voxels in self.voxels.pieces:
            weight = torch.maximum(regularised(voxels), voxels.spread(floor, rounded=False))
            inverse = torch.where(weight > 0, 1 / weight, 0.0).to(self.weight.dtype)
            volume.view(-1)[voxels.index] = self.data.view(-1)[voxels.index].mul_(inverse)
        map_ = remove_outside(real_space_map(volume, self.box, self.padding), self.box / 2)
        return map_ / gridding_correction(self.box, self.padding, map_.ndim, map_.dtype, map_.device)

    def noise_power(self) -> Tensor:
        """σ²(s) = 1 / mean of p^d·weight over the shell; 0 where nothing was measured."""
        mean = self.voxels.shell_mean(self.weights, self.shells) * self.padding**self.data.ndim
        return torch.where(mean > 1e-10, 1 / mean.clamp(min=1e-300), 0.0)

    def coverage(self, tau2: Tensor, tau2_fudge: float) -> Tensor:
        """Share of each shell where the data outweigh the prior."""
        unit = self.padding**self.data.ndim * tau2_fudge * tau2
        return self.voxels.shell_mean(lambda voxels: self.weights(voxels).mul_(voxels.spread(unit)) >= 1, self.shells)


@lru_cache(maxsize=4)
def _voxels_within(radius: int, ndim: int) -> int:
    """How many voxels of a Fourier volume are so near to its origin, in padded pixels."""
    radius2 = volume_radius2((2 * radius + 1,) * (ndim - 1) + (radius + 1,), torch.device("cpu"))
    return int((radius2 <= radius**2).sum())


def join_low_resolution(first: Backprojection, second: Backprojection, shell: float) -> None:
    """Give both halves the mean of their sums up to a shell, in place: they must not drift apart at low resolution."""
    # a shell number that is whole but for rounding is that shell
    shell = min(math.ceil(shell - 1e-6), first.r_max)
    low = first.voxels.index[: _voxels_within(first.padding * shell, first.data.ndim)]
    for a, b in ((first.data.view(-1), second.data.view(-1)), (first.weight.view(-1), second.weight.view(-1))):
        a[low] = b[low] = (a[low] + b[low]) / 2


def fourier_shell_correlation_of_sums(first: Backprojection, second: Backprojection) -> Tensor:
    """FSC of two back-projections on the unpadded grid.

    Data and weights are summed into voxels round(k/p) and divided there, so that no gridding is needed.

    Returns
    -------
    `(box//2 + 1,)` double; 1 at the origin, 0 beyond r_max.
    """
    r_max, ndim, device = first.r_max, first.data.ndim, first.data.device
    shape, cells = volume_shape(r_max, 1, ndim), Voxels.of(r_max, 1, ndim, device)
    padded = torch.arange(first.data.shape[-1], device=device)
    k = (2 * padded + first.padding) // (2 * first.padding)  # halves away from 0
    # the last axis is not centred
    rounded = [shape[0] // 2 + torch.cat((-k[1:].flip(0), k))] * (ndim - 1) + [k]

    def cell_of(voxels: Voxels) -> Tensor:
        cell = torch.zeros_like(voxels.index)
        for axis, stride in enumerate(first.data.stride()):  # torch.unravel_index would import SymPy
            cell = cell * shape[axis] + rounded[axis][voxels.index // stride % first.data.shape[axis]]
        return cell

    data = torch.zeros((2, math.prod(shape)), dtype=torch.complex128, device=device)
    weight = torch.zeros(data.shape, dtype=torch.float64, device=device)
    for voxels in first.voxels.pieces:
        cell = cell_of(voxels)
        for half, own_data, own_weight in zip((first, second), data, weight, strict=True):
            own_data.index_add_(0, cell, half.numerators(voxels))
            own_weight.index_add_(0, cell, half.weights(voxels))
    a, b = torch.where(weight > 0, data / weight.clamp(min=1e-300), 0.0)
    del data, weight

    def cross_power(voxels: Voxels) -> Tensor:
        return (a[voxels.index] * b[voxels.index].conj()).real

    cross, power_a, power_b = (
        cells.shell_sums(values, first.shells, border=True)
        for values in (
            cross_power,
            lambda voxels: squared_magnitude(a[voxels.index]),
            lambda voxels: squared_magnitude(b[voxels.index]),
        )
    )  # fmt: skip
    power = power_a * power_b
    fsc = torch.where(power > 0, cross / power.clamp(min=1e-300).sqrt(), 0.0)
    fsc[0] = 1
    return fsc


def prior_from_fsc(fsc: Tensor, noise_power: Tensor, tau2_fudge: float, joined: bool) -> tuple[Tensor, Tensor]:
    """Data-vs-prior ratio and τ² of a map from the FSC of the halves.

    SSNR = fudge·f/(1 − f), with f ← √(2f/(1+f)) where the map is made of both halves; τ² = SSNR·σ².
    """
    f = fsc.clamp(min=FSC_MINIMUM)
    if joined:
        f = (2 * f / (1 + f)).sqrt()
    f = f.clamp(max=FSC_MAXIMUM)
    ssnr = tau2_fudge * f / (1 - f)
    return ssnr, ssnr * noise_power
