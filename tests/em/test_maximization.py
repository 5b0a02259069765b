"""The M-step against a plain NumPy implementation, and what a reconstruction must hold."""

import numpy as np
import pytest
import torch

from tests.em import plain_em as em
from tests.em.torch_problem import CASES, of_case, relative_rms, solved
from torchem.em import maximization as m_step
from torchem.em.expectation import Expectation
from torchem.em.model import Model
from torchem.em.reconstruction import Backprojection, fourier_shell_correlation_of_sums, join_low_resolution
from torchem.imaging.fourier import FourierPixels
from torchem.imaging.masks import soft_sphere
from torchem.imaging.projection import volume_radius2
from torchem.imaging.resolution import phase_randomised_fsc

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["double", "single"])


def mask_of(problem: em.Problem) -> np.ndarray:
    """The soft sphere that a plain M-step multiplies its maps by."""
    references = problem.models[0].references
    radius = problem.settings.particle_diameter / 2 / problem.optics.pixel_size
    return soft_sphere(references.shape[-1], radius, 5, ndim=references.ndim - 1, dtype=torch.float64).numpy()


@pytest.mark.parametrize("name", CASES)
@DTYPES
def test_parameters(name: str, dtype: torch.dtype) -> None:
    problem, halves = solved(name)
    expected = em.maximization(
        halves, [problem.halves[0].group], problem.models, problem.optics, problem.settings
    ).models[0]
    case, tolerance = of_case(name, dtype=dtype), TOLERANCES[dtype]
    model = case.model
    m_step.update_parameters(
        model, case.run(Expectation).sums, [FourierPixels.of(model.box).shell_counts()],
        norm=True, scale=True, cross_correlation=case.settings.cross_correlation,
    )  # fmt: skip
    assert model.norm_average == pytest.approx(expected.norm_average, rel=tolerance)
    assert model.sigma_offset == pytest.approx(expected.sigma_offset, rel=tolerance)
    assert relative_rms(model.scale, expected.scale) < tolerance
    assert relative_rms(model.pdf_direction, expected.pdf_direction) < tolerance
    assert relative_rms(model.pdf_class, expected.pdf_direction.sum(1)) < tolerance
    if problem.models[0].references.ndim == 4:
        assert not model.prior_offset.any()
    else:
        assert relative_rms(model.prior_offset, expected.prior_offset) < tolerance
    if problem.settings.cross_correlation:
        assert (model.sigma2_noise[0].numpy() == problem.models[0].sigma2).all()
    else:
        assert relative_rms(model.sigma2_noise[0], expected.sigma2) < tolerance


@pytest.mark.parametrize("name", ["3D", "3D, two classes", "2D", "2D, two classes"])
@DTYPES
def test_classification(name: str, dtype: torch.dtype) -> None:
    problem, halves = solved(name)
    expected = em.maximization(
        halves, [problem.halves[0].group], problem.models, problem.optics, problem.settings
    )  # fmt: skip
    case, tolerance, settings = of_case(name, dtype=dtype), TOLERANCES[dtype], problem.settings
    sums = case.run(Expectation).sums
    m_step.update_classes(
        case.model, sums, case.operators, settings.padding, settings.current_size // 2, settings.tau2_fudge
    )
    assert relative_rms(case.model.tau2, expected.tau2[0]) < tolerance
    assert relative_rms(case.model.sigma2, expected.sigma2_reconstruction[0]) < tolerance
    assert relative_rms(case.model.data_vs_prior, expected.data_vs_prior[0]) < tolerance
    for found, map_ in zip(case.model.references, expected.unmasked[0], strict=True):
        assert relative_rms(found, map_) < tolerance


@pytest.mark.parametrize("name", ["3D", "2D"])
@pytest.mark.parametrize("last", [False, True], ids=["halves", "joined"])
@DTYPES
def test_gold_standard(name: str, last: bool, dtype: torch.dtype) -> None:
    problem, halves = solved(name, 2)
    settings, tolerance = problem.settings, TOLERANCES[dtype]
    join, known = 30.0, 24.0  # Å
    groups = [half.group for half in problem.halves]
    limits = {"join_angst": join, "resolution_angst": known}
    expected = em.maximization(halves, groups, problem.models, problem.optics, settings, **limits)
    cases = [of_case(name, half, 2, dtype) for half in range(2)]
    models = [case.model for case in cases]
    found = m_step.update_halves(
        models, [case.run(Expectation).sums for case in cases], cases[0].operators, settings.padding,
        tau2_fudge=settings.tau2_fudge, join_shell=24 * problem.optics.pixel_size / max(join, known), mask=None,
        seed=0, last=last,
    )  # fmt: skip
    for half, model in enumerate(models):
        agrees_with(model, expected, half, tolerance)
        masked = model.references[0].numpy() * mask_of(problem)
        assert relative_rms(masked, expected.models[half].references[0]) < tolerance
    if not last:
        assert found is None
        return
    both = em.maximization(halves, groups, problem.models, problem.optics, settings, combine=True, **limits)
    agrees_with(found.model, both, 0, tolerance)
    # without a prior, and before the halves are joined
    for map_, half, model in zip(found.unfiltered, halves, problem.models, strict=True):
        data, weight = half.data[0], half.weight[0]
        r_max, padding = settings.current_size // 2, settings.padding
        if model.references.ndim == 4:
            data, weight = em.symmetrise(data, weight, settings.operators, padding * r_max)
        plain = em.reconstruct(data, weight, None, 24, r_max, padding, 1.0)
        assert relative_rms(map_, plain) < tolerance


def agrees_with(model: Model, expected: em.Maximization, half: int, tolerance: float) -> None:
    """The spectra and the map, before any mask."""
    assert np.abs(model.fsc[0].numpy() - expected.fsc).max() < tolerance
    assert relative_rms(model.sigma2[0], expected.sigma2_reconstruction[half][0]) < tolerance
    assert relative_rms(model.data_vs_prior[0], expected.data_vs_prior[half][0]) < tolerance
    assert relative_rms(model.tau2[0], expected.tau2[half][0]) < tolerance
    assert relative_rms(model.references[0], expected.unmasked[half][0]) < tolerance


def test_a_new_iteration_starts_from_the_halves_own_maps() -> None:
    """The joined map does not flow back: the two halves stay apart where they are not joined."""
    cases = [of_case("3D", half, 2) for half in range(2)]
    models = [case.model for case in cases]
    m_step.update_halves(
        models, [case.run(Expectation).sums for case in cases], cases[0].operators, 2, tau2_fudge=1.0,
        join_shell=None, mask=None, seed=0, last=True,
    )  # fmt: skip
    assert relative_rms(models[0].references, models[1].references) > 0.1


def test_low_resolution_is_shared() -> None:
    cases = [of_case("3D", half, 2) for half in range(2)]
    sums = [case.run(Expectation).sums for case in cases]
    first, second = Backprojection.of([(s.data[0], s.weight[0]) for s in sums], cases[0].operators, 2, 24)
    sum_before = first.data + second.data
    join_low_resolution(first, second, 2.9999999)  # 3, but for rounding it is not 4
    join_low_resolution(first, second, 3.0000001)
    radius = volume_radius2(tuple(first.weight.shape), first.weight.device).sqrt() / 2
    low = radius <= 3
    assert torch.equal(first.data[low], second.data[low])
    assert torch.equal(first.weight[low], second.weight[low])
    assert not torch.equal(first.data[radius <= 3.6], second.data[radius <= 3.6])
    assert torch.allclose(first.data + second.data, sum_before)
    fsc = fourier_shell_correlation_of_sums(first, second)
    assert torch.allclose(fsc[:3], torch.ones(3).double())
    assert float(fsc[4]) < 1 - 1e-6


def test_masked_fsc_is_that_of_the_masked_maps() -> None:
    cases = [of_case("3D", half, 2) for half in range(2)]
    sums = [case.run(Expectation).sums for case in cases]
    mask = soft_sphere(24, 7.0, 3.0, dtype=torch.float64)
    models = [case.model for case in cases]
    # a map takes its sums
    copies = [(s.data[0].clone(), s.weight[0].clone()) for s in sums]
    halves = Backprojection.of(copies, cases[0].operators, 2, 24)
    m_step.update_halves(
        models, sums, cases[0].operators, 2, tau2_fudge=1.0, join_shell=None, mask=mask, seed=7, last=False
    )
    expected = phase_randomised_fsc(
        halves[0].reconstruct(), halves[1].reconstruct(), mask, torch.Generator().manual_seed(7)
    )[0]
    assert torch.allclose(models[0].fsc[0][:11], expected[:11])
    assert not models[0].fsc[0][11:].any()
    assert torch.equal(models[0].fsc, models[1].fsc)
