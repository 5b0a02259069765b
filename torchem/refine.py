"""Gold-standard 3D refinement, from a particle stack to a map.

    python -m torchem.refine                                  the built-in demo, simulated on first use
    python -m torchem.refine +dataset=betagal                 a described data set (configs/dataset/)
    python -m torchem.refine dataset.star=particles.star dataset.particle_diameter=200 dataset.symmetry=D2 \\
        reference.map=reference.mrc                           your own
    torchrun --nproc_per_node=4 -m torchem.refine …           several processes; also mpirun, srun
    python -m torchem.refine -m seed=1,2,3                    a sweep

A run lives in outputs/DATASET/RUN_NAME; the same command again goes on where it stopped. Every option with
unit and default: torchem/em/options.py, or ``--cfg job``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from torchem.commands import check_option_names, leave, output_folder, resumed, start_driver, telling, to_options, wake
from torchem.em.options import DatasetOptions, RefineOptions, StandIn
from torchem.errors import InputError
from torchem.runtime import beside, run_folder
from torchem.runtime.launch import launched
from torchem.runtime.progress import Progress, duration
from torchem.runtime.run_folder import RunState

if TYPE_CHECKING:
    import numpy as np
    import torch

    from torchem.data.particles import Particles
    from torchem.em.refiner import Iteration
    from torchem.runtime.distributed import World

log = logging.getLogger("torchem.refine")

# what is left for the CPU beside a GPU is short: more threads would spin while they wait for the next of it
_THREADS_BESIDE_A_GPU = 2
# simulated data sets, relative to the folder where the command is given
STAND_INS = Path("outputs/datasets")


@dataclass(frozen=True)
class Job:
    """What rank 0 found out before the work and tells the others."""

    options: RefineOptions  # complete: dataset.star, reference.map and so on are what is used
    state: RunState
    simulated: bool


@dataclass(frozen=True)
class Inputs:
    """What is refined: tables, and maps at the particles' box and pixel size."""

    particles: Particles
    reference: np.ndarray
    mask: np.ndarray | None


def dataset_name(name: str | None, star: str | None) -> str:
    """Name of the data set, and so of the run's parent folder."""
    return name or (Path(star).stem if star else "demo")


ConfigStore.instance().store(name="refine_schema", node=RefineOptions)
OmegaConf.register_new_resolver("dataset_name", dataset_name, replace=True)


def main() -> None:
    """Run the command; whatever the user can mend is told on one screen, without a traceback."""
    with telling(_INTERRUPTED):
        check_option_names(sys.argv[1:], known_options(), groups=("dataset",))
        _check_stand_in(sys.argv[1:])
        _command()
        from torchem.runtime import distributed

        distributed.stop()


def _check_stand_in(arguments: Sequence[str]) -> None:
    """Refuse settings of a stand-in where no described data set has one; Hydra would fail an assertion."""
    described = any(argument.lstrip("+").startswith("dataset=") for argument in arguments)
    for argument in arguments:
        if argument.lstrip("+").startswith("dataset.stand_in.") and not described:
            raise InputError(f"{argument}: name the described data set that it changes, as in +dataset=demo")


_INTERRUPTED = "the same command again goes on after the last whole iteration"


@hydra.main(version_base="1.3", config_path="pkg://torchem.configs", config_name="refine")
def _command(config: DictConfig) -> None:
    with telling(_INTERRUPTED):
        options = to_options(RefineOptions, OmegaConf.to_container(config, resolve=True))
        wanted = options.memory
        wanted.check()
        # PyTorch takes its time; a thread that imports beside it would only slow it down
        if launched().rank == 0:
            beside.start("torchem.report.run_figure", "matplotlib.figure", "matplotlib.backends.backend_agg")
        start_driver(options.device)
        import torch

        from torchem.runtime import distributed, memory

        distributed.be_deterministic(options.deterministic)

        def install(device: torch.device) -> None:
            memory.install(
                device, wanted.allocator, limit=wanted.limit_bytes(), strict=wanted.strict, trace=wanted.trace,
                processes=launched().size,
            )  # fmt: skip

        world = distributed.start(options.distributed.backend, options.device, install)
        wake(world.device)
        if world.device.type == "cuda":
            torch.set_num_threads(_THREADS_BESIDE_A_GPU)
        with Progress(speaking=world.rank == 0) as progress:
            refine(options, output_folder(), world, progress)


def known_options() -> list[str]:
    """Names of all options, nested ones with dots."""
    return list(run_folder.flatten(asdict(RefineOptions(dataset=DatasetOptions(stand_in=StandIn())))))


def refine(options: RefineOptions, folder: Path, world: World, progress: Progress) -> None:
    """Start, go on with, or report the run in `folder`.

    Raises
    ------
    InputError
        Anything that keeps the run from starting, before any work.
    """
    inputs: Inputs | None = None

    def first() -> Job:
        nonlocal inputs
        job = plan(options, folder)
        if not finished(job):
            inputs = prepare(job, progress)
        return job

    job = world.first(first)
    if not finished(job):
        _iterate(job, inputs or load(job.options, checked=False), world, progress)
    if world.rank == 0:
        _conclude(job)


def plan(options: RefineOptions, folder: Path) -> Job:
    """Complete the options, and decide from the run folder what is to be done.

    Raises
    ------
    InputError
        Options out of bounds, data that are not here, a folder that holds another run.
    """
    if options.resume not in ("auto", "never"):
        folder = Path(options.resume)
        options = _with_settings_of(folder, options)
    options, simulated = complete(options)
    options.check()
    if options.resume == "never":
        return Job(options, run_folder.RunState.new(folder), simulated)
    state = run_folder.inspect(folder)
    # where one stopped, another may go on
    run_folder.refuse_other(state, asdict(options), but=("max_iterations",))
    return Job(options, state, simulated)


def _with_settings_of(folder: Path, options: RefineOptions) -> RefineOptions:
    """Take the settings of the run in `folder` where none other than the default is given."""
    settings = run_folder.settings_of(folder)
    if options.dataset != DatasetOptions():
        options, _ = complete(options)
    return resumed(RefineOptions, settings, asdict(options), asdict(RefineOptions()))


def finished(job: Job) -> bool:
    """Whether nothing is left to do: converged, or as many iterations as asked for."""
    return job.state.finished or (job.state.iteration or 0) >= job.options.max_iterations


def complete(options: RefineOptions) -> tuple[RefineOptions, bool]:
    """Fill in the data set: the demo if none is named, the stand-in if its STAR file is not here, C1.

    Returns
    -------
    The complete options, and whether the particles are simulated.
    """
    dataset, reference = options.dataset, options.reference
    if dataset.star is None and dataset.stand_in is None:
        if dataset.name not in (None, "demo"):
            raise InputError(
                f"dataset.star is not given for dataset.name={dataset.name}; give dataset.star=FILE.star "
                "(or FILE.cs), or a described data set by +dataset=NAME"
            )
        demo = OmegaConf.load(str(resources.files("torchem.configs") / "dataset" / "demo.yaml"))
        own = {key: value for key, value in asdict(dataset).items() if value is not None}
        described = to_options(RefineOptions, OmegaConf.merge(demo, {"dataset": own}))
        dataset = described.dataset
    name = dataset_name(dataset.name, dataset.star)
    dataset = replace(dataset, name=name, symmetry=dataset.symmetry or "C1")
    stand_in = STAND_INS / name / "particles.star"
    here = dataset.star is not None and Path(dataset.star).is_file()
    simulated = dataset.stand_in is not None and (not here or Path(str(dataset.star)) == stand_in)
    if simulated:
        assert dataset.stand_in is not None
        if dataset.star not in (None, str(stand_in)):
            log.warning(
                "%s is not here: using a SIMULATED stand-in of %d particles of %d px, %s. Real data: %s",
                dataset.star, dataset.stand_in.n_particles, dataset.stand_in.box, stand_in, dataset.source,
            )  # fmt: skip
        dataset = replace(dataset, star=str(stand_in))
        if reference.map is None:
            reference = replace(reference, map=str(stand_in.with_name("reference.mrc")))
    elif not here:
        raise InputError(
            f"dataset.star={dataset.star}: no such file; "
            + (f"get the data from {dataset.source}" if dataset.source else "check the path")
        )
    if reference.map is None:
        raise InputError(
            "reference.map is not given; give an initial map (.mrc) or an atomic model (.pdb, .cif)"
            + (f". {dataset.source}" if dataset.source else "")
        )
    return replace(options, dataset=dataset, reference=reference), simulated


def make_stand_in(dataset: DatasetOptions, progress: Progress) -> None:
    """Simulate the data set that `dataset.star` names, once; a half-made one is made again.

    Raises
    ------
    InputError
        Another data set is there, or no room.
    """
    from torchem.imaging.simulation import make_dataset

    assert dataset.star is not None and dataset.stand_in is not None
    folder, wanted = Path(dataset.star).parent, asdict(dataset.stand_in) | {"symmetry": dataset.symmetry}
    there = run_folder.inspect(folder)
    if there.settings is not None:
        changed = run_folder.changes(there.settings, wanted)
        if changed:
            raise InputError(
                f"{folder}: holds simulated particles with other settings; give these another dataset.name=NEW. "
                "Changed:\n  " + "\n  ".join(changed)
            )
        return
    run_folder.prepare(folder, 5 * dataset.stand_in.n_particles * dataset.stand_in.box**2)
    log.info("simulating %d particles of %d px in %s", dataset.stand_in.n_particles, dataset.stand_in.box, folder)
    make_dataset(folder, **wanted, progress=progress.task("simulating particles"))
    # last: its presence says that the data set is whole
    run_folder.write_settings(folder, wanted)


def prepare(job: Job, progress: Progress) -> Inputs:
    """Do all that comes before the first iteration: folder, stand-in, reading, every check.

    Raises
    ------
    InputError
        The first thing found that would make the run fail or mean nothing.
    """
    folder = job.state.folder
    run_folder.prepare(folder, 0)
    if job.simulated:
        make_stand_in(job.options.dataset, progress)
    inputs = load(job.options, checked=True)
    if job.options.resume == "never":
        run_folder.make_room(folder)
    run_folder.prepare(folder, _bytes_of_run(len(inputs.particles), len(inputs.reference)))
    run_folder.write_settings(folder, asdict(job.options))
    return inputs


def load(options: RefineOptions, checked: bool) -> Inputs:
    """Read the particles (tables, not yet images), and the reference and mask at their box and pixel size.

    Parameters
    ----------
    checked
        Also look for everything in them that would make the run fail or mean nothing.
    """
    from torchem.data.particles import Particles
    from torchem.em.reference import read_mask, read_reference

    dataset = options.dataset
    assert dataset.star is not None and options.reference.map is not None
    particles = Particles.read(dataset.star, root=dataset.root, pixel_size=dataset.pixel_size)
    if checked:
        options.check_against(particles)
        particles.check(ctf=options.ctf, particle_diameter=dataset.particle_diameter)
    box, pixel_size = particles.optics[0].box, particles.optics[0].pixel_size
    return Inputs(
        particles,
        read_reference(options.reference.map, box, pixel_size),
        None if options.reference.mask is None else read_mask(options.reference.mask, box, pixel_size),
    )


def _bytes_of_run(n_particles: int, box: int) -> int:
    """About what a run of 20 iterations writes: maps and checkpoint (as much again), and one row a particle."""
    return 20 * (2 * 2 * 4 * box**3 + 700 * n_particles)


def _iterate(job: Job, inputs: Inputs, world: World, progress: Progress) -> None:
    from torchem.em.refiner import Refiner
    from torchem.runtime import memory

    state = job.state
    if state.iteration is None:
        dataset, optics = job.options.dataset, inputs.particles.optics[0]
        log.info(
            "refining %d particles of %d px (%g Å/px), %s, diameter %g Å, in %s", len(inputs.particles), optics.box,
            optics.pixel_size, dataset.symmetry, dataset.particle_diameter, state.folder,
        )  # fmt: skip
    else:
        log.info("going on after iteration %d in %s", state.iteration, state.folder)
    make = Refiner if state.iteration is None else Refiner.resume
    refiner = make(
        job.options, inputs.particles, inputs.reference, inputs.mask,
        folder=state.folder, world=world, simulated=job.simulated, progress=progress.task("particles"),
    )  # fmt: skip
    arena, told, traced = memory.installed(), 0, job.options.memory.trace
    try:
        for iteration in refiner:
            log.info("%s", _line(iteration, job))
            if arena is not None and (peak := arena.statistics().peak_live) > told:
                log.log(logging.INFO if traced else logging.DEBUG, "memory: %s", arena.statistics())
                told = peak
    finally:
        if arena is not None and traced and world.rank == 0:
            from torchem.report.memory_figure import memory_figure

            memory_figure(state.folder, arena.events())
    if arena is not None:
        log.info("memory: %s%s", arena.statistics(), memory.in_use(world.device))


def _line(iteration: Iteration, job: Job) -> str:
    order = iteration.healpix_order
    return (
        f"iteration {iteration.number}: {iteration.resolution_angst:.2f} Å, Pmax {iteration.pmax:.3f}, "
        f"{60 / 2**order:.3g}° {'local' if iteration.local else 'global'}, {iteration.current_size} px, "
        f"{duration(iteration.seconds)}" + _left(iteration, job.options) + (" (simulated)" if job.simulated else "")
    )


def _left(iteration: Iteration, options: RefineOptions) -> str:
    """Time left, from what auto-refinement needs: two iterations a sampling until it is fine enough, and the last."""
    # before the accuracy is estimated it would be a guess, and a first iteration by cross-correlation is a short one
    if iteration.converged or not 0 < iteration.acc_rot <= 30:
        return ""
    order, fine = iteration.healpix_order, 60 / 2 ** (iteration.healpix_order + options.sampling.oversampling)
    finer = 0
    while fine > 0.75 * iteration.acc_rot and order + finer < 8:
        fine, finer = fine / 2, finer + 1
    # the last is done at the full image size
    iterations = min(2 * finer + 3, options.max_iterations - iteration.number)
    return f", about {duration(iterations * iteration.seconds)} left" if iterations > 0 else ""


def _conclude(job: Job) -> None:
    """Say what was reached and where it is, and draw it."""
    state = run_folder.inspect(job.state.folder)
    reached = _reached(state)
    picture = state.folder / "run.png"
    if not run_folder.is_newer(picture, state.folder / f"{state.stem}_{run_folder.REFINED}"):
        from torchem.report.run_figure import run_figure

        dataset = job.options.dataset
        title = f"{dataset.name}, {dataset.symmetry}: {reached}"
        beside.call(run_figure, state.folder.absolute(), title, job.simulated)
    map_ = state.folder / f"{state.stem}{'' if state.finished else '_half1'}_class001.mrc"
    log.info("%s%s; map: %s, picture: %s", "SIMULATED particles: " if job.simulated else "", reached, map_, picture)


def _reached(state: RunState) -> str:
    """What a run has come to, from its files."""
    from torchem.data.star import read_star

    half = "" if state.finished else "_half1"
    shells = read_star(state.folder / f"{state.stem}{half}_model.star", last="model_class_1")["model_class_1"]
    below = (shells["rlnGoldStandardFsc"].to_numpy(float) < 0.143).nonzero()[0]
    last = max(1, below[0] - 1 if len(below) else len(shells) - 1)
    angst = shells["rlnAngstromResolution"].to_numpy(float)[last]
    general = read_star(state.folder / f"{state.stem}_{run_folder.REFINED}")["optimiser_general"]
    mask = "mask corrected for" if general["rlnDoSolventFscCorrection"] else "no mask"
    how = "converged" if state.finished else "stopped at max_iterations before convergence"
    limit = "" if len(below) else ", the limit of these pixels"
    iteration = general["rlnCurrentIteration"]
    return f"{how} at {angst:.2f} Å{limit} (gold-standard FSC 0.143, {mask}) after iteration {iteration}"


if __name__ == "__main__":
    main()
    leave()
