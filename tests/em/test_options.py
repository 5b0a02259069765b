"""Options out of bounds are refused, all of them on one screen."""

from types import SimpleNamespace

import pytest

from torchem.em.options import (
    DatasetOptions,
    DistributedOptions,
    MemoryOptions,
    ReferenceOptions,
    RefineOptions,
    SamplingOptions,
)
from torchem.errors import InputError


def test_defaults_are_within_bounds() -> None:
    RefineOptions().check()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (RefineOptions(dataset=DatasetOptions(particle_diameter=0)), "dataset.particle_diameter=0"),
        (RefineOptions(dataset=DatasetOptions(particle_diameter=-5.0)), "dataset.particle_diameter=-5.0"),
        (RefineOptions(dataset=DatasetOptions(pixel_size=float("nan"))), "dataset.pixel_size=nan"),
        (RefineOptions(dataset=DatasetOptions(symmetry="X3")), "dataset.symmetry=X3"),
        (RefineOptions(dataset=DatasetOptions(symmetry="D2v")), "dataset.symmetry=D2v"),
        (RefineOptions(dataset=DatasetOptions(symmetry="Oh")), "dataset.symmetry=Oh"),
        (RefineOptions(dataset=DatasetOptions(symmetry="I5")), "dataset.symmetry=I5"),
        (RefineOptions(dataset=DatasetOptions(name="../up")), "dataset.name=../up"),
        (RefineOptions(run_name=".."), "run_name=.."),
        (RefineOptions(reference=ReferenceOptions(ini_high=0)), "reference.ini_high=0"),
        (RefineOptions(sampling=SamplingOptions(healpix_order=-1)), "sampling.healpix_order=-1"),
        (RefineOptions(sampling=SamplingOptions(healpix_order=9)), "sampling.healpix_order=9"),
        (RefineOptions(sampling=SamplingOptions(local_healpix_order=-1)), "sampling.local_healpix_order=-1"),
        (RefineOptions(sampling=SamplingOptions(oversampling=4)), "sampling.oversampling=4"),
        (RefineOptions(sampling=SamplingOptions(offset_range=-1)), "sampling.offset_range=-1"),
        (RefineOptions(sampling=SamplingOptions(offset_step=0)), "sampling.offset_step=0"),
        (RefineOptions(sampling=SamplingOptions(offset_step=0.01)), "sampling.offset_step=0.01"),
        (RefineOptions(sampling=SamplingOptions(adaptive_fraction=1.5)), "sampling.adaptive_fraction=1.5"),
        (RefineOptions(sampling=SamplingOptions(adaptive_fraction=0)), "sampling.adaptive_fraction=0"),
        (RefineOptions(sampling=SamplingOptions(perturb=-0.5)), "sampling.perturb=-0.5"),
        (RefineOptions(sampling=SamplingOptions(low_resol_join_halves=-2)), "sampling.low_resol_join_halves=-2"),
        (RefineOptions(sampling=SamplingOptions(sigma_ang=0)), "sampling.sigma_ang=0"),
        (RefineOptions(tau2_fudge=0), "tau2_fudge=0"),
        (RefineOptions(max_iterations=0), "max_iterations=0"),
        (RefineOptions(seed=-1), "seed=-1"),
        (RefineOptions(device="gpu"), "device=gpu"),
        (RefineOptions(precision="half"), "precision=half"),
        (RefineOptions(distributed=DistributedOptions(backend="tcp")), "distributed.backend=tcp"),
        (RefineOptions(solvent_correct_fsc=True), "solvent_correct_fsc=True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_out_of_bounds(options: RefineOptions, named: str) -> None:
    with pytest.raises(InputError) as error:
        options.check()
    # one line: the option, its value, what to do
    assert str(error.value).startswith(named + ": ")
    assert "\n" not in str(error.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(InputError) as error:
        RefineOptions(tau2_fudge=-1, seed=-1, device="tpu").check()
    assert [line.split("=")[0] for line in str(error.value).split("\n")] == ["tau2_fudge", "seed", "device"]


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [
        (None, 0), ("8GiB", 8 << 30), ("8 gib", 8 << 30), ("1.5G", 15 * 10**8), ("500MB", 5 * 10**8),
        ("99999999", 99999999),
    ],
)
def test_size_of_memory(size: str | None, n_bytes: int) -> None:
    assert MemoryOptions(limit=size).limit_bytes() == n_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MemoryOptions(allocator="heap"), "memory.allocator=heap: must be one of auto, stack, torch"),
        (MemoryOptions(limit="8 apples"), "memory.limit=8 apples: must be a size"),
        (MemoryOptions(limit="8"), "memory.limit=8: must be a size of at least 64MiB"),
        (MemoryOptions("torch", strict=True), "memory.strict=true: needs memory.allocator=stack"),
        (MemoryOptions("torch", trace=True), "memory.trace=true: needs memory.allocator=stack"),
    ],
)
def test_memory_that_cannot_be(options: MemoryOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RefineOptions(memory=options).check()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (RefineOptions(), "dataset.particle_diameter is not given"),
        (RefineOptions(sampling=SamplingOptions(offset_range=8)), "sampling.offset_range=8"),
        (RefineOptions(reference=ReferenceOptions(ini_high=8.0)), "reference.ini_high=8"),
        (RefineOptions(reference=ReferenceOptions(ini_high=65.0)), "reference.ini_high=65"),
        (RefineOptions(sampling=SamplingOptions(start_from_poses=True)), "sampling.start_from_poses=true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_do_not_fit_the_particles(options: RefineOptions, named: str) -> None:
    optics = SimpleNamespace(box=16, pixel_size=4.0, name="opticsGroup1")
    particles = SimpleNamespace(optics=[optics], has_poses=False, source="p.star")
    with pytest.raises(InputError) as error:
        options.check_against(particles)
    assert named in str(error.value)
