"""Single iterations from RELION 5's own state, against what RELION 5 made of it (80 particles × 32 px of 7.08 Å).

Where a number of RELION follows from the floating point of its files rather than from its statistics, this file
imitates that and not the library:

- RELION reads the pixel size of a 3D model as a float32, 7.07999992 Å. Images are 7.08 Å, so an image size of 28 is
  ceil(14.0000001)·2 = 30 px in the E-step, translations are in units of 7.07999992 Å, and half a pixel rounds by
  chance.
- It adds the old origin in px to translations in Å in the offset prior.
- At full size it has no voxel at y or z = -L of the padded transform, where its FFT has the Nyquist row once.
- Classes made from one reference are told apart by offering each particle one class, drawn at random, in iteration 2.
"""

import ctypes
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from torchem.data.mrc import read_map
from torchem.data.particles import Particles
from torchem.data.relion import ModelFile, read_model, read_optimiser, read_sampling
from torchem.data.star import read_star
from torchem.em import maximization as m_step
from torchem.em import schedule
from torchem.em.expectation import BatchResult, Expectation, ExpectationSettings, relative_to_mean
from torchem.em.images import ImageBatch, ImageGeometry, ParticleImages, estimate_noise, modulations, prepare_images
from torchem.em.model import Model, Poses, State
from torchem.em.references import fourier_volumes
from torchem.em.sampling import Grid, Sampling
from torchem.imaging.fourier import FourierPixels, half_transform, inverse_half_transform
from torchem.imaging.masks import soft_sphere
from torchem.imaging.resolution import fourier_shell_correlation, raised_cosine_lowpass
from torchem.imaging.symmetry import axes_distance, operators, rotation_matrix

BOX, PIXEL, DIAMETER, INI_HIGH = 32, 7.08, 200.0, 60.0  # px, Å
MODEL_PIXEL = float(np.float32(PIXEL))
SYMMETRY = {"auto_cc": "D2", "auto_nocc": "D2", "class3d": "C1", "class2d": "C1"}
CLASSES = {"auto_cc": 1, "auto_nocc": 1, "class3d": 2, "class2d": 3}
ITERATIONS = [(run, number) for run in SYMMETRY for number in range(4)]


@dataclass
class Case:
    """One half of one iteration: what torchem made, and what RELION wrote."""

    found: BatchResult
    model: Model
    expected: ModelFile
    expected_maps: Tensor
    table: pd.DataFrame
    operators: Tensor
    shells_used: int
    resolution_shell: int


class LikeRelion(Expectation):
    """RELION's offset prior, Nyquist voxels, and choice of a class for each particle while the classes are alike."""

    allowed: Tensor | None = None

    def __init__(self, model: Model, grid: Grid, settings: ExpectationSettings, operators: Tensor) -> None:
        super().__init__(model, grid, settings, operators)
        if model.ndim == 3 and settings.current_size == model.box:
            for volume in self.references.volumes:
                centre = volume.shape[0] // 2
                volume[centre - 2 * model.box // 2, centre, 0] = 0
                volume[centre, centre - 2 * model.box // 2, 0] = 0

    def _offset_log_prior(self, batch: ImageBatch) -> Tensor:
        offsets = batch.offset_angst[:, None, None] / PIXEL + self.grid.translations - self.model.prior_offset[:, None]
        log_prior = -(offsets * PIXEL).square().sum(-1) / (2 * self.model.sigma_offset**2)
        if self.allowed is None:
            return relative_to_mean(log_prior)
        one_class = relative_to_mean(log_prior[:, 0])[:, None]
        offered = torch.arange(self.model.n_classes) == self.allowed[batch.particles][:, None]
        return torch.where(offered[..., None], one_class, -torch.inf)


def stem(folder: Path, iteration: int) -> str:
    return str(folder / f"run_it{iteration:03d}")


def maps_of(folder: Path, run: str, iteration: int, tag: str) -> Tensor:
    """`(k, ...)` the references of an iteration."""
    if run == "class2d":
        return torch.from_numpy(read_map(stem(folder, iteration) + "_classes.mrcs")[0]).double()
    names = [f"{stem(folder, iteration)}{tag}_class{k + 1:03d}.mrc" for k in range(CLASSES[run])]
    return torch.stack([torch.from_numpy(read_map(name)[0]).double() for name in names])


def origins(folder: Path, run: str, iteration: int) -> Tensor:
    """Old origins in Å as RELION has them in memory, on the right side of every half pixel.

    An origin is a whole number of pixels and the child translation that won in each iteration, added in floating
    point; the files' six decimals do not tell 1.5 px from 1.4999999. So the children are added again.
    """
    columns = ["rlnOriginXAngst", "rlnOriginYAngst"]
    step = 2 * (PIXEL if run == "class2d" else MODEL_PIXEL)
    child = np.array([(t * step - 0.5 * step + (0.5 + o) * step / 2) / PIXEL for t in (-1, 0, 1) for o in (0, 1)])
    tables = [read_star(stem(folder, i) + "_data.star")["particles"] for i in range(1, iteration + 1)]
    origin = np.zeros((80, 2))
    for table in tables:
        whole = np.sign(origin) * np.floor(np.abs(origin) / PIXEL + 0.5)
        added = (table[columns].to_numpy() / PIXEL - whole)[..., None] - child
        origin = (whole + child[np.abs(added).argmin(-1)]) * PIXEL
        assert np.abs(origin - table[columns].to_numpy()).max() < 1e-5
    return torch.from_numpy(origin)


def model_of(file: ModelFile, references: Tensor, grid: Grid, before: Model | None, noise: Tensor) -> Model:
    """torchem's model from RELION's file of the iteration before.

    The files have six decimals, which are three digits of σ² and two of a direction's probability: enough to move a
    sample over the 0.999 threshold. What torchem found in the iteration before, and for iteration 1 the first noise
    spectrum, gives the digits that follow, wherever it agrees with those that the file has.
    """
    model = Model.initial(references, [noise], grid.n_directions, 1, file.norm_correction_average)
    model.sigma_offset = file.sigma_offset_angst
    model.data_vs_prior = torch.tensor(np.array([c.data_vs_prior for c in file.classes]))
    model.sigma2_noise = [with_more_digits(torch.tensor(s.astype(float)), noise) for s in file.sigma2_noise]
    if before is None:
        if model.ndim == 2:
            model.pdf_class = torch.tensor([c.distribution for c in file.classes], dtype=torch.float64)
        return model
    printed = torch.tensor([file.sigma_offset_angst, file.norm_correction_average]).double()
    found = torch.tensor([before.sigma_offset, before.norm_average]).double()
    model.sigma_offset, model.norm_average = with_more_digits(printed, found).tolist()
    if model.ndim == 2:
        printed = torch.tensor([[c.distribution, c.prior_offset_x, c.prior_offset_y] for c in file.classes]).double()
        found = torch.cat((before.pdf_class[:, None], before.prior_offset), 1)
        model.pdf_class, *offset = with_more_digits(printed, found).unbind(1)
        model.pdf_direction, model.prior_offset = model.pdf_class[:, None].clone(), torch.stack(offset, 1)
    elif len(file.classes[0].pdf_direction) == grid.n_directions:
        # otherwise the grid became finer, and its directions are equally likely again
        printed = torch.tensor(np.array([c.pdf_direction for c in file.classes]))
        model.pdf_direction = with_more_digits(printed, before.pdf_direction)
        model.pdf_class = model.pdf_direction.sum(1)
    return model


def with_more_digits(printed: Tensor, found: Tensor) -> Tensor:
    """What was found where it could have been printed so: with six decimals, or seven digits below 0.001."""
    unit = torch.where(printed.abs() < 1e-3, printed.abs(), 1) * 1e-6
    return torch.where((found - printed).abs() < 0.7 * unit, found, printed)


def sampling_of(path: str, run: str, model_pixel: float) -> Sampling:
    file = read_sampling(path)
    return Sampling(
        symmetry=SYMMETRY[run], offset_range=file.offset_range * model_pixel / PIXEL,
        offset_step=file.offset_step * model_pixel / PIXEL, ndim=2 if run == "class2d" else 3,
        healpix_order=file.healpix_order or 0, psi_step=file.psi_step, perturbation=file.perturb_instance,
    )  # fmt: skip


@cache
def iterate(data: Path, run: str, iteration: int) -> list[Case]:
    """One iteration in double from RELION's files of ``iteration`` to be compared with those of the next."""
    folder, flat, auto = data / run, run == "class2d", run.startswith("auto")
    cross_correlation = iteration == 0 and run in ("auto_cc", "class3d")
    particles = Particles.read(data / "particles.star")
    before = read_star(stem(folder, iteration) + "_data.star")["particles"]
    after = read_star(stem(folder, iteration + 1) + "_data.star")["particles"]
    assert list(before["rlnImageName"]) == list(particles.table["rlnImageName"]) == list(after["rlnImageName"])
    sampling = sampling_of(stem(folder, iteration + 1) + "_sampling.star", run, PIXEL if flat else MODEL_PIXEL)
    grid, group = Grid(sampling), torch.from_numpy(operators(SYMMETRY[run]))
    previous = iterate(data, run, iteration - 1) if iteration else []
    norm = torch.ones(80, dtype=torch.float64)
    for case in previous:
        printed = torch.tensor(case.table["rlnNormCorrection"].to_numpy(float))
        norm[case.table.index] = with_more_digits(printed, case.found.norm_correction)
    origin = origins(folder, run, iteration)
    halves = (1, 2) if auto else (0,)
    tags = [f"_half{h}" if auto else "" for h in halves]
    files = [read_model(f"{stem(folder, iteration)}{tag}_model.star") for tag in tags]
    expected = [read_model(f"{stem(folder, iteration + 1)}{tag}_model.star") for tag in tags]
    current = expected[0].current_size
    # sizes are set before the sampling is
    earlier = sampling_of(stem(folder, max(iteration, 1)) + "_sampling.star", run, PIXEL)
    settings = ExpectationSettings(
        current_size=current, coarse_size=schedule.coarse_size(earlier, BOX, PIXEL, DIAMETER, current),
        cross_correlation=cross_correlation, chunk_elements=2**22,
    )  # fmt: skip
    image_size = current if flat else min(BOX, current + 2)
    geometry = ImageGeometry.of(particles.optics[0], image_size, BOX, PIXEL, torch.float64, torch.device("cpu"))

    models, sums, found, members = [], [], [], []
    for number, (half, tag, file) in enumerate(zip(halves, tags, files, strict=True)):
        mine = np.flatnonzero(before["rlnRandomSubset"] == half) if auto else np.arange(80)
        index = torch.from_numpy(mine)
        earlier_model = previous[number].model if previous else None
        noise = earlier_model.sigma2_noise[0] if earlier_model else first_noise(particles)
        model = model_of(file, maps_of(folder, run, iteration, tag), grid, earlier_model, noise)
        batch = prepare_images(
            torch.from_numpy(particles.images(mine)).double(), index, geometry,
            torch.from_numpy(particles.ctf_parameters[mine]), model.norm_average / norm[index], origin[index], DIAMETER,
            None, 1, settings.cross_correlation,
        )  # fmt: skip
        step = LikeRelion(model, grid, settings, group)
        if (run, iteration) == ("class3d", 1):
            step.allowed = torch.from_numpy(after["rlnClassNumber"].to_numpy(int) - 1)
        zero = torch.zeros(len(mine), dtype=torch.int64)
        found.append(step(batch, 0, zero, norm[index], torch.zeros((len(mine), 3)).double()))
        members.append(mine)
        models.append(model)
        sums.append(step.sums)

    if auto:
        resolution = files[0].current_resolution if iteration else INI_HIGH
        m_step.update_halves(
            models, sums, group, 2, tau2_fudge=1.0, join_shell=BOX * PIXEL / max(40.0, resolution), mask=None, seed=0,
            last=False,
        )  # fmt: skip
    else:
        m_step.update_classes(models[0], sums[0], group, 2, current // 2, files[0].tau2_fudge)
    shell = schedule.resolution_shell(models[0].data_vs_prior)
    counts = [FourierPixels.of(BOX).shell_counts()]
    for model, sum_ in zip(models, sums, strict=True):
        m_step.update_parameters(model, sum_, counts, norm=True, scale=True, cross_correlation=cross_correlation)
        if cross_correlation:
            low_pass(model)
            copy_first_class(model)
            shell = round(BOX * PIXEL / INI_HIGH)
        radius = DIAMETER / 2 / PIXEL
        model.references = model.references * soft_sphere(BOX, radius, 5, model.ndim, torch.float64)
    return [
        Case(
            found[i], models[i], expected[i], maps_of(folder, run, iteration + 1, tags[i]), after.iloc[members[i]],
            group, current // 2, shell,
        )
        for i in range(len(halves))
    ]  # fmt: skip


def first_noise(particles: Particles) -> Tensor:
    """The noise spectrum that a run starts with."""
    images = ParticleImages(particles, torch.float64, torch.device("cpu"), keep=False)
    return estimate_noise(images, np.arange(80), particles.optics[0], DIAMETER, torch.zeros((80, 2)).double())


def copy_first_class(model: Model) -> None:
    """Classes that are made from one reference go to the first one in a cross-correlation iteration, then share it."""
    assert not model.pdf_direction[1:].any()
    for values in (model.references, model.data_vs_prior):
        values[1:] = values[:1]
    model.pdf_direction = model.pdf_direction[:1].repeat(model.n_classes, 1)


def low_pass(model: Model) -> None:
    """What the maps and spectra of a cross-correlation iteration are limited to."""
    curve = raised_cosine_lowpass(BOX, PIXEL, INI_HIGH, dtype=torch.float64)
    maps = [inverse_half_transform(half_transform(m, 3) * curve, BOX, 3) for m in model.references]
    model.references = torch.stack(maps)
    model.tau2, model.data_vs_prior = model.tau2 * curve[0, 0] ** 2, model.data_vs_prior * curve[0, 0] ** 2


FIGURES = pytest.mark.parametrize(("run", "iteration"), ITERATIONS, ids=[f"{run}-{i + 1}" for run, i in ITERATIONS])
RELATIVE = 1e-3
PRINTED = 1e-6  # of six decimals


@pytest.fixture(scope="module")
def data(shared: Path) -> Path:
    return shared / "data" / "relion_parity"


def assert_spectrum(found: Tensor, expected: np.ndarray, relative: float | np.ndarray = RELATIVE) -> None:
    expected = np.asarray(expected, float)
    assert (np.abs(found.numpy() - expected) <= relative * np.abs(expected) + PRINTED).all()


@FIGURES
def test_poses_and_numbers_of_significant_samples(data: Path, run: str, iteration: int) -> None:
    for case in iterate(data, run, iteration):
        table, found = case.table, case.found
        angles = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
        euler = torch.tensor(table.reindex(columns=angles, fill_value=0.0).to_numpy(float))
        expected = rotation_matrix(*euler.unbind(1))
        turned = axes_distance(found.euler_matrix, expected, case.operators).numpy() > 0.01
        offsets = table[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()
        moved = (np.abs(found.offset_angst.numpy() - offsets) > 1e-3).any(1)
        other = found.class_number.numpy() + 1 != table["rlnClassNumber"].to_numpy()
        # all of them, where 95 % (classes: 90 %) were asked for
        assert not (turned | moved | other).any()
        assert (found.significant.numpy() == table["rlnNrOfSignificantSamples"].to_numpy()).all()


@FIGURES
def test_figures_of_each_particle(data: Path, run: str, iteration: int) -> None:
    for case in iterate(data, run, iteration):
        table, found = case.table, case.found
        assert np.abs(found.pmax.numpy() - table["rlnMaxValueProbDistribution"].to_numpy()).max() < 1e-5
        assert np.abs(found.log_likelihood.numpy() - table["rlnLogLikeliContribution"].to_numpy()).max() < 1e-3
        assert np.abs(found.norm_correction.numpy() / table["rlnNormCorrection"].to_numpy() - 1).max() < 1e-5


@FIGURES
def test_parameters(data: Path, run: str, iteration: int) -> None:
    cases = iterate(data, run, iteration)
    for case in cases:
        model, expected = case.model, case.expected
        assert_spectrum(model.sigma2_noise[0], expected.sigma2_noise[0])
        assert model.norm_average == pytest.approx(expected.norm_correction_average, rel=1e-5)
        if model.ndim == 3:
            assert model.sigma_offset == pytest.approx(expected.sigma_offset_angst, rel=1e-5)
        else:
            # RELION's variance is about a centre whose Å count as px, and only the centre can be compared
            centres = [[c.prior_offset_x, c.prior_offset_y] for c in expected.classes]
            assert np.abs(model.prior_offset.numpy() - np.array(centres)).max() < 1e-5
        for k, class_ in enumerate(expected.classes):
            if class_.pdf_direction is None:
                assert float(model.pdf_class[k]) == pytest.approx(class_.distribution, abs=1e-5)
            else:
                assert np.abs(model.pdf_direction[k].numpy() - class_.pdf_direction).max() < 1e-5
    # both files have the figure of the first half
    assert cases[0].model.average_pmax == pytest.approx(cases[0].expected.average_pmax, abs=1e-5)
    resolution = BOX * PIXEL / cases[0].resolution_shell
    assert resolution == pytest.approx(cases[0].expected.current_resolution, abs=1e-5)


@FIGURES
def test_spectra(data: Path, run: str, iteration: int) -> None:
    for case in iterate(data, run, iteration):
        # where no slip of the pixel size shrinks them, rounding in floating point decides which of RELION's rotated
        # pixels at r_max itself are inside: that one shell of 2D references differs
        relative = np.full(BOX // 2 + 1, RELATIVE)
        if run == "class2d":
            relative[case.shells_used] = 0.02
        for k, expected in enumerate(case.expected.classes):
            assert_spectrum(case.model.tau2[k], expected.tau2)
            assert_spectrum(case.model.data_vs_prior[k], expected.data_vs_prior, relative)
            if run.startswith("auto"):
                assert_spectrum(case.model.fsc[k], expected.fsc)
            if expected.sigma2.any():
                assert_spectrum(case.model.sigma2[k], expected.sigma2, relative)
                assert np.abs(case.model.fourier_coverage[k].numpy() - expected.completeness).max() < 1e-5


@FIGURES
def test_maps(data: Path, run: str, iteration: int) -> None:
    for case in iterate(data, run, iteration):
        for found, expected in zip(case.model.references, case.expected_maps, strict=True):
            fsc = fourier_shell_correlation(found, expected)[: case.shells_used + 1]
            if run == "class2d":
                assert fsc[case.shells_used] > 0.999  # as in test_spectra
                fsc = fsc[:-1]
            assert fsc.min() > 0.9999
            assert (found - expected).norm() < 1e-4 * expected.norm()


def test_first_noise_spectrum(data: Path) -> None:
    found = first_noise(Particles.read(data / "particles.star"))
    for run in SYMMETRY:
        expected = read_model(stem(data / run, 0) + ("_half1" if run.startswith("auto") else "") + "_model.star")
        assert_spectrum(found, expected.sigma2_noise[0], 1e-6)


@pytest.mark.parametrize(("run", "iteration"), [r for r in ITERATIONS if r[0] != "class2d" and r[1] > 0])
def test_changes(data: Path, run: str, iteration: int) -> None:
    folder = data / run
    tables = [read_star(stem(folder, i) + "_data.star")["particles"] for i in (iteration, iteration + 1)]
    eulers = [torch.tensor(t[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(float)) for t in tables]
    offsets = [torch.tensor(t[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy(float)) for t in tables]
    poses = Poses.initial(eulers[1], offsets[1], torch.ones(80))
    sampling = Sampling(symmetry=SYMMETRY[run], offset_range=3, offset_step=2)
    flat = torch.zeros(BOX // 2 + 1)
    state = State([], sampling, poses, torch.zeros(80), torch.Generator(), flat)
    schedule.update_changes(state, eulers[0], offsets[0], torch.from_numpy(operators(SYMMETRY[run])))
    expected = read_optimiser(stem(folder, iteration + 1) + "_optimiser.star")
    assert state.change_angles == pytest.approx(expected.changes_rot, abs=2e-5)
    assert state.change_offsets == pytest.approx(expected.changes_trans, abs=2e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="RELION drew with glibc's rand")
@pytest.mark.parametrize(
    ("run", "iteration"), [("auto_nocc", 0), ("auto_nocc", 1), ("auto_nocc", 3), ("auto_cc", 1), ("auto_cc", 3)]
)
def test_accuracies(data: Path, run: str, iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RELION's draws of the angle and the coordinate that the error goes to.

    Its growing errors are sums in floating point and so up to 0.1 larger, here and there, than torchem's.
    """
    folder, particles = data / run, Particles.read(data / "particles.star")
    before = read_model(stem(folder, iteration) + "_half1_model.star")
    after = read_model(stem(folder, iteration + 1) + "_half1_model.star")
    table = read_star(stem(folder, iteration) + "_data.star")["particles"]
    libc, draws = ctypes.CDLL("libc.so.6"), []
    for number in range(80):
        libc.srand(1 + number)  # its random seed and the image
        draws.append(libc.rand() / (2**31 - 1))
    u = torch.tensor(draws)
    drawn = {3: (u >= 0.3333).long() + (u >= 0.6667), 2: (u >= 0.5).long()}
    monkeypatch.setattr(torch, "randint", lambda high, *_, **__: drawn[high])

    size = after.current_size
    geometry = ImageGeometry.of(
        particles.optics[0], min(BOX, size + 2), BOX, PIXEL, torch.float64, torch.device("cpu")
    )  # fmt: skip
    ctf, _ = modulations(geometry, torch.from_numpy(particles.ctf_parameters), 80, torch.float64)
    noise = torch.from_numpy(before.sigma2_noise[0].astype(float))
    volumes = fourier_volumes(maps_of(folder, run, iteration, "_half1"), size // 2, 2)
    euler = table.reindex(columns=["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"], fill_value=0.0).to_numpy(float)
    angle, shift, share = schedule.estimate_accuracy(
        volumes, geometry, ctf, (1 / noise)[geometry.pixels.shell[: geometry.n_pixels]], torch.from_numpy(euler),
        torch.zeros(80, dtype=torch.int64), size // 2, 2, BOX, torch.Generator(),
    )  # fmt: skip
    assert angle == pytest.approx(after.classes[0].acc_rot, abs=0.11)
    assert shift == pytest.approx(after.classes[0].acc_trans, abs=0.11 * PIXEL)
    assert float(share.sum()) == pytest.approx(1)
    assert np.abs(share.numpy() - after.classes[0].orientability).max() < 0.02
