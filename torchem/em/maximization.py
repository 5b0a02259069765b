"""The M-step: from the weighted sums of each half, or of all classes, to new maps, spectra and parameters."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchem.em.model import Model
from torchem.em.reconstruction import (
    Backprojection,
    fourier_shell_correlation_of_sums,
    join_low_resolution,
    prior_from_fsc,
)
from torchem.em.sums import Sums
from torchem.errors import InputError
from torchem.imaging.fourier import squared_magnitude
from torchem.imaging.projection import fourier_volume
from torchem.imaging.resolution import phase_randomised_fsc

SIGMA_OFFSET_MINIMUM2 = 2.0  # Å²
SIGMA2_NOISE_MINIMUM = 1e-14
SCALE_OUTLIER_FACTOR = 5.0


@dataclass(frozen=True)
class Joined:
    """What the last iteration makes of both halves: one map, and the halves' maps without a prior."""

    model: Model
    unfiltered: list[Tensor]


def update_halves(
    models: list[Model], sums: list[Sums], operators: Tensor, padding: int, *, tau2_fudge: float,
    join_shell: float | None, mask: Tensor | None, seed: int, last: bool,
) -> Joined | None:  # fmt: skip
    """New maps and spectra of the two halves of a gold-standard refinement, in place.

    Symmetrise; join the halves at low resolution; FSC; prior spectra; Wiener reconstruction (Scheres 2012).

    Parameters
    ----------
    operators
        `(g, 3, 3)` of the point group.
    join_shell
        the halves share what lies below this shell of the box; None: nothing.
    mask
        `(L, L, L)`: the FSC is that of the masked maps, corrected by phase randomisation (Chen et al. 2013); None:
        the FSC of the sums, unmasked.
    seed
        of the random phases.
    last
        also make the joined map.
    """
    box = models[0].box
    halves = Backprojection.of([(s.data[0], s.weight[0]) for s in sums], operators, padding, box)
    unfiltered = [half.reconstruct() for half in halves] if last else []
    first, second = halves
    if join_shell is not None:
        join_low_resolution(first, second, join_shell)
    fsc = fourier_shell_correlation_of_sums(first, second) if mask is None else _masked_fsc(first, second, mask, seed)
    for model, half in zip(models, halves, strict=True):
        _new_map(model, half, fsc, tau2_fudge, joined=False)
    if not last:
        return None
    model = Model(**vars(models[0]) | {"sigma2_noise": list(models[0].sigma2_noise)})
    _new_map(model, first + second, fsc, tau2_fudge, joined=True)
    return Joined(model, unfiltered)


def _masked_fsc(first: Backprojection, second: Backprojection, mask: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(device=mask.device).manual_seed(seed)
    fsc, *_ = phase_randomised_fsc(first.reconstruct(), second.reconstruct(), mask, generator)
    fsc = fsc.double()
    fsc[first.r_max + 1 :] = 0
    return fsc


def _new_map(model: Model, half: Backprojection, fsc: Tensor, tau2_fudge: float, joined: bool) -> None:
    sigma2 = half.noise_power()
    ratio, tau2 = prior_from_fsc(fsc, sigma2, tau2_fudge, joined)
    model.fsc, model.sigma2, model.tau2 = fsc[None].clone(), sigma2[None], tau2[None]
    model.data_vs_prior, model.fourier_coverage = ratio[None], half.coverage(tau2, tau2_fudge)[None]
    model.references = half.reconstruct(tau2, tau2_fudge)[None]


def update_classes(model: Model, sums: Sums, operators: Tensor, padding: int, r_max: int, tau2_fudge: float) -> None:
    """New maps and spectra of the K references of a classification, in place.

    Without halves to compare, τ² is half the mean power of the reference that the iteration started from, by shell,
    and the data-vs-prior ratio the shell mean of p^d·weight·fudge·τ² (RELION's Class3D and Class2D).

    Parameters
    ----------
    operators
        `(g, 3, 3)` of the point group.
    r_max
        pixels: half the size that the sums were made at.
    """
    references = []
    for k, reference in enumerate(model.references):
        (sum_,) = Backprojection.of([(sums.data[k], sums.weight[k])], operators, padding, model.box)
        volume = fourier_volume(reference, r_max, padding)
        spectrum = Backprojection(volume, squared_magnitude(volume), padding, model.box)
        model.tau2[k] = spectrum.voxels.shell_mean(spectrum.weights, spectrum.shells, border=True) / 2
        model.sigma2[k] = sum_.noise_power()
        model.fourier_coverage[k] = sum_.coverage(model.tau2[k], tau2_fudge)
        # τ² times the mean of p^d·weight, which is 1/σ²
        measured = model.sigma2[k] > 0
        model.data_vs_prior[k] = torch.where(measured, tau2_fudge * model.tau2[k] / model.sigma2[k], 0.0)
        references.append(sum_.reconstruct(model.tau2[k], tau2_fudge))
    model.references = torch.stack(references)


def update_parameters(
    model: Model, sums: Sums, shell_counts: list[Tensor], *, norm: bool, scale: bool, cross_correlation: bool
) -> None:
    """Norm average, scales, priors, offset variance and noise spectra, in place.

    Parameters
    ----------
    shell_counts
        an optics group: `(box//2 + 1,)` pixels in each whole shell.
    cross_correlation
        this iteration was scored so: noise and scale stay as they are.
    """
    total = sums.pdf_direction.sum()
    single = torch.cat((total[None], sums.offset_square[None], sums.totals)).tolist()
    weight, offset_square, particles, norm_sum, pmax, log_likelihood = single
    if not weight > 0:
        raise InputError(
            "no particle of one half can be used, see the warnings above; correct the stack, take more particles, or "
            "remove the column rlnRandomSubset"
        )
    if norm:
        model.norm_average = norm_sum / weight
    if scale and not cross_correlation and len(model.scale) > 1:
        ratio = torch.where(sums.scale_aa > 0, sums.scale_xa / sums.scale_aa.clamp(min=1e-300), 1.0)
        present = sums.group_weight > 0
        middle = torch.where(present, ratio, torch.inf).sort().values.gather(0, present.sum(0, keepdim=True) // 2)
        ratio = ratio.clamp(middle / SCALE_OUTLIER_FACTOR, middle * SCALE_OUTLIER_FACTOR)
        mean = (ratio * sums.group_weight).sum() / sums.group_weight.sum()
        model.scale = torch.where(present, ratio / mean, model.scale)
    model.pdf_direction = sums.pdf_direction / total
    model.pdf_class = model.pdf_direction.sum(1)
    if model.ndim == 2:
        # RELION divides by the weight of all classes
        model.prior_offset = sums.class_offset / total
    model.sigma_offset = math.sqrt(max(offset_square / (2 * weight), SIGMA_OFFSET_MINIMUM2))
    model.average_pmax = pmax / weight
    # of a correlation the mean says something
    model.log_likelihood = log_likelihood / (particles if cross_correlation else 1)
    if cross_correlation:
        return
    for group, (noise, counts) in enumerate(zip(sums.noise, shell_counts, strict=True)):
        sigma2 = noise / (2 * sums.noise_weight[group] * counts)
        # below the minimum the next lower shell stands
        shell = torch.arange(len(sigma2), device=sigma2.device)
        sigma2 = sigma2[torch.where(sigma2 < SIGMA2_NOISE_MINIMUM, 0, shell).cummax(0).values]
        model.sigma2_noise[group] = torch.where(sums.noise_weight[group] > 0, sigma2, model.sigma2_noise[group])
