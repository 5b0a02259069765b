"""What a run leaves behind: RELION's files for each iteration, and a checkpoint for what they cannot hold exactly.

Files are written under temporary names; the optimiser file comes last and marks the iteration as whole. They are
written on a thread, text in a process of its own, from a copy of the state, while the next iteration is computed.
"""

import dataclasses
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchem.data.bild import write_angular_distribution
from torchem.data.checkpoint import read_checkpoint, write_checkpoint
from torchem.data.mrc import write_map
from torchem.data.particles import Particles
from torchem.data.relion import (
    ModelClass,
    ModelFile,
    OptimiserFile,
    SamplingFile,
    write_model,
    write_optimiser,
    write_particles,
    write_sampling,
)
from torchem.em.maximization import Joined
from torchem.em.model import Model, Poses, State
from torchem.em.options import RefineOptions
from torchem.em.sampling import Grid, Sampling
from torchem.runtime import beside

HOST = torch.device("cpu")


class Output:
    """The run folder's writer.

    Parameters
    ----------
    particles
        the data set, whose own columns stay in the output.
    options
        of the run.
    simulated
        mark every file as made from simulated particles.
    """

    def __init__(self, folder: Path, particles: Particles, options: RefineOptions, simulated: bool) -> None:
        self.folder, self.particles, self.options = folder, particles, options
        self.comment = "torchem" + (": simulated particles" if simulated else "")
        optics = particles.optics[0]
        self.box, self.pixel_size = optics.box, optics.pixel_size
        # as they are sent to the other process: text takes long to pickle
        self._tables = pickle.dumps({"optics": particles.optics_table, "particles": particles.located_table()})
        # a single thread keeps the order, and Python ends no process before it is through
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torchem-output")
        self._writing: Future[None] | None = None

    def write(self, state: State, grid: Grid, joined: Joined | None) -> None:
        """Begin to write an iteration, or the result if there is a joined map; all of it is copied first.

        Raises
        ------
        InputError
            The files before these could not be written.
        """
        self.finish()
        state, directions = _copy(state), torch.stack((grid.rot, grid.tilt), 1).cpu()
        if joined is None:
            self._writing = self._thread.submit(self._iteration, state, directions)
        else:
            model = Model(**_on_device(vars(joined.model), HOST))
            unfiltered = _on_device(joined.unfiltered, HOST)
            self._writing = self._thread.submit(self._result, state, directions, model, unfiltered)

    def finish(self) -> None:
        """Wait until all is written.

        Raises
        ------
        InputError
            It could not be.
        """
        if self._writing is not None:
            self._writing.result()

    def _iteration(self, state: State, directions: Tensor) -> None:
        """Write run_it012_* and its checkpoint."""
        stem = f"run_it{state.iteration:03d}"
        for number, half in enumerate(state.halves, 1):
            self._map(f"{stem}_half{number}_class001.mrc", half.references[0])
            self._model(f"{stem}_half{number}", half, state, number - 1)
        self._data(stem, state)
        self._sampling(stem, state, directions)
        self._angular_distribution(f"{stem}_class001_angdist.bild", state)
        save_checkpoint(self.folder / f"{stem}_checkpoint.pt", state)
        self._optimiser(stem, state, [f"{stem}_half{n + 1}" for n in range(len(state.halves))])

    def _result(self, state: State, directions: Tensor, joined: Model, unfiltered: list[Tensor]) -> None:
        """Write the joined map, the unfiltered halves, run_{data,model,sampling,optimiser}.star."""
        for number, map_ in enumerate(unfiltered, 1):
            self._map(f"run_half{number}_class001_unfil.mrc", map_)
        self._map("run_class001.mrc", joined.references[0])
        self._model("run", joined, state, None)
        self._data("run", state)
        self._sampling("run", state, directions)
        self._angular_distribution("run_class001_angdist.bild", state)
        self._optimiser("run", state, ["run"])

    def _text(self, write: Callable[..., None], name: str, *content: Any) -> None:
        """Write text in the other process: Python makes words of thousands of numbers, one by one."""
        beside.call(write, (self.folder / name).absolute(), *content, self.comment)

    def _map(self, name: str, map_: Tensor) -> None:
        write_map(self.folder / name, map_.numpy(), self.pixel_size, label=self.comment)

    def _model(self, stem: str, model: Model, state: State, half: int | None) -> None:
        shells = self.box // 2 + 1
        mine = slice(None) if half is None else state.subset.numpy() == half
        counts = np.bincount(self.particles.group[mine], minlength=len(self.particles.group_names))
        classes = []
        for k in range(model.n_classes):
            coverage = model.fourier_coverage[k].numpy()
            reached = np.arange(shells) <= self.box * self.pixel_size / state.current_resolution
            volume = np.arange(shells) ** 2 * reached
            classes.append(ModelClass(
                reference_image=str(self.folder / f"{stem}_class{k + 1:03d}.mrc"),
                distribution=float(model.pdf_class[k]),
                acc_rot=state.accuracy_angles, acc_trans=state.accuracy_offsets,
                resolution=state.current_resolution if np.isfinite(state.current_resolution) else 0.0,
                overall_completeness=float((coverage * volume).sum() / max(volume.sum(), 1)),
                data_vs_prior=model.data_vs_prior[k].numpy(),
                fsc=model.fsc[k].numpy(),
                completeness=coverage,
                sigma2=model.sigma2[k].numpy(),
                tau2=model.tau2[k].numpy(),
                orientability=state.orientability.numpy(),
                pdf_direction=model.pdf_direction[k].numpy() if model.ndim == 3 else None,
            ))  # fmt: skip
        self._text(write_model, f"{stem}_model.star", ModelFile(
            reference_dimension=model.ndim, box=self.box, current_resolution=state.current_resolution,
            current_size=state.current_size, pixel_size=self.pixel_size, classes=classes,
            group_names=self.particles.group_names,
            sigma2_noise=[s.numpy() for s in model.sigma2_noise],
            tau2_fudge=self.options.tau2_fudge, norm_correction_average=model.norm_average,
            sigma_offset_angst=model.sigma_offset, log_likelihood=model.log_likelihood,
            average_pmax=model.average_pmax, group_counts=counts, group_scales=model.scale.numpy(),
            orientational_prior_mode=0 if state.local_sigma is None else 3,
            sigma_prior_rot=state.local_sigma or 0.0, sigma_prior_tilt=state.local_sigma or 0.0,
            sigma_prior_psi=state.local_sigma or 0.0,
        ))  # fmt: skip

    def _data(self, stem: str, state: State) -> None:
        poses = state.poses
        columns = {
            "rlnGroupNumber": self.particles.group + 1,
            "rlnAngleRot": poses.euler[:, 0].numpy(),
            "rlnAngleTilt": poses.euler[:, 1].numpy(),
            "rlnAnglePsi": poses.euler[:, 2].numpy(),
            "rlnOriginXAngst": poses.offset_angst[:, 0].numpy(),
            "rlnOriginYAngst": poses.offset_angst[:, 1].numpy(),
            "rlnClassNumber": poses.class_number.numpy() + 1,
            "rlnNormCorrection": poses.norm_correction.numpy(),
            "rlnRandomSubset": state.subset.numpy() + 1,
            "rlnLogLikeliContribution": poses.log_likelihood.numpy(),
            "rlnMaxValueProbDistribution": poses.pmax.numpy(),
            "rlnNrOfSignificantSamples": poses.significant.numpy(),
        }
        self._text(write_particles, f"{stem}_data.star", self._tables, columns)

    def _sampling(self, stem: str, state: State, directions: Tensor) -> None:
        sampling, options = state.sampling, self.options.sampling
        self._text(write_sampling, f"{stem}_sampling.star", SamplingFile(
            healpix_order=sampling.healpix_order, symmetry=sampling.symmetry, psi_step=sampling.psi_step,
            offset_range=sampling.offset_range, offset_step=sampling.offset_step,
            perturb_instance=sampling.perturbation, perturb_factor=sampling.perturb,
            healpix_order_original=options.healpix_order,
            psi_step_original=360.0 / (6 * 2**options.healpix_order),
            offset_range_original=options.offset_range * self.pixel_size,
            offset_step_original=options.offset_step * self.pixel_size,
            directions=directions.numpy(),
        ))  # fmt: skip

    def _optimiser(self, stem: str, state: State, models: list[str]) -> None:
        options = self.options
        name = {n: str(self.folder / f"{n}.star") for n in
                (f"{stem}_data", f"{stem}_sampling", *(f"{m}_model" for m in models))}  # fmt: skip
        self._text(write_optimiser, f"{stem}_optimiser.star", OptimiserFile(
            output_root=str(self.folder / "run"),
            model_star=name[f"{models[0]}_model"],
            model_star2=name[f"{models[1]}_model"] if len(models) > 1 else None,
            data_star=name[f"{stem}_data"], sampling_star=name[f"{stem}_sampling"],
            iteration=state.iteration, number_of_iterations=options.max_iterations,
            split_random_halves=len(state.halves) == 2,
            low_resol_join_halves=options.sampling.low_resol_join_halves,
            oversampling=options.sampling.oversampling, adaptive_fraction=options.sampling.adaptive_fraction,
            random_seed=options.seed, particle_diameter=options.dataset.particle_diameter or 0.0,
            zero_mask=options.zero_mask, solvent_correct_fsc=options.solvent_correct_fsc,
            solvent_mask=options.reference.mask or "None", incr_size=state.size_increment, auto_refine=True,
            local_healpix_order=options.sampling.local_healpix_order,
            nr_wo_gain=state.iterations_without_gain, best_resolution=state.best_resolution,
            nr_wo_change=state.iterations_without_change,
            acc_rot=state.accuracy_angles, acc_trans=state.accuracy_offsets,
            changes_rot=state.change_angles, changes_trans=state.change_offsets, changes_classes=0.0,
            smallest_changes_rot=state.smallest_change_angles, smallest_changes_trans=state.smallest_change_offsets,
            smallest_changes_classes=0, has_converged=state.converged, has_high_fsc=state.has_high_fsc,
            norm=options.norm, scale=options.scale, ctf=options.ctf,
            ctf_phase_flipped=any(o.phase_flipped for o in self.particles.optics),
        ))  # fmt: skip

    def _angular_distribution(self, name: str, state: State) -> None:
        """How many particles look along each direction, for ChimeraX."""
        self._text(write_angular_distribution, name, state.poses.euler[:, :2].numpy(), self.box * self.pixel_size / 2)


def save_checkpoint(path: Path, state: State) -> None:
    """Write all of a state on the host, exactly; the same state gives the same bytes."""
    plain = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    plain["halves"] = [dict(vars(half)) for half in state.halves]
    plain["sampling"] = dataclasses.asdict(state.sampling)
    plain["poses"] = dict(vars(state.poses))
    write_checkpoint(path, plain)


def load_checkpoint(path: Path, device: torch.device) -> State:
    """Read :func:`save_checkpoint`'s file, the models onto a device."""
    plain = read_checkpoint(path)
    plain["halves"] = [Model(**_on_device(half, device)) for half in plain["halves"]]
    plain["sampling"] = Sampling(**plain["sampling"])
    plain["poses"] = Poses(**plain["poses"])
    return State(**plain)


def _copy(state: State) -> State:
    """All of a state on the host, where nothing changes it."""
    generator = torch.Generator()
    generator.set_state(state.generator.get_state())
    return dataclasses.replace(
        state, halves=[Model(**_on_device(vars(half), HOST)) for half in state.halves],
        sampling=dataclasses.replace(state.sampling), poses=state.poses.clone(), generator=generator,
    )  # fmt: skip


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: _on_device(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_on_device(v, device) for v in value]
    # a copy always, also where it is already there: a view would bring its whole storage along
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
