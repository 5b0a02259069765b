"""The command: which data it takes, and what it does about a run folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import torchem
from torchem import commands
from torchem.data.mrc import read_map
from torchem.em.options import DatasetOptions, ReferenceOptions, RefineOptions, StandIn
from torchem.errors import InputError
from torchem.mra.options import AlignOptions
from torchem.refine import Job, _left, complete, finished, make_stand_in, plan
from torchem.runtime.progress import Progress
from torchem.runtime.run_folder import inspect, make_room, write_settings

RUN = Path("outputs/particles/run")


@pytest.fixture
def options(small_set: Callable) -> RefineOptions:
    small_set()
    return RefineOptions(
        dataset=DatasetOptions(star="particles.star", particle_diameter=50.0),
        reference=ReferenceOptions(map="reference.mrc", ini_high=30.0),
        max_iterations=2,
    )


def begin(options: RefineOptions, iterations: int, folder: Path = RUN) -> None:
    """Leave the traces of a run that was stopped after some iterations."""
    folder.mkdir(parents=True)
    write_settings(folder, asdict(plan(options, folder).options))
    for iteration in range(iterations + 1):
        (folder / f"run_it{iteration:03d}_optimiser.star").touch()


def test_public_names_are_loaded_when_asked_for() -> None:
    check = "import sys, torchem; assert 'torch' not in sys.modules; assert torchem.InputError.__name__ == 'InputError'"
    subprocess.run([sys.executable, "-c", check], check=True)
    assert torchem.RefineOptions is RefineOptions
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        torchem.nothing  # noqa: B018


def test_own_data(options: RefineOptions) -> None:
    completed, simulated = complete(options)
    assert not simulated
    assert (completed.dataset.name, completed.dataset.symmetry) == ("particles", "C1")
    assert completed.dataset.star == "particles.star"
    assert complete(completed) == (completed, False)


def test_demo_where_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    completed, simulated = complete(RefineOptions())
    assert simulated
    assert completed.dataset.star == "outputs/datasets/demo/particles.star"
    assert completed.reference.map == "outputs/datasets/demo/reference.mrc"
    assert completed.dataset.symmetry == "D2" and completed.dataset.stand_in == StandIn(snr=0.05)
    assert complete(RefineOptions(dataset=DatasetOptions(symmetry="C2")))[0].dataset.symmetry == "C2"


def test_stand_in_until_the_data_are_here(options: RefineOptions, caplog: pytest.LogCaptureFixture) -> None:
    stand_in = StandIn(n_particles=7)
    dataset = DatasetOptions("x", "data/x.star", particle_diameter=50.0, symmetry="D2", stand_in=stand_in)
    given = replace(options, dataset=dataset)
    completed, simulated = complete(given)
    assert simulated
    assert completed.dataset.star == "outputs/datasets/x/particles.star"
    # a reference that is given is used for the stand-in too
    assert completed.reference.map == "reference.mrc"
    assert [record.getMessage().count("SIMULATED stand-in of 7 particles") for record in caplog.records] == [1]
    caplog.clear()
    assert complete(completed) == (completed, True)
    assert not caplog.records
    Path("data").mkdir()
    Path("data/x.star").touch()
    assert complete(given) == (given, False)


def test_stand_in_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stand_in = StandIn(n_particles=4, box=24, pixel_size=10.0)
    dataset = DatasetOptions("x", "outputs/datasets/x/particles.star", symmetry="D2", stand_in=stand_in)
    make_stand_in(dataset, Progress())
    files = {path: path.stat().st_mtime_ns for path in Path("outputs/datasets/x").iterdir()}
    assert {"particles.mrcs", "particles.star", "reference.mrc"} <= {path.name for path in files}
    make_stand_in(dataset, Progress())
    assert {path: path.stat().st_mtime_ns for path in Path("outputs/datasets/x").iterdir()} == files
    with pytest.raises(InputError, match=r"(?s)dataset.name=NEW.*n_particles: 4 -> 5"):
        make_stand_in(replace(dataset, stand_in=replace(stand_in, n_particles=5)), Progress())


def test_new_run(options: RefineOptions) -> None:
    job = plan(options, RUN)
    assert job.state.iteration is None and not finished(job)


def test_run_that_did_not_get_through_an_iteration_is_begun_again(options: RefineOptions) -> None:
    RUN.mkdir(parents=True)
    write_settings(RUN, asdict(plan(options, RUN).options))
    assert not plan(replace(options, seed=5), RUN).state.used


def test_same_command_goes_on(options: RefineOptions) -> None:
    begin(options, 1)
    job = plan(options, RUN)
    assert job.state.iteration == 1 and not finished(job)


def test_finished(options: RefineOptions) -> None:
    begin(options, 1)
    (RUN / "run_optimiser.star").touch()
    assert finished(plan(options, RUN))


def test_as_many_iterations_as_asked_for(options: RefineOptions) -> None:
    begin(options, 2)
    assert finished(plan(options, RUN))


def test_changed_settings_are_listed(options: RefineOptions) -> None:
    begin(options, 1)
    changed = replace(options, seed=5, sampling=replace(options.sampling, healpix_order=3), device="cpu")
    with pytest.raises(InputError) as error:
        plan(changed, RUN)
    message = str(error.value)
    assert "run_name=NEW" in message and "resume=never" in message
    assert message.endswith("Changed:\n  sampling.healpix_order: 2 -> 3\n  seed: 1 -> 5")


def test_device_and_processes_do_not_count(options: RefineOptions) -> None:
    begin(options, 1)
    other = replace(options, device="cpu", distributed=replace(options.distributed, backend="gloo"))
    assert plan(other, RUN).state.iteration == 1


def test_data_that_came_after_the_stand_in_are_another_run(options: RefineOptions) -> None:
    dataset = DatasetOptions("x", "data/x.star", particle_diameter=50.0, symmetry="D2", stand_in=StandIn())
    given = replace(options, dataset=dataset)
    begin(given, 1)
    Path("data").mkdir()
    Path("data/x.star").touch()
    with pytest.raises(InputError, match=r"dataset\.star: outputs/datasets/x/particles\.star -> data/x\.star"):
        plan(given, RUN)


def test_never_moves_the_run_aside(options: RefineOptions) -> None:
    begin(options, 2)
    job = plan(replace(options, resume="never", seed=5), RUN)
    assert not job.state.used and not finished(job) and inspect(RUN).iteration == 2
    make_room(RUN)
    assert not RUN.exists() and inspect(RUN.with_name("run.1")).iteration == 2


def test_never_takes_an_unused_folder_as_it_is(options: RefineOptions) -> None:
    RUN.mkdir(parents=True)
    make_room(RUN)
    assert RUN.is_dir() and not RUN.with_name("run.1").exists()


def test_folder_of_an_alignment(options: RefineOptions) -> None:
    RUN.mkdir(parents=True)
    write_settings(RUN, asdict(AlignOptions()))
    for wanted in (options, replace(options, resume=str(RUN))):
        with pytest.raises(InputError, match="another command"):
            plan(wanted, RUN)


def test_resume_takes_what_the_command_line_names(options: RefineOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(options, 1)
    line = SimpleNamespace(overrides=SimpleNamespace(task=[f"resume={RUN}", "max_iterations=999", "seed=1"]))
    monkeypatch.setattr(commands, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: line))
    # the default, though the run has another value
    assert plan(RefineOptions(resume=str(RUN)), Path("x")).options.max_iterations == 999


def test_resume_of_a_folder_takes_its_settings(options: RefineOptions) -> None:
    elsewhere = Path("some/where")
    begin(replace(options, seed=5), 1, elsewhere)
    job = plan(RefineOptions(resume=str(elsewhere), device="cpu"), RUN)
    assert job.state.folder == elsewhere and job.state.iteration == 1
    assert job.options.seed == 5 and job.options.dataset.star == "particles.star" and job.options.device == "cpu"
    with pytest.raises(InputError, match="seed: 5 -> 6"):
        plan(RefineOptions(resume=str(elsewhere), seed=6), RUN)
    # with the data set named as well
    assert plan(replace(options, resume=str(elsewhere)), RUN).state.iteration == 1


def test_resume_of_a_folder_without_a_run(options: RefineOptions) -> None:
    with pytest.raises(InputError, match="resume=nowhere: no run is there"):
        plan(replace(options, resume="nowhere"), RUN)


def test_folder_with_a_run_of_another_program(options: RefineOptions) -> None:
    RUN.mkdir(parents=True)
    (RUN / "run_it003_optimiser.star").touch()
    with pytest.raises(InputError, match="run_name=NEW"):
        plan(options, RUN)


def test_time_left_shrinks_with_finer_sampling() -> None:
    def left(order: int, accuracy: float, converged: bool = False) -> str:
        iteration = SimpleNamespace(number=3, healpix_order=order, acc_rot=accuracy, seconds=10.0, converged=converged)
        return _left(iteration, RefineOptions())

    # fine steps 7.5°, 3.75°, 1.875°, … until below 0.75 × 2°
    assert left(2, 2.0) == ", about 1 min 30 s left"
    assert left(4, 2.0) == ", about 50.0 s left"
    assert left(6, 2.0) == ", about 30.0 s left"
    # the accuracy is not known yet
    assert left(2, 999.0) == ""
    assert left(6, 2.0, converged=True) == ""


def test_job_of_a_stand_in_says_so(options: RefineOptions) -> None:
    dataset = DatasetOptions("x", "data/x.star", particle_diameter=50.0, stand_in=StandIn())
    job = plan(replace(options, dataset=dataset), RUN)
    assert isinstance(job, Job) and job.simulated


def run(*arguments: str, prefix: tuple[str, ...] = ("-m",)) -> subprocess.CompletedProcess:
    """The command as a user gives it, with its own small data set; on two threads, as those share the work."""
    given = (
        "dataset.star=particles.star", "dataset.particle_diameter=50", "reference.map=reference.mrc",
        "reference.ini_high=30", "sampling.healpix_order=0", "device=cpu",
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, *prefix, "torchem.refine", *given, *arguments],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_from_particles_to_a_picture_and_again(small_set: Callable) -> None:
    small_set()
    done = run("max_iterations=1")
    assert done.returncode == 0, done.stderr
    lines = [line[9:] for line in done.stdout.splitlines()]
    assert lines[0].startswith("refining 12 particles of ") and lines[0].endswith(f" in {RUN}") and ", C1, " in lines[0]
    assert any(line.startswith("iteration 1: ") and "Pmax" in line for line in lines)
    assert lines[-1].startswith("stopped at max_iterations before convergence at ")
    assert f"map: {RUN}/run_it001_half1_class001.mrc, picture: {RUN}/run.png" in lines[-1]
    before = contents(RUN)
    assert {"config.yaml", "run.png", "run_it001_optimiser.star"} <= before.keys()

    # a finished run says its result again, and nothing else
    again = run("max_iterations=1")
    assert again.returncode == 0 and [line[9:] for line in again.stdout.splitlines()] == lines[-1:]
    assert contents(RUN) == before

    changed = run("max_iterations=1", "seed=3")
    assert changed.returncode == 1 and "seed: 1 -> 3" in changed.stderr and "run_name=NEW" in changed.stderr
    assert contents(RUN) == before

    refused = run("seed=3", "resume=never", "reference.mask=nowhere.mrc")
    assert refused.returncode == 1 and "nowhere.mrc: no such file" in refused.stderr and contents(RUN) == before
    aside = run("max_iterations=1", "seed=3", "resume=never")
    assert aside.returncode == 0, aside.stderr
    assert contents(RUN.with_name("run.1")) == before
    assert contents(RUN)["config.yaml"] != before["config.yaml"]


def test_interrupted_run_goes_on_to_the_same_files(small_set: Callable, tmp_path: Path) -> None:
    small_set()
    assert run("max_iterations=2").returncode == 0
    whole = contents(RUN)
    # as kill -9 while the second iteration is written would leave it
    for path in RUN.glob("run*"):
        if "it002" in path.name or path.suffix == ".png":
            path.unlink()
    (RUN / "run_it002_half1_class001.mrc").write_bytes(b"half a map")
    resumed = run("max_iterations=2")
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after iteration 1 in {RUN}" in resumed.stdout
    assert contents(RUN) == whole
    # as max_iterations left it
    assert run("max_iterations=1", "resume=never").returncode == 0
    longer = run("max_iterations=2")
    assert longer.returncode == 0 and f"going on after iteration 1 in {RUN}" in longer.stdout, longer.stderr
    # earlier ones say how many iterations there were to be
    assert {name for name, value in contents(RUN).items() if value != whole[name]} == {
        "run_it000_optimiser.star", "run_it001_optimiser.star",
    }  # fmt: skip


def test_two_processes_are_one_run(small_set: Callable) -> None:
    small_set()
    two = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m")
    # strictly in its scopes: the threads that talk to other processes hold nothing that ends before they let it go
    stack = ("memory.allocator=stack", "memory.strict=true")
    done = run("max_iterations=3", "precision=double", "run_name=two", *stack, prefix=two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("iteration 1: ") == 1
    assert run("max_iterations=3", "precision=double", "run_name=one").returncode == 0
    assert sorted(path.name for path in RUN.parent.iterdir()) == ["one", "two"]
    for name in ("run_it003_half1_class001.mrc", "run_it003_half2_class001.mrc"):
        one, other = (read_map(RUN.with_name(run_name) / name)[0] for run_name in ("one", "two"))
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(one)
    refused = run("symmetry=C1", prefix=two)
    assert refused.returncode != 0 and "no option symmetry; did you mean dataset.symmetry?" in refused.stderr


def test_sweep(small_set: Callable) -> None:
    small_set()
    done = run("max_iterations=1", "seed=1,2", "-m")
    assert done.returncode == 0, done.stderr
    folders = sorted(path.name for path in Path("outputs/particles/run_sweep").iterdir() if path.is_dir())
    assert all((Path("outputs/particles/run_sweep") / name / "run_it001_optimiser.star").is_file() for name in folders)
    assert len(folders) == 2 and folders[0].endswith("seed_1") and folders[1].endswith("seed_2")


def test_on_the_stack_with_a_trace(small_set: Callable) -> None:
    small_set()
    done = run("max_iterations=1", "memory.allocator=stack", "memory.strict=true", "memory.trace=true")
    assert done.returncode == 0, done.stderr
    assert "0 blocks outlived their scopes, which left 0.0 MiB behind" in done.stdout
    assert {"memory.csv", "memory.png"} <= contents(RUN).keys()
    # the same run may go on with another allocator; too little memory is said before it starts
    again = run("max_iterations=1", "memory.limit=80MB")
    assert again.returncode == 0, again.stderr
    refused = run("max_iterations=1", "memory.limit=64MiB", "precision=double", "run_name=double")
    assert refused.returncode == 1 and "GiB of memory are needed and 0.06 are there" in refused.stderr
    assert "Traceback" not in refused.stderr
