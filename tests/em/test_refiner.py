"""Whole runs on tiny sets."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from torchem.data.mrc import read_map
from torchem.data.particles import Particles
from torchem.data.relion import read_model
from torchem.data.star import read_star, write_star
from torchem.em import schedule
from torchem.em.options import DatasetOptions, ReferenceOptions, RefineOptions, SamplingOptions
from torchem.em.refiner import Refiner
from torchem.errors import InputError

OPTIONS = RefineOptions(
    dataset=DatasetOptions(particle_diameter=50.0), reference=ReferenceOptions(ini_high=30.0),
    sampling=SamplingOptions(healpix_order=1), max_iterations=4, device="cpu",
)  # fmt: skip


def test_two_boxes_and_pixel_sizes(small_set: Callable[..., Path]) -> None:
    """The second optics group has more shells than the reference: what is said of shells is said of the reference's."""

    def finer(optics: pd.DataFrame, particles: pd.DataFrame, images: np.ndarray) -> None:
        optics["rlnOpticsGroup"] = particles["rlnOpticsGroup"] = 2
        optics["rlnImagePixelSize"] = 3.0
        particles["rlnImageName"] = particles["rlnImageName"].str.replace("particles", "finer")

    fine = read_star(small_set(finer, n=20, box=24))
    Path("particles.mrcs").rename("finer.mrcs")
    coarse = read_star(small_set(n=4))
    blocks = {name: pd.concat([coarse[name], fine[name]]) for name in ("optics", "particles")}
    write_star("both.star", blocks)
    particles = Particles.read("both.star")
    iterations = list(Refiner(OPTIONS, particles, read_map("reference.mrc")[0], folder=Path()))
    assert len(iterations) == 4 and all(bool(map_.isfinite().all()) for map_ in iterations[-1].maps)
    model = read_model("run_it004_half1_model.star")
    assert [len(spectrum) for spectrum in model.sigma2_noise] == [9, 13]
    assert len(model.classes[0].orientability) == 9


def test_the_result_speaks_of_all_particles(small_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are those of both halves and of the last iteration, though its map started from the first's."""
    monkeypatch.setattr(schedule, "has_converged", lambda state: state.iteration == 3)
    refiner = Refiner(OPTIONS, Particles.read(small_set()), read_map("reference.mrc")[0], folder=Path())
    assert [iteration.converged for iteration in refiner] == [False, False, True]
    model, particles = read_model("run_model.star"), read_star("run_data.star")["particles"]
    # of the 99.9 % of the weights that are kept
    assert model.average_pmax == pytest.approx(particles["rlnMaxValueProbDistribution"].mean() / 0.999, rel=2e-4)
    assert model.norm_correction_average == pytest.approx(particles["rlnNormCorrection"].mean() / 0.999, rel=2e-4)
    assert model.log_likelihood == pytest.approx(particles["rlnLogLikeliContribution"].sum(), rel=1e-5)
    first, second = refiner.state.halves
    between = sorted((first.sigma2_noise[0][2].item(), second.sigma2_noise[0][2].item()))
    assert between[0] < model.sigma2_noise[0][2] < between[1]


def test_resumed_is_uninterrupted(small_set: Callable[..., Path]) -> None:
    particles, reference = Particles.read(small_set()), read_map("reference.mrc")[0]
    list(Refiner(OPTIONS, particles, reference, folder=Path()))
    last = {path: path.read_bytes() for path in Path().glob("run_it004_*")}
    assert len(last) > 6
    for path in [*Path().glob("run_it003_*"), *last]:
        path.unlink()
    assert [iteration.number for iteration in Refiner.resume(OPTIONS, particles, reference, folder=Path())] == [3, 4]
    for path, values in last.items():
        assert path.read_bytes() == values, path
    fewer = particles.select(np.arange(10))
    with pytest.raises(InputError, match=r"begun with 12 particles of 16 px, but .*particles.star has 10 of 16 px"):
        Refiner.resume(OPTIONS, fewer, reference, folder=Path())
    for path in Path().glob("run_it*_checkpoint.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"run_it004_checkpoint.pt cannot be read"):
        Refiner.resume(OPTIONS, particles, reference, folder=Path())


def test_optics_groups_without_particles(small_set: Callable[..., Path]) -> None:
    """Selections leave some: the result is that without them."""

    def unused(optics: pd.DataFrame, particles: pd.DataFrame, images: np.ndarray) -> None:
        optics.loc[1] = optics.loc[0]
        optics["rlnOpticsGroup"], optics["rlnImageSize"] = [7, 1], [32, 16]

    averages = [
        next(iter(Refiner(OPTIONS, Particles.read(small_set(change)), read_map("reference.mrc")[0]))).maps
        for change in (None, unused)
    ]
    for plain, found in zip(*averages, strict=True):
        assert bool((plain == found).all())


def test_going_on_in_another_precision_is_refused(small_set: Callable[..., Path]) -> None:
    particles, reference = Particles.read(small_set()), read_map("reference.mrc")[0]
    next(iter(Refiner(OPTIONS, particles, reference, folder=Path())))
    with pytest.raises(InputError, match="not begun with precision=double"):
        Refiner.resume(replace(OPTIONS, precision="double"), particles, reference, folder=Path())


def test_tables_name_images_where_they_are_found(small_set: Callable[..., Path]) -> None:
    """The input stands beside its stack; what is written elsewhere reads as well."""
    star = small_set().rename("particles.star")
    Path("set").mkdir()
    for name in ("particles.mrcs", star.name):
        Path(name).rename(Path("set") / name)
    Path("run").mkdir()
    particles = Particles.read(Path("set") / star.name)
    list(Refiner(replace(OPTIONS, max_iterations=1), particles, read_map("reference.mrc")[0], folder=Path("run")))
    again = Particles.read("run/run_it001_data.star")
    np.testing.assert_array_equal(again.images([3]), particles.images([3]))
    assert again.has_poses


def test_local_from_the_first_iteration(small_set: Callable[..., Path]) -> None:
    """With poses, and a first grid as fine as local searches' one."""

    def posed(optics: pd.DataFrame, particles: pd.DataFrame, images: np.ndarray) -> None:
        particles["rlnAngleRot"], particles["rlnAngleTilt"], particles["rlnAnglePsi"] = 10.0, 50.0, -70.0

    sampling = replace(OPTIONS.sampling, local_healpix_order=1, sigma_ang=7.0)
    for change, local in ((posed, True), (None, False)):
        particles = Particles.read(small_set(change))
        refiner = Refiner(replace(OPTIONS, sampling=sampling), particles, read_map("reference.mrc")[0])
        assert refiner.state.local_sigma == (7.0 if local else None)
        assert refiner.step().local == local
    useless = replace(sampling, local_healpix_order=4)
    with pytest.raises(InputError, match=r"sampling.sigma_ang=7: the first search is not local"):
        Refiner(replace(OPTIONS, sampling=useless), particles, read_map("reference.mrc")[0])


def test_two_particles_are_dealt_to_both_halves(small_set: Callable[..., Path]) -> None:
    particles, reference = Particles.read(small_set(n=2)), read_map("reference.mrc")[0]
    for seed in range(4):
        refiner = Refiner(replace(OPTIONS, seed=seed), particles, reference)
        assert sorted(refiner.state.subset.tolist()) == [0, 1]


def test_optics_group_of_one_particle(small_set: Callable[..., Path]) -> None:
    """It is not its own average: the half without it must not take it for free of noise."""

    def alone(optics: pd.DataFrame, particles: pd.DataFrame, images: np.ndarray) -> None:
        optics.loc[1] = optics.loc[0]
        optics["rlnOpticsGroup"] = [1, 2]
        particles.loc[5, "rlnOpticsGroup"] = 2

    refiner = Refiner(OPTIONS, Particles.read(small_set(alone)), read_map("reference.mrc")[0])
    for half in refiner.state.halves:
        assert all(bool((spectrum[1:8] > 0).all()) for spectrum in half.sigma2_noise)


@pytest.mark.parametrize(("label", "message"), [
    ("rlnOpticsGroup", "optics group opticsGroup1: all 2 images looked at are constant or not finite"),
    ("rlnRandomSubset", "no particle of one half can be used"),
])  # fmt: skip
def test_nothing_that_can_be_used(small_set: Callable[..., Path], label: str, message: str) -> None:
    """All images of an optics group, or of a half, are constant."""

    def blank(optics: pd.DataFrame, particles: pd.DataFrame, images: np.ndarray) -> None:
        optics.loc[1] = optics.loc[0]
        optics["rlnOpticsGroup"] = [1, 2]
        particles["rlnOpticsGroup"] = [1, 2] * 6
        particles[label] = [2] * 10 + [1, 1]
        images[10:] = 3.0

    particles, reference = Particles.read(small_set(blank)), read_map("reference.mrc")[0]
    with pytest.raises(InputError, match=message):
        list(Refiner(OPTIONS, particles, reference))
