"""The M-step against a plain NumPy implementation, and what a reconstruction must hold."""

import numpy as np
import pytest
import torch

from tests.em import plain_em as em
from tests.em.torch_problem import CASES, Converted, of_case, relative_rms, solved
from torchem.em import maximization as m_step
from torchem.em.expectation import Expectation
from torchem.em.maximization import Backprojection
from torchem.imaging.fourier import FourierPixels
from torchem.imaging.masks import soft_sphere

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["double", "single"])


def updated(case: Converted) -> Converted:
    """The case with its model's parameters brought up to date."""
    m_step.update_parameters(
        case.model, case.run(Expectation).sums, [FourierPixels.of(case.model.box).shell_counts()],
        norm=True, scale=True, cross_correlation=case.settings.cross_correlation,
    )  # fmt: skip
    return case


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
    model, tolerance = updated(of_case(name, dtype=dtype)).model, TOLERANCES[dtype]
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
@pytest.mark.parametrize("joined", [False, True], ids=["halves", "joined"])
@DTYPES
def test_gold_standard(name: str, joined: bool, dtype: torch.dtype) -> None:
    problem, halves = solved(name, 2)
    box, settings = 24, problem.settings
    join, known = 30.0, 24.0  # Å
    expected = em.maximization(
        halves, [half.group for half in problem.halves], problem.models, problem.optics, settings,
        join_angst=join, resolution_angst=known, combine=joined,
    )  # fmt: skip
    tolerance = TOLERANCES[dtype]
    sums = []
    for half in range(2):
        case = of_case(name, half, 2, dtype)
        total = case.run(Expectation).sums
        sums.append(Backprojection.of(total.data[0], total.weight[0], case.operators, settings.padding, box))
    m_step.join_low_resolution(*sums, box * problem.optics.pixel_size / max(join, known))
    fsc = m_step.fourier_shell_correlation_of_sums(*sums)
    assert np.abs(fsc.numpy() - expected.fsc).max() < tolerance
    if joined:
        sums = [sums[0] + sums[1]] * 2
    for half, sum_ in enumerate(sums):
        noise = sum_.noise_power()
        ratio, tau2 = m_step.prior_from_fsc(fsc, noise, settings.tau2_fudge, joined)
        assert relative_rms(noise, expected.sigma2_reconstruction[half][0]) < tolerance
        assert relative_rms(ratio, expected.data_vs_prior[half][0]) < tolerance
        assert relative_rms(tau2, expected.tau2[half][0]) < tolerance
        assert relative_rms(sum_.reconstruct(tau2, settings.tau2_fudge), expected.unmasked[half][0]) < tolerance
        if not joined:
            masked = sum_.reconstruct(tau2, settings.tau2_fudge).numpy() * mask_of(problem)
            assert relative_rms(masked, expected.models[half].references[0]) < tolerance
