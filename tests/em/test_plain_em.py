"""The yardstick itself: truths that any expectation-maximization iteration has to hold."""

from dataclasses import replace

import numpy as np
import pytest

from tests.em import plain_em as em


def expectation(problem: em.Problem, half: int = 0) -> em.Expectation:
    return em.expectation(
        problem.halves[half], problem.optics, problem.models[half], problem.sampling, problem.settings
    )


@pytest.mark.parametrize("ndim", [2, 3])
def test_slice_is_the_transform_of_the_projection(ndim: int) -> None:
    box, width, centre = 64, 2.5, np.array([1.5, -2.0, 0.5])[:ndim]
    axes = np.meshgrid(*[np.arange(box) - box // 2] * ndim, indexing="ij")[::-1]  # x, y, (z)
    volume = np.exp(-sum((g - c) ** 2 for g, c in zip(axes, centre, strict=True)) / (2 * width**2))
    matrix = em.rotation(*((0, 0, 70) if ndim == 2 else (40, 65, -20)))
    kx, ky, _ = em.half_plane(box)
    found = em.central_slice(em.padded_transform(volume, 20, 2), matrix, kx, ky, 20, 2)
    moved = matrix[:2, :ndim] @ centre
    frequency2 = (kx**2 + ky**2) / box**2
    expected = (np.sqrt(2 * np.pi) * width) ** ndim / box**2 * np.exp(-2 * (np.pi * width) ** 2 * frequency2)
    expected = expected * np.exp(-2j * np.pi * (kx * moved[0] + ky * moved[1]) / box) * (kx**2 + ky**2 <= 400)
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("ndim", [2, 3])
def test_insertion_is_adjoint_to_slicing(ndim: int) -> None:
    rng = np.random.default_rng(0)
    volume = em.padded_transform(rng.normal(size=(16,) * ndim), 6, 2)
    kx, ky, _ = em.half_plane(12)
    matrix = em.rotation(0, 0, 33) if ndim == 2 else em.rotation(10, 50, 33)
    data = rng.normal(size=len(kx)) + 1j * rng.normal(size=len(kx))
    back = em.BackProjection(ndim, 6, 2)
    back.insert(matrix, kx, ky, data, np.ones(len(kx)))
    here = (em.central_slice(volume, matrix, kx, ky, 6, 2).conj() * data).sum().real
    there = (em.right_half(volume).conj() * em.right_half(back.data)).sum().real
    assert here == pytest.approx(there, rel=1e-12)
    assert back.weight.sum() == pytest.approx((kx**2 + ky**2 <= 36).sum())


def test_slices_reconstruct_the_map() -> None:
    rng = np.random.default_rng(2)
    truth = em.phantom(24, 4.0, rng)
    transform = em.padded_transform(truth, 10, 2)
    kx, ky, _ = em.half_plane(20)
    back = em.BackProjection(3, 10, 2)
    for _ in range(300):
        matrix = em.rotation(rng.uniform(0, 360), np.rad2deg(np.arccos(rng.uniform(-1, 1))), rng.uniform(0, 360))
        back.insert(matrix, kx, ky, em.central_slice(transform, matrix, kx, ky, 10, 2), np.ones(len(kx)))
    found = em.reconstruct(*back.finish(), None, 24, 10, 2, 1.0)
    inside = em.radii(24, 3) < 10
    assert np.corrcoef(found[inside], truth[inside])[0, 1] > 0.999
    assert np.polyfit(truth[inside], found[inside], 1)[0] == pytest.approx(1, abs=0.03)


def test_significant_set_takes_the_heaviest_and_ties() -> None:
    weights = np.log([[0.5, 0.2], [0.2, 0.1]])
    assert em.significant_set(weights, 0.6).sum() == 3  # 0.5 + 0.2 is enough, its twin ties
    assert em.significant_set(weights, 0.4).sum() == 1
    assert em.significant_set(np.array([0.0, -np.inf]), 0.999).tolist() == [True, False]


def test_grid_counts_and_children_surround_their_parent() -> None:
    grid = em.make_grid(em.Sampling(30.0, 5 * 2.0, 2 * 2.0, 1, np.arange(48)))
    assert grid.coarse.shape == (48, 12, 3, 3)
    assert grid.fine.shape == (48, 12, 8, 3, 3)
    assert len(grid.shifts) == 21
    assert np.allclose(grid.fine_shifts.mean(1), grid.shifts)
    angle = np.einsum("dsij,dsoij->dso", grid.coarse, grid.fine)
    assert np.rad2deg(np.arccos((angle.min() - 1) / 2)) < 30
    perturbed = em.make_grid(em.Sampling(30.0, 10.0, 4.0, 1, np.arange(48), perturbation=0.4))
    angles = perturbed.fine_euler.reshape(-1, 3)
    assert np.allclose([em.rotation(*a) for a in angles[::7]], perturbed.fine.reshape(-1, 3, 3)[::7])
    assert np.allclose(perturbed.coarse_shifts - perturbed.shifts, 1.6)


def test_local_prior_is_cut_and_sums_to_one() -> None:
    grid = em.make_grid(em.Sampling(15.0, 4.0, 4.0, 2, np.arange(192)))
    prior = em.local_prior(grid, np.array([20.0, 70.0, 359.0]), (15.0, 10.0), np.eye(3)[None])
    over_directions, over_psi = prior.sum(1), prior.sum(0)
    assert prior.sum() == pytest.approx(1)
    distance = np.rad2deg(np.arccos(grid.directions @ em.rotation(20, 70, 0)[2]))
    assert ((over_directions > 0) == (distance < 45)).all()
    assert set(grid.psi[over_psi > 0]) == {330.0, 345.0, 0.0, 15.0}
    sharp = em.local_prior(grid, np.array([20.0, 70.0, 0.0]), (0.1, 0.1), np.eye(3)[None])
    assert (sharp > 0).sum() == 1


@pytest.mark.parametrize(("ndim", "classes"), [(3, 1), (3, 2), (2, 1), (2, 2)])
def test_expectation_holds_its_truths(ndim: int, classes: int) -> None:
    problem = em.example(ndim, classes, n=4)
    e = expectation(problem)
    n = len(e.pmax)
    assert ((e.kept.reshape(n, -1).sum(1) > 0.999) & (e.kept.reshape(n, -1).sum(1) <= 1)).all()
    assert np.isfinite(e.fine).any((-1, -2)).sum() == e.significant.sum()
    dead = problem.models[0].pdf_direction == 0
    assert not e.pdf_direction[dead].any()
    assert e.pdf_direction.sum() == pytest.approx(e.sum_weight)

    # one log weight, pixel by pixel, up to the constant of its particle
    def log_weight(i: int, k: int, d: int, s: int, t: int, o: int, c: int) -> float:
        p, st, m, a = problem.halves[0], problem.settings, problem.models[0], problem.optics.pixel_size
        masked, _, old = em.prepare(p, i, m, problem.optics, st)
        grid = em.make_grid(problem.sampling)
        volume = em.padded_transform(m.references[k], st.current_size // 2, 2)
        total = 0.0
        for ky in range(-st.current_size // 2 + 1, st.current_size // 2 + 1):
            for kx in range(st.current_size // 2 + 1):
                shell = int(np.floor(np.hypot(kx, ky) + 0.5))
                if shell == 0 or shell > st.current_size // 2 or (kx == 0 and ky < 0):
                    continue
                at = np.array([kx]), np.array([ky])
                model = em.central_slice(volume, grid.fine[d, s, o], *at, st.current_size // 2, 2)[0]
                model *= m.scale[p.group[i]] * em.ctf(problem.optics, p.ctf_parameters[i], *at, 24)[0]
                x, y = grid.fine_shifts[t, c] / a
                shifted = masked[ky, kx] * np.exp(-2j * np.pi * (kx * x + ky * y) / 24)
                total -= abs(shifted - model) ** 2 / (2 * m.sigma2[shell])
        offset = old * a + grid.shifts[t] - m.prior_offset[k]
        return total + np.log(m.pdf_direction[k, d]) - (offset @ offset) / (2 * m.sigma_offset**2)

    listed = np.argwhere(e.fine[1] > e.fine[1].max() - 8)
    first, second = listed[0], listed[-1]
    assert e.fine[1][tuple(first)] == pytest.approx(log_weight(1, *first), rel=1e-11)
    assert e.fine[1][tuple(second)] == pytest.approx(log_weight(1, *second), rel=1e-11)


def test_two_equal_classes_share_what_one_has() -> None:
    one = em.example(3, 1, n=4)
    model = one.models[0]
    both = replace(
        model, references=np.repeat(model.references, 2, 0), pdf_direction=np.repeat(model.pdf_direction, 2, 0) / 2,
        data_vs_prior=np.repeat(model.data_vs_prior, 2, 0), prior_offset=np.zeros((2, 2)),
    )  # fmt: skip
    a, b = expectation(one), expectation(replace(one, models=[both]))
    assert np.allclose(b.pmax, a.pmax / 2)
    assert np.allclose(b.data.sum(0), a.data[0], atol=1e-12 * np.abs(a.data).max())
    assert np.allclose(b.noise, a.noise)
    assert np.allclose(b.norm, a.norm)
    assert np.allclose(b.log_likelihood, a.log_likelihood + np.log(2))  # priors count relative to their mean


def test_cross_correlation_lets_one_sample_win() -> None:
    e = expectation(em.example(3, 2, n=4, cross_correlation=True))
    assert (e.n_significant == 1).all()
    assert (e.pmax == 1).all()
    assert (np.isfinite(e.fine).reshape(4, -1).sum(1) == 32).all()
    assert ((e.log_likelihood > 0) & (e.log_likelihood < 1)).all()


def test_local_search_stays_near_the_last_pose() -> None:
    problem = em.example(3, 1, n=4, local=True, perturbation=0.0)
    e = expectation(problem)
    for found, last in zip(e.euler, problem.halves[0].euler, strict=True):
        cosine = em.rotation(*found)[2] @ em.rotation(*last)[2]
        assert np.rad2deg(np.arccos(cosine)) < 60 + 25


def test_maximization_of_two_halves() -> None:
    c2 = np.array([np.eye(3), np.diag([-1.0, -1, 1])])
    problem = em.example(3, 1, halves=2, n=12, operators=c2, pixels=np.arange(0, 16))
    halves = [expectation(problem, h) for h in range(2)]
    groups = [half.group for half in problem.halves]
    arguments = halves, groups, problem.models, problem.optics, problem.settings
    result = em.maximization(*arguments, join_angst=40.0)
    assert result.fsc[0] == 1
    assert np.allclose(result.fsc[:2], 1)  # joined out to 96 Å / 40 Å = shell 3, whole voxels up to shell 2
    assert not result.fsc[11:].any()
    for half, model in enumerate(result.models):
        assert np.average(model.scale, weights=np.bincount(groups[half])) == pytest.approx(1)
        assert model.pdf_direction.sum() == pytest.approx(1)
        assert (model.sigma2 > 0).all()
        turned = model.references[0][1:, 1:, 1:][:, ::-1, ::-1]  # C2 about z
        assert np.abs(turned - model.references[0][1:, 1:, 1:]).max() < 0.05 * np.abs(turned).max()
    last = em.maximization(*arguments, combine=True)
    assert np.allclose(last.unmasked[0], last.unmasked[1])
    assert (last.data_vs_prior[0] >= em.maximization(*arguments).data_vs_prior[0] - 1e-12).all()


@pytest.mark.parametrize("ndim", [2, 3])
def test_iterations_raise_the_likelihood(ndim: int) -> None:
    problem = em.example(ndim, 1, n=8, perturbation=0.0, groups=1)
    settings = replace(problem.settings, adaptive_fraction=0.999999)
    sums = []
    for _ in range(3):
        e = em.expectation(problem.halves[0], problem.optics, problem.models[0], problem.sampling, settings)
        sums.append(e.log_likelihood.sum())
        half = replace(problem.halves[0], norm=e.norm, origins_angst=problem.halves[0].origins_angst)
        result = em.maximization([e], [half.group], problem.models, problem.optics, settings)
        problem = replace(problem, halves=[half], models=result.models)
    assert sums[2] > sums[1] > sums[0]


def test_initial_noise_of_white_images() -> None:
    images = np.random.default_rng(5).normal(size=(200, 24, 24))
    sigma2 = em.initial_noise(images, em.Optics(300, 2.7, 0.1, 4.0), 1000.0)  # no mask within the box
    assert np.allclose(sigma2[1:], 0.5 / 24**2, rtol=0.12)
