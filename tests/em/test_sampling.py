"""The grid of orientations and translations: counts, nesting, perturbation, local searches."""

import healpix
import numpy as np
import pytest
import torch

from tests.em import plain_em as em
from torchem.em.sampling import Grid, Sampling
from torchem.imaging.symmetry import axes_distance, operators, rotation_matrix

IDENTITY = torch.eye(3, dtype=torch.float64)[None]


def angle_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Degrees of the rotation from one to the other."""
    trace = (a * b).sum((-1, -2))
    return torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1)))


@pytest.mark.parametrize(
    ("symmetry", "order", "directions"),
    [("C1", 0, 12), ("C1", 1, 48), ("C1", 2, 192), ("D2", 2, 48), ("D2", 3, 192), ("O", 2, 7)],
)
def test_counts(symmetry: str, order: int, directions: int) -> None:
    grid = Grid(Sampling(symmetry, 10.0, 4.0, healpix_order=order))
    psi = 6 * 2**order
    assert (grid.n_directions, grid.n_psi, grid.n_orientations) == (directions, psi, directions * psi)
    assert (grid.orientation_children, grid.translation_children) == (8, 4)
    every = torch.arange(grid.n_orientations)
    assert angle_between(grid.matrices(every)[:, None], grid.matrices(every[:40])[None]).fill_diagonal_(9).min() > 1


@pytest.mark.parametrize(("offset_range", "count"), [(5, 21), (3, 9), (6, 29), (2, 5), (1, 1), (10, 81)])
def test_translations_within_the_range(offset_range: float, count: int) -> None:
    """In units of 2 px: the range itself belongs to it."""
    grid = Grid(Sampling("C1", offset_range * 1.77, 2 * 1.77, healpix_order=0))
    assert grid.n_translations == count
    assert float(grid.translations.norm(dim=1).max()) <= offset_range * 1.77 + 0.001
    assert (grid.translations == 0).all(1).any()


@pytest.mark.parametrize("oversampling", [1, 2])
def test_children_nest_in_their_parents(oversampling: int) -> None:
    order, step = 1, 6.0
    grid = Grid(Sampling("C1", 9.0, step, healpix_order=order, oversampling=oversampling))
    o, j = 8**oversampling, 4**oversampling
    assert (grid.orientation_children, grid.translation_children) == (o, j)
    orientations = torch.arange(0, grid.n_orientations, 7)
    children = grid.child_matrices((orientations[:, None] * o + torch.arange(o)).flatten()).unflatten(0, (-1, o))
    # a child's view is in the parent's HEALPix pixel
    view = children[:, :, 2].reshape(-1, 3).numpy()
    pixel = healpix.vec2pix(2**order, *view.T, nest=True)
    parents = grid.pixels[orientations // grid.n_psi].repeat_interleave(o)
    assert (pixel == parents.numpy()).all()
    psi = grid.child_psi - grid.psi[:, None]
    assert torch.allclose(psi.mean(1), torch.zeros(grid.n_psi).double(), atol=1e-12)
    assert float(psi.abs().max()) == pytest.approx(30 * (0.5 - 0.5**oversampling / 2))
    # and closer to it than two coarse steps
    assert float(angle_between(children, grid.matrices(orientations)[:, None]).max()) < 60
    shifts = grid.child_translations - grid.translations[:, None]
    assert torch.allclose(shifts.mean(1), torch.zeros(2).double(), atol=1e-12)
    assert float(shifts.abs().max()) == pytest.approx(step * (0.5 - 0.5**oversampling / 2))
    assert len(torch.unique(grid.child_translations.flatten(0, 1), dim=0)) == j * grid.n_translations


def test_children_of_a_flat_grid() -> None:
    grid = Grid(Sampling("C1", 6.0, 4.0, ndim=2, psi_step=12.0))
    assert (grid.n_directions, grid.n_psi, grid.orientation_children) == (1, 30, 2)
    children = grid.child_matrices(torch.arange(60))
    expected = (torch.arange(60).double() - 0.5) * 6.0
    zero = torch.zeros(60, dtype=torch.float64)
    assert torch.allclose(children, rotation_matrix(zero, zero, expected))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("perturbation", [0.0, 0.3, -0.47])
def test_agrees_with_the_plain_grid(ndim: int, perturbation: float) -> None:
    flat = ndim == 2
    sampling = Sampling(
        "D2", 9.0, 6.0, ndim=ndim, healpix_order=1, psi_step=20.0 if flat else 0.0, perturbation=perturbation
    )
    grid = Grid(sampling)
    plain = em.make_grid(em.Sampling(
        20.0 if flat else 30.0, 9.0, 6.0, -1 if flat else 1, grid.pixels.numpy(), perturbation
    ))  # fmt: skip
    every = torch.arange(grid.n_orientations)
    assert np.allclose(grid.matrices(every), plain.coarse.reshape(-1, 3, 3))
    fine = torch.arange(grid.n_orientations * grid.orientation_children)
    assert np.allclose(grid.child_matrices(fine), plain.fine.reshape(-1, 3, 3))
    assert np.allclose(grid.translations, plain.shifts)
    assert np.allclose(grid.coarse_shifts(), plain.coarse_shifts)
    assert np.allclose(grid.fine_shifts(), plain.fine_shifts)


def test_perturbation_turns_all_alike() -> None:
    """Every orientation is followed by the same rotation, every translation by the same shift."""
    still, moved = (Grid(Sampling("C1", 9.0, 6.0, healpix_order=1, perturbation=q)) for q in (0.0, 0.4))
    every = torch.arange(0, still.n_orientations, 5)
    turn = still.matrices(every).mT @ moved.matrices(every)
    assert torch.allclose(turn, turn[:1].expand_as(turn))
    angle = torch.tensor([0.4 * 30.0], dtype=torch.float64)
    assert torch.allclose(turn[:1], rotation_matrix(angle, angle, angle))
    assert torch.allclose(moved.coarse_shifts() - still.coarse_shifts(), torch.tensor(0.4 * 6.0).double())


def test_perturbation_wraps() -> None:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling("C1", 9.0, 6.0)
    values = [sampling.perturbation]
    for _ in range(200):
        sampling.perturb_again(generator)
        values.append(sampling.perturbation)
    assert min(values) < -0.4
    assert max(values) > 0.4
    assert max(abs(v) for v in values) <= 0.5
    steps = np.diff(values) % 1.0  # the circle has a length of 1
    assert (steps >= 0.25 - 1e-12).all()
    assert (steps <= 0.5 + 1e-12).all()


def test_no_perturbation_if_none_is_wanted() -> None:
    sampling = Sampling("C1", 9.0, 6.0, perturb=0.0)
    sampling.perturb_again(torch.Generator())
    assert sampling.perturbation == 0


@pytest.mark.parametrize("symmetry", ["C1", "D2"])
@pytest.mark.parametrize("sigma", [15.0, 6.0])
def test_local_priors(symmetry: str, sigma: float) -> None:
    grid = Grid(Sampling(symmetry, 4.0, 4.0, healpix_order=2))
    group = torch.from_numpy(operators(symmetry))
    euler = torch.tensor([[20.0, 70.0, 359.0], [-175.0, 12.0, 181.0], [88.0, 89.0, -3.0]], dtype=torch.float64)
    particle, orientation, log_prior = grid.local_orientations(euler, sigma, group)
    assert bool((particle.diff() >= 0).all())
    plain = em.make_grid(em.Sampling(15.0, 4.0, 4.0, 2, grid.pixels.numpy()))
    for i, pose in enumerate(euler.numpy()):
        expected = em.local_prior(plain, pose, (sigma, sigma), group.numpy()).ravel()
        found = np.zeros(grid.n_orientations)
        found[orientation[particle == i]] = log_prior[particle == i].exp()
        assert np.allclose(found, expected, atol=1e-14)
        assert found.sum() == pytest.approx(1)
        assert bool((orientation[particle == i].diff() > 0).all())


def test_the_nearest_orientation_is_left_where_none_is_near() -> None:
    grid = Grid(Sampling("C1", 4.0, 4.0, healpix_order=1))
    particle, orientation, log_prior = grid.local_orientations(
        torch.tensor([[3.0, 47.0, 14.0], [100.0, 80.0, 200.0]], dtype=torch.float64), 0.01, IDENTITY
    )
    assert particle.tolist() == [0, 1]
    assert log_prior.tolist() == [0.0, 0.0]
    pose = rotation_matrix(*torch.tensor([[3.0, 47.0, 14.0], [100.0, 80.0, 200.0]], dtype=torch.float64).T)
    assert float(angle_between(grid.matrices(orientation), pose).max()) < 40


@pytest.mark.parametrize("symmetry", ["C1", "C4", "D2", "O", "I2"])
def test_local_searches_cross_the_border_of_the_asymmetric_unit(symmetry: str) -> None:
    grid = Grid(Sampling(symmetry, 4.0, 4.0, healpix_order=2))
    group = torch.from_numpy(operators(symmetry))
    every = grid.matrices(torch.arange(grid.n_orientations))
    generator = torch.Generator().manual_seed(3)
    draw = torch.rand((20, 3), generator=generator, dtype=torch.float64)
    euler = torch.stack((360 * draw[:, 0] - 180, torch.rad2deg(torch.acos(2 * draw[:, 1] - 1)), 360 * draw[:, 2]), 1)
    particle, orientation, _ = grid.local_orientations(euler, 15.0, group)
    for i, pose in enumerate(rotation_matrix(*euler.unbind(1))):
        away = axes_distance(pose.expand_as(every), every, group)
        nearest = torch.nonzero(away < away.min() + 1e-6)[:, 0]
        assert torch.isin(nearest, orientation[particle == i]).all()
