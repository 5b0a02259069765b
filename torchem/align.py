"""Alignment of images in two dimensions: to several references, or to their own average.

    python -m torchem.align images=particles.mrcs n_classes=50 last_ring=36       class averages of a stack
    python -m torchem.align dataset.star=particles.star references=refs.mrcs      with references of your own
    python -m torchem.align mode=rfa images=particles.hdf                         reference-free: one average
    torchrun --nproc_per_node=4 -m torchem.align …                                several processes; also mpirun, srun
    python -m torchem.align -m images=particles.mrcs n_classes=50 seed=1,2,3      a sweep

A run lives in outputs/DATASET/RUN_NAME; the same command again goes on where it stopped. Every option with unit and
default: torchem/mra/options.py, or ``--cfg job``.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from torchem.commands import check_option_names, leave, output_folder, resumed, start_driver, telling, to_options, wake
from torchem.errors import InputError
from torchem.mra.options import AlignOptions
from torchem.runtime import run_folder
from torchem.runtime.progress import Progress, duration
from torchem.runtime.run_folder import ALIGNED as MARK
from torchem.runtime.run_folder import RunState

if TYPE_CHECKING:
    import numpy as np

    from torchem.data.images import Images
    from torchem.mra.state import Iteration
    from torchem.runtime.distributed import World

log = logging.getLogger("torchem.align")


@dataclass(frozen=True)
class Inputs:
    """What is aligned, and to what: images not yet read, references `(k, L, L)` if there are any."""

    images: Images
    references: np.ndarray | None


@dataclass(frozen=True)
class Job:
    """What rank 0 found out before the work and tells the others."""

    options: AlignOptions
    state: RunState
    finished: bool  # settled, or as many iterations as asked for


def images_name(name: str | None, star: str | None, images: str | None) -> str:
    """Name of the images, and so of the run's parent folder."""
    return name or Path((star or images or "images").rpartition("#")[2]).stem


ConfigStore.instance().store(name="align_schema", node=AlignOptions)
OmegaConf.register_new_resolver("images_name", images_name, replace=True)

_INTERRUPTED = "the same command again goes on after the last whole iteration"


def main() -> None:
    """Run the command; whatever the user can mend is told on one screen, without a traceback."""
    with telling(_INTERRUPTED):
        check_option_names(sys.argv[1:], known_options())
        _command()
        from torchem.runtime import distributed

        distributed.stop()


def known_options() -> list[str]:
    """Names of all options, nested ones with dots."""
    return list(run_folder.flatten(asdict(AlignOptions())))


@hydra.main(version_base="1.3", config_path="pkg://torchem.configs", config_name="align")
def _command(config: DictConfig) -> None:
    with telling(_INTERRUPTED):
        options = to_options(AlignOptions, OmegaConf.to_container(config, resolve=True))
        start_driver(options.device)
        from torchem.runtime import distributed

        world = distributed.start(options.distributed.backend, options.device)
        wake(world.device)
        with Progress(speaking=world.rank == 0) as progress:
            run(options, output_folder(), world, progress)


def run(options: AlignOptions, folder: Path, world: World, progress: Progress) -> None:
    """Start, go on with, or report the alignment in `folder`.

    Raises
    ------
    InputError
        Anything that keeps it from starting, before any work.
    """

    inputs: Inputs | None = None

    def first() -> Job:
        nonlocal inputs
        job = plan(options, folder)
        if not job.finished:
            inputs = prepare(job)
        return job

    job = world.first(first)
    if not job.finished:
        inputs = inputs or load(job.options)
        _iterate(job, inputs, world, progress)
    if world.rank == 0:
        _conclude(job, inputs)


def plan(options: AlignOptions, folder: Path) -> Job:
    """Decide from the run folder what is to be done.

    Raises
    ------
    InputError
        Options out of bounds, a folder that holds another run.
    """
    if options.resume not in ("auto", "never"):
        folder = Path(options.resume)
        options = resumed(
            AlignOptions, run_folder.settings_of(folder, MARK), asdict(options), asdict(AlignOptions())
        )
    options.check()
    if (options.dataset.star is None) == (options.images is None):
        raise InputError(
            "no images: give images=STACK or dataset.star=TABLE"
            if options.images is None
            else f"images={options.images} and dataset.star={options.dataset.star}: leave out one of both"
        )
    if options.resume == "never":
        return Job(options, run_folder.RunState.new(folder), finished=False)
    state = run_folder.inspect(folder, MARK)
    before = (state.settings or {}).get("max_iterations", 0)
    # where one stopped, another may go on
    longer = ("max_iterations",) if options.max_iterations > before else ()
    run_folder.refuse_other(state, asdict(options), but=longer)
    enough = state.iteration == options.max_iterations
    return Job(options, state, state.finished and (enough or _settled(folder) is not False))


def _settled(folder: Path) -> bool | None:
    """Whether the images of a run stay where they are, by its last iteration; None where that was tidied away."""
    import torch

    from torchem.mra.output import load_checkpoint

    if not any(folder.glob("run_it*_checkpoint.pt")):
        return None
    return load_checkpoint(folder, torch.device("cpu")).converged


def prepare(job: Job) -> Inputs:
    """Do all that comes before the first iteration: every check, and the folder.

    Raises
    ------
    InputError
        The first thing found that would make the run fail or mean nothing.
    """
    import numpy as np

    options, folder = job.options, job.state.folder
    inputs = load(options)
    images, references = inputs.images, inputs.references
    options.check_against(len(images), images.box, None if references is None else references.shape)
    images.check()
    if references is not None and not (good := np.isfinite(references).all((1, 2))).all():
        raise InputError(
            f"references={options.references}: image {good.argmin() + 1} holds values that are not finite; "
            "leave it out or make it again"
        )
    n_classes = options.n_classes or (1 if references is None else len(references))
    # tables and checkpoints, and twice the averages, of each iteration
    each = 300 * len(images) + 8 * n_classes * images.box**2
    if options.resume == "never":
        run_folder.make_room(folder, MARK)
    run_folder.prepare(folder, (options.max_iterations + 1) * each)
    run_folder.write_settings(folder, asdict(options))
    return inputs


def load(options: AlignOptions) -> Inputs:
    """Open the images (nothing is read yet), and read the references if there are any."""
    from torchem.data.images import Images

    dataset = options.dataset
    images = Images.open(options.images or dataset.star or "", root=dataset.root, pixel_size=dataset.pixel_size)
    if options.references is None:
        return Inputs(images, None)
    references = Images.open(options.references)
    return Inputs(images, references.read(list(range(len(references)))))


def _iterate(job: Job, inputs: Inputs, world: World, progress: Progress) -> None:
    from torchem.mra.aligner import MultiReferenceAligner, ReferenceFreeAligner

    state, options, images = job.state, job.options, inputs.images
    aligner = MultiReferenceAligner if options.mode == "mra" else ReferenceFreeAligner
    if state.iteration is None:
        log.info("aligning %d images of %d px in %s", len(images), images.box, state.folder)
    else:
        log.info("going on after iteration %d in %s", state.iteration, state.folder)
    make = aligner if state.iteration is None else aligner.resume
    for iteration in make(
        options, images, inputs.references, folder=state.folder, world=world, progress=progress.task("images")
    ):
        log.info("%s", _line(iteration, options, images.pixel_size))


def _line(iteration: Iteration, options: AlignOptions, pixel_size: float | None) -> str:
    import numpy as np

    resolution = iteration.resolution(pixel_size)
    unit = "Å" if pixel_size else "px"
    parts = [f"iteration {iteration.number}: peak {iteration.peak:.4f}"]
    if np.isfinite(resolution).any():
        parts.append(f"FRC 0.5 at {np.median(resolution[np.isfinite(resolution)]):.3g} {unit}")
    if iteration.number > 1:
        parts.append(f"{100 * iteration.changed:.1f} % changed, others moved {iteration.pixel_error:.2f} px")
    if options.mode == "mra":
        parts.append(f"classes of {int(iteration.members.min())} to {int(iteration.members.max())}")
    parts.append(duration(iteration.seconds))
    left = options.max_iterations - iteration.number
    if left and not iteration.converged:
        parts.append(f"at most {duration(left * iteration.seconds)} left")
    return ", ".join(parts)


def _conclude(job: Job, inputs: Inputs | None) -> None:
    """Say what was reached and where it is, and draw it."""
    folder = job.state.folder
    page, iteration = folder / "run_report.html", run_folder.inspect(folder, MARK).iteration
    if not run_folder.is_newer(page, folder / f"run_{MARK}"):
        _report(job.options, folder, (inputs or load(job.options)).images)
    how = {True: "settled", False: "stopped by max_iterations, not settled (a larger one goes on),", None: "done"}
    reached = how[_settled(folder)] + ("" if iteration is None else f" after iteration {iteration}")
    log.info(
        "%s; class averages: %s, parameters: %s and run_params.csv, report: %s", reached, folder / "run_classes.mrcs",
        folder / f"run_{MARK}", page,
    )  # fmt: skip


def _report(options: AlignOptions, folder: Path, images: Images) -> None:
    """Draw run.png and write run_report.html from the files of all iterations."""
    import pandas as pd

    from torchem import explore
    from torchem.data.alignment import read_parameters
    from torchem.data.mrc import read_map

    averages, _ = read_map(folder / "run_classes.mrcs")
    history, before = [], None
    for number in range(1, (run_folder.inspect(folder, MARK).iteration or 0) + 1):
        path = folder / f"run_it{number:03d}_{MARK}"
        if path.is_file():
            table = read_parameters(path, images.pixel_size or 1.0)
            history.append(explore.class_counts(number, table, before, len(averages)))
            before = table
    parameters = read_parameters(folder / "run_params.csv")
    members = parameters["class_id"].value_counts().reindex(range(len(averages)), fill_value=0).to_numpy()
    title = f"{images.source}: " + ("reference-free" if options.mode == "rfa" else "multi-reference") + " alignment"
    explore.gallery(averages, members).savefig(folder / "run.png", dpi=150)
    radius = float(options.rings(images.box).last)
    explore.write_report(
        folder / "run_report.html", parameters, averages, pd.concat(history), images, title=title, radius=radius,
        seed=options.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
    leave()
