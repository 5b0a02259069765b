"""From back-projected sums to a map: the Wiener reconstruction and the spectra that regularise it.

Volumes are those of :mod:`torchem.imaging.projection`, spectra double, by shell of the box. RELION's backprojector
in its order and with its constants; no iterative gridding.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchem.imaging.masks import remove_outside
from torchem.imaging.projection import (
    gridding_correction,
    make_hermitian,
    real_space_map,
    symmetrise,
    volume_radius2,
)

# no prior below this shell: the lowest frequencies are trusted as they are
FIRST_REGULARISED_SHELL = 5
# weights are not taken below this share of the mean of their shell
WEIGHT_FLOOR = 0.001
# RELION's bounds of the FSC where it becomes a signal-to-noise ratio
FSC_MINIMUM, FSC_MAXIMUM = 0.001, 0.999


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

    @staticmethod
    def of(data: Tensor, weight: Tensor, operators: Tensor, padding: int, box: int) -> "Backprojection":
        """Finish what the E-step summed: conjugate mates, then the point group's copies (3D)."""
        data, weight = make_hermitian(data, weight)
        if len(operators) > 1:
            data, weight = symmetrise(data, weight, operators, data.shape[0] // 2 - 1)
        return Backprojection(data, weight, padding, box)

    def __add__(self, other: "Backprojection") -> "Backprojection":
        return Backprojection(self.data + other.data, self.weight + other.weight, self.padding, self.box)

    def radius(self) -> Tensor:
        """Padded distance from the origin of each voxel, in shells of the box, double."""
        return volume_radius2(tuple(self.weight.shape), self.weight.device).double().sqrt() / self.padding

    def shell_mean(self, values: Tensor, shell: Tensor, border: bool = False) -> Tensor:
        """`(box//2 + 1,)` double: mean over the voxels of each shell inside r_max; 0 in empty shells.

        Voxels at r_max itself are left out unless ``border`` is set, as in RELION.
        """
        radius = self.radius()
        inside = radius <= self.r_max if border else radius < self.r_max
        shell, values = shell[inside], values[inside].double()
        total = torch.zeros(self.box // 2 + 2, dtype=torch.float64, device=values.device)
        total.index_add_(0, shell, values)
        return (total / torch.bincount(shell, minlength=len(total)).clamp(min=1))[:-1]

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
        radius = self.radius()
        weight = self.weight.double()
        if tau2 is not None:
            shell = torch.floor(radius + 0.5).long().clamp(max=len(tau2) - 1)
            prior = torch.where(tau2 > 0, 1 / (self.padding**weight.ndim * tau2_fudge * tau2), torch.inf)
            prior[:FIRST_REGULARISED_SHELL] = 0
            weight = weight + torch.where(radius < self.r_max, prior[shell], 0.0)
        below = radius.floor().long().clamp(max=self.r_max - 1)
        finite = torch.where(torch.isfinite(weight), weight, 0.0)
        floor = WEIGHT_FLOOR * self.shell_mean(finite, below)[below]
        weight = torch.maximum(weight, floor)
        usable = (radius <= self.r_max) & (weight > 0)
        quotient = torch.where(usable, self.data.to(torch.complex128) / torch.where(usable, weight, 1.0), 0.0)
        map_ = real_space_map(quotient.to(self.data.dtype), self.box, self.padding)
        map_ = remove_outside(map_, self.box / 2)
        return map_ / gridding_correction(self.box, self.padding, map_.ndim, map_.dtype, map_.device)

    def noise_power(self) -> Tensor:
        """σ²(s) = 1 / mean of p^d·weight over the shell; 0 where nothing was measured."""
        mean = self.shell_mean(self.weight, torch.floor(self.radius() + 0.5).long())
        mean = mean * self.padding**self.weight.ndim
        return torch.where(mean > 1e-10, 1 / mean.clamp(min=1e-300), 0.0)

    def coverage(self, tau2: Tensor, tau2_fudge: float) -> tuple[Tensor, Tensor]:
        """Share of each shell where the data outweigh the prior, and the mean ratio of the two."""
        shell = torch.floor(self.radius() + 0.5).long()
        prior = torch.where(tau2 > 0, 1 / (tau2_fudge * tau2), torch.inf)
        prior = torch.cat((prior, prior.new_full((1,), torch.inf)))
        ratio = self.weight.double() * self.padding**self.weight.ndim / prior[shell.clamp(max=len(prior) - 1)]
        return self.shell_mean((ratio >= 1).double(), shell), self.shell_mean(ratio, shell)


def join_low_resolution(first: Backprojection, second: Backprojection, shell: float) -> None:
    """Give both halves the mean of their sums up to a shell, in place: they must not drift apart at low resolution."""
    # a shell number that is whole but for rounding is that shell
    shell = math.ceil(shell - 1e-6)
    inside = volume_radius2(tuple(first.weight.shape), first.weight.device) <= (first.padding * shell) ** 2
    for name in ("data", "weight"):
        a, b = getattr(first, name), getattr(second, name)
        mean = (a[inside] + b[inside]) / 2
        a[inside] = mean
        b[inside] = mean


def fourier_shell_correlation_of_sums(first: Backprojection, second: Backprojection) -> Tensor:
    """FSC of two back-projections on the unpadded grid.

    Data and weights are summed into voxels round(k/p) and divided there, so that no gridding is needed.

    Returns
    -------
    `(box//2 + 1,)` double; 1 at the origin, 0 beyond r_max.
    """
    a, b = (_downsampled(x) for x in (first, second))
    r_max = first.r_max
    shape = a.shape
    radius = volume_radius2(tuple(shape), a.device).double().sqrt()
    inside = radius <= r_max
    shell = torch.floor(radius[inside] + 0.5).long()

    def by_shell(values: Tensor) -> Tensor:
        total = torch.zeros(first.box // 2 + 2, dtype=torch.float64, device=a.device)
        return total.index_add_(0, shell, values[inside])[:-1]

    cross = by_shell((a * b.conj()).real)
    power = by_shell(a.abs().square()) * by_shell(b.abs().square())
    fsc = torch.where(power > 0, cross / power.clamp(min=1e-300).sqrt(), 0.0)
    fsc[0] = 1
    return fsc


def _downsampled(x: Backprojection) -> Tensor:
    ndim, half = x.data.ndim, x.r_max + 1
    inside = volume_radius2(tuple(x.weight.shape), x.weight.device) <= (x.padding * x.r_max) ** 2
    index = torch.nonzero(inside)  # (v, ndim), z y x
    origin = torch.tensor([x.data.shape[0] // 2] * (ndim - 1) + [0], device=index.device)
    k = (index - origin).double() / x.padding
    k = (torch.sign(k) * torch.floor(k.abs() + 0.5)).long()
    shape = (2 * half + 1,) * (ndim - 1) + (half + 1,)
    flat = torch.zeros(len(k), dtype=torch.int64, device=index.device)
    for axis in range(ndim):
        flat = flat * shape[axis] + k[:, axis] + (half if axis < ndim - 1 else 0)
    size = math.prod(shape)
    data = torch.zeros(size, dtype=torch.complex128, device=index.device)
    weight = torch.zeros(size, dtype=torch.float64, device=index.device)
    data.index_add_(0, flat, x.data[inside].to(torch.complex128))
    weight.index_add_(0, flat, x.weight[inside].double())
    return torch.where(weight > 0, data / weight.clamp(min=1e-300), 0.0).reshape(shape)


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
