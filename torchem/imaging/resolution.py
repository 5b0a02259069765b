"""Fourier shells: their averages, the correlation of two maps by shell, and low-pass filters.

The shell of a Fourier pixel is |k| rounded to the nearest integer, halves away from zero; corners beyond L/2 belong
to none. Sums run over the whole of Fourier space, from the half transform that ``torch.fft.rfftn`` gives.
"""

import math

import torch
from torch import Tensor

# phases are made random from the first shell where the halves agree less than this; the correction starts later
RANDOMISE_BELOW = 0.8
CORRECT_AFTER = 2


def shell_indices(box: int, ndim: int = 3, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Shell of every point of a half transform, and how many points of the whole transform it stands for.

    Returns
    -------
    `(L, L, L//2 + 1)` int64 shells, or `(L, L//2 + 1)` with ``ndim=2``, and `(L//2 + 1,)` float64 multiplicities
    (1 or 2) along the last axis.
    """
    shells = torch.floor(_radii(box, ndim, device) + 0.5).long()
    multiplicity = torch.full((box // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    multiplicity[0] = 1
    if box % 2 == 0:
        multiplicity[-1] = 1
    return shells, multiplicity


def shell_average(values: Tensor, ndim: int = 3) -> Tensor:
    """Mean over each shell of real values on a half transform: `(L, L, L//2 + 1)` (2D one less) to `(L//2 + 1,)`."""
    shells, multiplicity = shell_indices(values.shape[0], ndim, values.device)
    total, count = (_shell_sum(v, shells, multiplicity) for v in (values, torch.ones_like(values)))
    return (total / count).to(values.dtype)


def fourier_shell_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two real maps (or images) by Fourier shell, FSC[0] = 1.

    Parameters
    ----------
    a, b
        `(L, L, L)` or `(L, L)`.

    Returns
    -------
    `(L//2 + 1,)` in [-1, 1], of the maps' dtype; 0 where a map is empty. Sums are in float64.
    """
    if a.shape != b.shape or len(set(a.shape)) != 1:
        raise ValueError(f"maps must be cubic and of one size, not {tuple(a.shape)} and {tuple(b.shape)}")
    return _correlation(torch.fft.rfftn(a), torch.fft.rfftn(b), a.shape[-1]).to(a.dtype)


def phase_randomised_fsc(
    map1: Tensor, map2: Tensor, mask: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FSC of masked half maps, corrected for what the mask alone correlates (Chen et al. 2013).

    Phases of both maps are made random where |k| reaches the first shell with an unmasked FSC below 0.8; from two
    shells further FSC = (masked − random)/(1 − random), 0 where random > masked. RELION's rule. Half maps that
    agree everywhere leave nothing to correct.

    Parameters
    ----------
    map1, map2, mask
        `(L, L, L)` unfiltered half maps, and weights in [0, 1].
    generator
        of the random phases, on any device.

    Returns
    -------
    corrected, unmasked, masked and random FSC, `(L//2 + 1,)` each.
    """
    box = map1.shape[-1]
    unmasked = fourier_shell_correlation(map1, map2)
    masked = fourier_shell_correlation(map1 * mask, map2 * mask)
    below = (unmasked[1:] < RANDOMISE_BELOW).nonzero()
    if len(below) == 0:
        return masked.clone(), unmasked, masked, masked.clone()
    start = int(below[0]) + 1
    beyond = _radii(box, map1.ndim, map1.device) >= start
    random = fourier_shell_correlation(*(_randomise_phases(half, beyond, generator) * mask for half in (map1, map2)))
    chance = random.clamp_max(1 - torch.finfo(random.dtype).eps)
    corrected = torch.where(random > masked, torch.zeros_like(masked), (masked - chance) / (1 - chance))
    early = torch.arange(len(masked), device=masked.device) < start + CORRECT_AFTER
    return torch.where(early, masked, corrected), unmasked, masked, random


def resolution_at(fsc: Tensor, threshold: float, box: int, pixel_size: float) -> tuple[int, float]:
    """Shell before the FSC first falls below a threshold, and its resolution in Å (infinite at shell 0)."""
    below = (fsc < threshold).nonzero()
    shell = max(int(below[0]) - 1, 0) if len(below) else len(fsc) - 1
    return shell, box * pixel_size / shell if shell else math.inf


def raised_cosine_lowpass(
    box: int,
    pixel_size: float,
    resolution: float,
    width: float = 2.0,
    ndim: int = 3,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Filter that falls from 1 to 0 as a raised cosine about a resolution, over ``width`` Fourier pixels.

    With ρ = box · pixel_size / resolution it is 1 below ρ − width/2 and 0 above ρ + width/2 (RELION's ini_high).

    Returns
    -------
    `(L, L, L//2 + 1)`, or `(L, L//2 + 1)` with ``ndim=2``, to multiply a half transform.
    """
    inner = box * pixel_size / resolution - width / 2
    fall = ((_radii(box, ndim, device) - inner) / width).clamp(0, 1)
    return (0.5 + 0.5 * torch.cos(math.pi * fall)).to(dtype)


def _radii(box: int, ndim: int, device: torch.device | str) -> Tensor:
    """|k| `(L, ..., L//2 + 1)` float64 in Fourier pixels."""
    full = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64, device=device)
    half = torch.arange(box // 2 + 1, dtype=torch.float64, device=device)
    square = half * half
    for axis in range(1, ndim):
        square = square + (full * full).reshape(-1, *[1] * axis)
    return square.sqrt()


def _shell_sum(values: Tensor, shells: Tensor, multiplicity: Tensor) -> Tensor:
    """Sum by shell over the whole transform, `(L//2 + 1,)` float64."""
    count = len(multiplicity)
    inside = shells < count
    weighted = values.double() * multiplicity
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, shells[inside], weighted[inside])


def _correlation(a: Tensor, b: Tensor, box: int) -> Tensor:
    shells, multiplicity = shell_indices(box, a.ndim, a.device)
    cross, power_a, power_b = (
        _shell_sum(value, shells, multiplicity)
        for value in ((a * b.conj()).real, a.real**2 + a.imag**2, b.real**2 + b.imag**2)
    )
    scale = (power_a * power_b).sqrt()
    correlation = torch.where(scale > 0, cross / scale, torch.zeros_like(cross)).clamp(-1, 1)
    correlation[0] = 1
    return correlation


def _randomise_phases(volume: Tensor, beyond: Tensor, generator: torch.Generator) -> Tensor:
    """The same amplitudes with the phases of white noise where ``beyond``; a real map stays real so."""
    noise = torch.randn(volume.shape, generator=generator, dtype=volume.dtype, device=generator.device)
    phases = torch.fft.rfftn(noise.to(volume.device)).sgn()
    transform = torch.fft.rfftn(volume)
    mixed = torch.where(beyond, transform.abs() * phases, transform)
    return torch.fft.irfftn(mixed, s=volume.shape)
