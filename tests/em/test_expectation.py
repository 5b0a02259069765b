"""The E-step against a plain NumPy implementation, and truths that hold by themselves."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.em import plain_em as em
from tests.em.torch_problem import CASES, CPU, Converted, Recorder, of_case, plain_half_space, relative_rms, solved
from torchem.em import expectation as expectation_module
from torchem.em.expectation import Expectation, ExpectationSettings
from torchem.em.images import ImageGeometry, prepare_images
from torchem.em.model import Model
from torchem.em.sampling import Grid, Sampling
from torchem.em.sums import Sums
from torchem.imaging.ctf import Optics

# how far log weights may differ, how near to a threshold a sample must be to fall on its other side, and sums
TOLERANCES = {torch.float64: (1e-8, 1e-6, 1e-9), torch.float32: (0.01, 1e-3, 1e-3)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
EVERY_CASE = pytest.mark.parametrize("name", CASES)
# samples further than this below the best carry no weight
DEPTH = 20
PATHS = {"sparse": 2.0, "dense": 0.0}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the fine pass, whatever share of the samples is significant."""
    monkeypatch.setattr(expectation_module, "DENSE_SUPPORT", {"cpu": PATHS[request.param]})
    return request.param


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fine pass by blocks, whose weights can be looked at."""
    monkeypatch.setattr(expectation_module, "DENSE_SUPPORT", {"cpu": PATHS["sparse"]})


def written_out(shape: tuple[int, ...], particle: Tensor, column: Tensor, values: Tensor) -> np.ndarray:
    """A ragged list of samples in the plain implementation's shape, -inf where there is none."""
    n, children = shape[0], values[0].numel()
    out = torch.full((n, int(np.prod(shape[1:])) // children, children), -torch.inf, dtype=torch.float64)
    out[particle, column] = values.reshape(len(values), -1).double()
    return out.numpy().reshape(shape)


def assert_same_log_weights(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal up to a constant of each particle, in both's samples within DEPTH of the best."""
    for mine, plain in zip(found, expected, strict=True):
        deep = plain > plain[np.isfinite(mine)].max() - DEPTH
        deep &= np.isfinite(mine)
        shift = mine[deep].max() - plain[deep].max()
        assert np.abs(mine[deep] - plain[deep] - shift).max() < tolerance


def assert_same_sums(found: Sums, expected: Sums) -> None:
    for name, value in vars(expected).items():
        pairs = zip(getattr(found, name), value, strict=True) if name == "noise" else [(getattr(found, name), value)]
        for one, other in pairs:
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12 * float(other.abs().max()))


def samples_of(case: Converted, run: Recorder) -> np.ndarray:
    """`(n, columns)` which coarse samples were found significant."""
    columns = case.model.n_classes * case.grid.n_orientations * case.grid.n_translations
    out = np.zeros((len(case.batch), columns), bool)
    for samples in run.samples:
        out[samples.particle, samples.column] = True
    return out


@EVERY_CASE
@DTYPES
def test_log_weights_of_the_coarse_pass(name: str, dtype: torch.dtype) -> None:
    _, (plain,) = solved(name)
    case = of_case(name, dtype=dtype)
    run = case.run()
    particle, column, log_weight = (torch.cat([c[i] for c in run.candidates]) for i in range(3))
    found = written_out(plain.coarse.shape, particle, column, log_weight)
    assert_same_log_weights(found, plain.coarse, TOLERANCES[dtype][0])
    if not case.settings.cross_correlation:
        left_out = np.where(np.isfinite(found), -np.inf, plain.coarse).reshape(len(found), -1)
        everything = plain.coarse.reshape(len(found), -1)
        share = np.exp(left_out - everything.max(1, keepdims=True)).sum(1)
        assert (share < 1e-6 * np.exp(everything - everything.max(1, keepdims=True)).sum(1)).all()


@EVERY_CASE
@DTYPES
def test_significant_samples(name: str, dtype: torch.dtype) -> None:
    _, (plain,) = solved(name)
    case = of_case(name, dtype=dtype)
    found = samples_of(case, case.run())
    expected, weights = (a.reshape(found.shape) for a in (plain.significant, plain.coarse))
    threshold = np.where(expected, weights, np.inf).min(1, keepdims=True)
    near = np.abs(weights - threshold) < TOLERANCES[dtype][1]
    assert (found == expected)[~near].all()
    assert near.sum() < 3 * len(found)
    if dtype == torch.float64:
        assert (case.found.significant.numpy() == plain.n_significant).all()


@EVERY_CASE
@DTYPES
@pytest.mark.usefixtures("sparse")
def test_log_weights_of_the_fine_pass(name: str, dtype: torch.dtype) -> None:
    _, (plain,) = solved(name)
    case = of_case(name, dtype=dtype)
    ((samples, weights, log_total),) = case.run().fine
    children = (len(samples.column), -1)
    found = written_out(plain.fine.shape, samples.particle, samples.column, weights.values().reshape(children))
    assert_same_log_weights(found, plain.fine, TOLERANCES[dtype][0])
    if not case.settings.cross_correlation:
        pmax = np.exp(found.reshape(len(found), -1).max(1) - log_total.numpy())
        assert np.abs(pmax - plain.pmax).max() < TOLERANCES[dtype][0]


@EVERY_CASE
@DTYPES
def test_sums(name: str, dtype: torch.dtype, path: str) -> None:
    problem, (plain,) = solved(name)
    case = of_case(name, dtype=dtype)
    sums = case.run(Expectation).sums
    tolerance = TOLERANCES[dtype][2]
    half = (Ellipsis, slice(1, None))  # the plane x = 0 is completed by its mates later
    assert relative_rms(sums.data[half], plain_half_space(problem, plain.data)[half]) < tolerance
    assert relative_rms(sums.weight[half], plain_half_space(problem, plain.weight)[half]) < tolerance
    assert relative_rms(sums.noise[0], plain.noise) < tolerance
    assert relative_rms(sums.scale_xa, plain.xa) < tolerance
    assert relative_rms(sums.scale_aa, plain.aa) < tolerance
    assert relative_rms(sums.pdf_direction, plain.pdf_direction) < tolerance
    if case.model.ndim == 2:
        assert relative_rms(sums.class_offset, plain.prior_offset) < tolerance
    assert float(sums.offset_square) == pytest.approx(plain.offset, rel=tolerance)
    assert float(sums.noise_weight[0]) == pytest.approx(plain.sum_weight, rel=tolerance)
    figures = [len(plain.norm), plain.norm.sum(), plain.pmax.sum()]
    assert sums.totals[:3].tolist() == pytest.approx(figures, rel=tolerance)
    assert sums.group_weight.tolist() == np.bincount(problem.halves[0].group).tolist()


@EVERY_CASE
@DTYPES
def test_figures_of_each_particle(name: str, dtype: torch.dtype, path: str) -> None:
    _, (plain,) = solved(name)
    case = of_case(name, dtype=dtype)
    case.run(Expectation)
    found, tolerance = case.found, TOLERANCES[dtype]
    assert np.abs(found.log_likelihood.numpy() - plain.log_likelihood).max() < tolerance[0]
    assert np.abs(found.norm_correction.numpy() / plain.norm - 1).max() < tolerance[2]
    assert np.abs(found.pmax.numpy() - plain.pmax).max() < tolerance[0]
    assert (found.class_number.numpy() == plain.best_class).all()
    assert np.abs(found.offset_angst.numpy() - plain.origins_angst).max() < 1e-9
    matrices = np.array([em.rotation(*euler) for euler in plain.euler])
    assert np.abs(found.euler_matrix.numpy() - matrices).max() < 1e-9


@EVERY_CASE
def test_dense_and_sparse_sums_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    for support in PATHS.values():
        monkeypatch.setattr(expectation_module, "DENSE_SUPPORT", {"cpu": support})
        sums.append(of_case(name).run(Expectation).sums)
    assert_same_sums(*sums)


@pytest.mark.parametrize("name", ["3D, two classes", "3D, local", "2D, two classes, correlation"])
def test_batches_and_chunks_do_not_matter(name: str, path: str) -> None:
    whole = of_case(name)
    expected = whole.run(Expectation).sums
    case = of_case(name, chunk_elements=3000, fine_weights=2000)
    run = Expectation(case.model, case.grid, case.settings, case.operators)
    found = []
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        part = slice(start, stop)
        found.append(run(case.batch[part], 0, case.group[part], case.norm[part], case.euler[part]))
    assert_same_sums(run.sums, expected)
    for field, value in vars(whole.found).items():
        assert torch.allclose(torch.cat([getattr(f, field) for f in found]), value, rtol=1e-10)


def test_all_images_of_a_batch_say_how_precise_scores_must_be() -> None:
    found = []
    for chunk_elements in (2**24, 1):
        case = deepcopy(of_case("3D", dtype=torch.float32, chunk_elements=chunk_elements))
        case.model.scale[:] = torch.tensor([1.0, 3000.0, 3000.0])
        case.group[:] = 1
        case.group[:2] = 0  # the first images are by far the weakest
        found.append(case.run(Expectation).precisions)
    assert found[0] == found[1] == {"fp64"}


@pytest.mark.parametrize("name", ["3D", "3D, local", "2D, two classes"])
def test_kept_weights_are_nearly_everything(name: str, path: str) -> None:
    case = of_case(name)
    for i in range(len(case.batch)):
        run = Expectation(case.model, case.grid, case.settings, case.operators)
        one = slice(i, i + 1)
        run(case.batch[one], 0, case.group[one], case.norm[one], case.euler[one])
        assert 0.999 <= float(run.sums.noise_weight[0]) <= 1 + 1e-12
        assert float(run.sums.pdf_direction.sum()) == pytest.approx(float(run.sums.noise_weight[0]))


def test_directions_without_probability_stay_empty() -> None:
    case = of_case("3D, two classes")
    sums = case.run(Expectation).sums
    dead = case.model.pdf_direction == 0
    assert dead.any()
    assert not sums.pdf_direction[dead].any()


def blobs(box: int, pixel_size: float, matrix: Tensor, ndim: int) -> Tensor:
    """Gaussian blobs (ndim 3), or what they project to, in grey values that do not depend on the pixel size."""
    width = 9.0  # Å
    centres = torch.tensor([[20.0, 3, -8], [-6, 14, 10], [2, -18, -4], [-15, -5, 16]], dtype=torch.float64)
    axis = (torch.arange(box, dtype=torch.float64) - box // 2) * pixel_size
    grid = torch.stack(torch.meshgrid(*[axis] * ndim, indexing="ij")[::-1], -1)
    moved = (centres @ matrix.T)[:, :ndim]
    square = (grid[..., None, :] - moved).square().sum(-1)
    weight = torch.tensor([1.0, 0.7, 1.3, 0.9], dtype=torch.float64)
    height = 1 if ndim == 3 else np.sqrt(2 * np.pi) * width / REFERENCE_PIXEL
    return (torch.exp(-square / (2 * width**2)) * weight).sum(-1) * height


REFERENCE_BOX, REFERENCE_PIXEL = 32, 4.0


@pytest.mark.parametrize(("box", "pixel_size"), [(32, 4.0), (48, 3.0), (40, 4.0), (26, 5.0)])
def test_optics_groups_of_other_pixel_and_box(box: int, pixel_size: float) -> None:
    """Particles of any sampling fit the same reference, and so score and count alike."""
    sampling = Sampling("C1", offset_range=0.1, offset_step=0.4, healpix_order=1)
    grid = Grid(sampling)
    reference = blobs(REFERENCE_BOX, REFERENCE_PIXEL, torch.eye(3).double(), 3)
    size = 20
    true = torch.tensor([1234, 77, 3003])
    matrices = grid.child_matrices(true)
    images = torch.stack([blobs(box, pixel_size, m, 2) for m in matrices])
    optics = Optics("other", 300.0, 2.7, 0.1, pixel_size, box)
    geometry = ImageGeometry.of(optics, size, REFERENCE_BOX, REFERENCE_PIXEL, torch.float64, CPU)
    batch = prepare_images(
        images, torch.arange(3), geometry, None, torch.ones(3), torch.zeros((3, 2)).double(), 0.9 * box * pixel_size,
        None, 0,
    )  # fmt: skip
    # the references' other optics group comes first
    level = 1e-7 * (REFERENCE_BOX * REFERENCE_PIXEL / box / pixel_size) ** 2
    noise = [torch.full((REFERENCE_BOX // 2 + 1,), 1e-7).double(), torch.full((box // 2 + 1,), level).double()]
    model = Model.initial(reference[None], noise, grid.n_directions, 1)
    settings = ExpectationSettings(current_size=size, coarse_size=size)
    run = Expectation(model, grid, settings, torch.eye(3).double()[None])
    found = run(batch, 1, torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros((3, 3)).double())
    assert torch.allclose(found.euler_matrix, matrices)
    # what is left over is the error of the interpolation, and the little that the projections have beyond the window
    power = batch.power.sum()
    assert float(run.sums.noise[1][: geometry.size // 2 + 1].sum() / power) < 1e-3
    assert not run.sums.noise[0].any()
    assert run.sums.noise_weight[0] == 0
    slices = run.references.slices(geometry, true.sort().values, geometry.n_pixels, fine=True).cut()
    agreement = (slices * batch.ctf - batch.masked[true.sort().indices]).abs().square().sum()
    assert float(agreement) < 1e-3 * float(batch.masked.abs().square().sum())
