"""From back-projected sums to a map: the Wiener reconstruction and the spectra that regularise it.

Volumes are those of :mod:`torchem.imaging.projection`, spectra double, by shell of the box. RELION's backprojector
in its order and with its constants; no iterative gridding.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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
    radius
        `(v,)` double: distance from the origin in shells of the box, ascending.
    """

    r_max: int
    index: Tensor
    radius: Tensor
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
        return memory.keep(Voxels(r_max, inside[order], radius2.double().sqrt() / padding), "run")

    def pieces(self) -> Iterator["Voxels"]:
        """The same voxels, so many at once that what is computed of them takes little memory."""
        for start in range(0, len(self.index), PIECE):
            part = slice(start, start + PIECE)
            yield Voxels(self.r_max, self.index[part], self.radius[part])

    def nearest(self) -> Tensor:
        """`(v,)` int64: the shell that each is nearest to."""
        return torch.floor(self.radius + 0.5).long()

    def shell_sums(
        self, values: Callable[["Voxels"], Tensor], shells: int, rounded: bool = True, border: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Sums over the voxels of each shell inside r_max, and how many they are, `(shells,)` both.

        Parameters
        ----------
        values
            gives those of a piece of the voxels `(v,)`.
        rounded
            a voxel belongs to the nearest shell, else to the one below.
        border
            voxels at r_max itself are counted; not, as a rule, in RELION.
        """
        offsets = self._offsets(shells, rounded, border)
        sums, start = torch.zeros(shells, dtype=torch.float64, device=self.radius.device), 0
        for piece in self.pieces():
            here = (offsets - start).clamp(0, len(piece.index))
            sums += torch.segment_reduce(values(piece).double(), "sum", offsets=here, unsafe=True, initial=0)
            start += len(piece.index)
        return sums, offsets.diff()

    def _offsets(self, shells: int, rounded: bool, border: bool) -> Tensor:
        """`(shells + 1,)`: where each shell begins, see :meth:`shell_sums`."""
        key = shells, rounded, border
        if key not in self._starts:
            starts = torch.arange(shells + 1, dtype=torch.float64, device=self.radius.device)
            starts = torch.searchsorted(self.radius, starts - (0.5 if rounded else 0.0))
            end = torch.searchsorted(self.radius, self.r_max, right=border)
            self._starts[key] = memory.keep(starts.clamp(max=end), "run")
        return self._starts[key]

    def shell_mean(
        self, values: Callable[["Voxels"], Tensor], shells: int, rounded: bool = True, border: bool = False
    ) -> Tensor:
        """Mean in place of :meth:`shell_sums`; 0 in empty shells."""
        sums, counts = self.shell_sums(values, shells, rounded, border)
        return sums / counts.clamp(min=1)


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
    def of(data: Tensor, weight: Tensor, operators: Tensor, padding: int, box: int) -> "Backprojection":
        """Finish what the E-step summed, in place: conjugate mates, then the point group's copies (3D)."""
        make_hermitian(data, weight)
        if len(operators) > 1:
            data, weight = symmetrise(data, weight, operators, data.shape[0] // 2 - 1)
        return Backprojection(data, weight, padding, box)

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
            return self.weights(voxels) + torch.where(voxels.radius < self.r_max, prior[voxels.nearest()], 0.0)

        def finite(voxels: Voxels) -> Tensor:
            weight = regularised(voxels)
            return torch.where(torch.isfinite(weight), weight, 0.0)

        floor = WEIGHT_FLOOR * self.voxels.shell_mean(finite, self.shells, rounded=False)
        volume = torch.zeros_like(self.data)
        for voxels in self.voxels.pieces():
            weight = torch.maximum(regularised(voxels), floor[voxels.radius.long().clamp(max=self.r_max - 1)])
            usable = weight > 0
            quotient = torch.where(usable, self.numerators(voxels) / torch.where(usable, weight, 1.0), 0.0)
            volume.view(-1)[voxels.index] = quotient.to(volume.dtype)
        map_ = remove_outside(real_space_map(volume, self.box, self.padding), self.box / 2)
        return map_ / gridding_correction(self.box, self.padding, map_.ndim, map_.dtype, map_.device)

    def noise_power(self) -> Tensor:
        """σ²(s) = 1 / mean of p^d·weight over the shell; 0 where nothing was measured."""
        mean = self.voxels.shell_mean(self.weights, self.shells) * self.padding**self.data.ndim
        return torch.where(mean > 1e-10, 1 / mean.clamp(min=1e-300), 0.0)

    def coverage(self, tau2: Tensor, tau2_fudge: float) -> tuple[Tensor, Tensor]:
        """Share of each shell where the data outweigh the prior, and the mean ratio of the two."""
        prior = torch.where(tau2 > 0, 1 / (tau2_fudge * tau2), torch.inf)

        def ratio(voxels: Voxels) -> Tensor:
            return self.weights(voxels) * self.padding**self.data.ndim / prior[voxels.nearest()]

        covered = self.voxels.shell_mean(lambda voxels: ratio(voxels) >= 1, self.shells)
        return covered, self.voxels.shell_mean(ratio, self.shells)


def join_low_resolution(first: Backprojection, second: Backprojection, shell: float) -> None:
    """Give both halves the mean of their sums up to a shell, in place: they must not drift apart at low resolution."""
    # a shell number that is whole but for rounding is that shell
    shell = math.ceil(shell - 1e-6)
    low = first.voxels.index[: int(torch.searchsorted(first.voxels.radius, shell, right=True))]
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

    def cell_of(voxels: Voxels) -> Tensor:
        # of each padded voxel, axis by axis, x last and not centred
        cell = torch.zeros_like(voxels.index)
        for axis, stride in enumerate(first.data.stride()):  # torch.unravel_index would import SymPy
            centred = axis < ndim - 1
            position = voxels.index // stride % first.data.shape[axis]
            k = (position - first.data.shape[0] // 2 * centred).double() / first.padding
            k = (torch.sign(k) * torch.floor(k.abs() + 0.5)).long()
            cell = cell * shape[axis] + k + shape[0] // 2 * centred
        return cell

    data = torch.zeros((2, math.prod(shape)), dtype=torch.complex128, device=device)
    weight = torch.zeros(data.shape, dtype=torch.float64, device=device)
    for voxels in first.voxels.pieces():
        cell = cell_of(voxels)
        for half, own_data, own_weight in zip((first, second), data, weight, strict=True):
            own_data.index_add_(0, cell, half.numerators(voxels))
            own_weight.index_add_(0, cell, half.weights(voxels))
    a, b = torch.where(weight > 0, data / weight.clamp(min=1e-300), 0.0)
    del data, weight

    def cross_power(voxels: Voxels) -> Tensor:
        return (a[voxels.index] * b[voxels.index].conj()).real

    cross, power_a, power_b = (
        cells.shell_sums(values, first.shells, border=True)[0]
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
