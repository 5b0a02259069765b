"""Gold-standard 3D auto-refinement by expectation maximization, read top to bottom.

Each half of the particles is refined against its own reference (Scheres 2012; Zhang et al. 2018): the schedule picks
image sizes and sampling, the E-step weighs every pose of every particle, the M-step makes the new maps, and the Fourier
shell correlation of the halves says how far to trust them. It ends when neither resolution nor poses get better on
a grid that is finer than the data can tell apart; a last iteration joins the halves into one map.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchem.data.particles import Particles
from torchem.em import schedule
from torchem.em.expectation import LOCAL_ORIENTATIONS, Expectation, ExpectationSettings, Shared
from torchem.em.images import ImageGeometry, ParticleImages, modulations, prepare_images
from torchem.em.maximization import Joined, update_halves, update_parameters
from torchem.em.options import RefineOptions
from torchem.em.output import Output, load_checkpoint
from torchem.em.plan import make_plan
from torchem.em.references import fourier_volumes
from torchem.em.sampling import Grid, Sampling, disc
from torchem.em.start import initial_state, low_pass
from torchem.em.sums import Sums
from torchem.errors import InputError
from torchem.imaging.fourier import FourierPixels, round_half_away
from torchem.imaging.masks import soft_sphere
from torchem.imaging.resolution import raised_cosine_lowpass, resolution_at
from torchem.imaging.symmetry import euler_angles, operators
from torchem.ops.squared_difference import CPU_LADDER, LADDER
from torchem.runtime import memory, run_folder
from torchem.runtime.cpu import allow_fast_products
from torchem.runtime.distributed import World, be_deterministic, device_named

log = logging.getLogger(__name__)

PADDING = 2
MASK_EDGE_PX = 5.0
FSC_THRESHOLD = 0.143
# numbers noted for a particle: matrix, offset, five figures of BatchResult, and 1 for done
FOUND = 9 + 2 + 5 + 1


@dataclass(frozen=True)
class Iteration:
    """What one iteration did and reached; angles in degrees, lengths in Å, seconds for all of it but writing."""

    number: int
    resolution_angst: float
    pmax: float
    healpix_order: int
    local: bool
    current_size: int
    coarse_size: int
    acc_rot: float
    acc_trans: float
    change_rot: float
    change_trans: float
    seconds: float
    converged: bool
    fsc: Tensor  # (L//2 + 1,)
    maps: list[Tensor]  # both halves; the joined map in the last iteration


class Refiner:
    """A refinement; iterating over it runs it.

    Parameters
    ----------
    options
        see :class:`torchem.em.options.RefineOptions`.
    particles
        the data set; its subsets, poses, groups and norm corrections are respected where present.
    reference
        `(L, L, L)` float32 (z, y, x), box and pixel size of the particles' first optics group.
    mask
        `(L, L, L)` in [0, 1]; None: a soft sphere of the particle diameter.
    folder
        where every iteration is written; None: nowhere.
    world
        this process among all that share the work.
    simulated
        mark all output so.
    progress
        called with (done, total) particles of this process as an iteration goes on.
    """

    joined: Joined | None  # of both halves, after the last iteration

    def __init__(
        self, options: RefineOptions, particles: Particles, reference: np.ndarray, mask: np.ndarray | None = None, *,
        folder: Path | str | None = None, world: World | None = None, simulated: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        self._set_up(options, particles, mask, folder, world, simulated, progress)
        with memory.scope("chunk"):
            self.state = memory.keep(initial_state(
                options, particles, self.images, torch.tensor(reference, dtype=self.dtype, device=self.device),
                self.diameter,
            ), "run")  # fmt: skip
        self._make_grid()
        self._write()

    @classmethod
    def resume(
        cls, options: RefineOptions, particles: Particles, reference: np.ndarray, mask: np.ndarray | None = None, *,
        folder: Path | str, world: World | None = None, simulated: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Refiner":  # fmt: skip
        """Go on after the last iteration that ``folder`` holds whole; ``reference`` is not looked at."""
        checkpoint = run_folder.last_checkpoint(Path(folder))
        refiner = cls.__new__(cls)
        refiner._set_up(options, particles, mask, folder, world, simulated, progress)
        refiner.state = load_checkpoint(checkpoint, refiner.device)
        references = refiner.state.halves[0].references
        if references.dtype != refiner.dtype:
            raise InputError(f"{folder}: was not begun with precision={options.precision}; go on with the other one")
        before, now = (len(refiner.state.subset), references.shape[-1]), (len(particles), refiner.box)
        run_folder.refuse_other_input(Path(folder), "particles", before, str(particles.source), now)
        refiner._make_grid()
        return refiner

    def __iter__(self) -> Iterator[Iteration]:
        while not self.state.converged and self.state.iteration < self.options.max_iterations:
            yield self.step()
        if self.output is not None:
            self.output.finish()

    def step(self) -> Iteration:
        """One iteration: schedule, E-step of both halves, M-step, files."""
        started = time.perf_counter()
        with memory.scope("iteration"):
            self._iterate()
            state = memory.keep(self.state, "run")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self._write()
        first = state.halves[0]
        _, resolution = resolution_at(first.fsc[0].cpu(), FSC_THRESHOLD, self.box, self.pixel_size)
        return Iteration(
            number=state.iteration,
            resolution_angst=resolution if state.converged else state.current_resolution,
            pmax=first.average_pmax,
            healpix_order=state.sampling.healpix_order,
            local=state.local_sigma is not None,
            current_size=state.current_size,
            coarse_size=state.coarse_size,
            acc_rot=state.accuracy_angles,
            acc_trans=state.accuracy_offsets,
            change_rot=state.change_angles,
            change_trans=state.change_offsets,
            seconds=seconds,
            converged=state.converged,
            fsc=first.fsc[0],
            maps=[model.references[0] for model in ([self.joined.model] if self.joined else state.halves)],
        )

    def _iterate(self) -> None:
        """All of an iteration but its files."""
        state, options = self.state, self.options
        state.iteration += 1
        cross_correlation = state.iteration == 1 and not options.reference.absolute_greyscale

        # what this iteration does
        state.converged = schedule.has_converged(state)
        known = options.reference.ini_high if state.iteration == 1 else state.current_resolution
        schedule.image_sizes(state, self.box, self.pixel_size, self.diameter, known)
        state.sampling.perturb_again(state.generator)
        geometries = [
            ImageGeometry.of(optics, state.current_size, self.box, self.pixel_size, self.dtype, self.device)
            for optics in self.optics
        ]
        volumes: list[Tensor] = []
        if state.iteration > 1:
            # the first half's serve its E-step, too
            volumes.append(fourier_volumes(state.halves[0].references, state.current_size // 2, PADDING))
            with memory.scope("chunk"):
                self._estimate_accuracy(volumes[0], geometries)
            schedule.update_sampling(state, options.sampling.local_healpix_order)
        if self.grid.sampling is not state.sampling:
            self._make_grid()
        for half in state.halves:
            if half.pdf_direction.shape[1] != self.grid.n_directions:
                half.spread_directions(self.grid.n_directions)

        # where every particle looks, and what each half then is
        old_euler, old_offsets = state.poses.euler, state.poses.offset_angst
        sums = self._expectation(geometries, volumes, cross_correlation)
        with memory.scope("chunk"):
            self.joined = memory.keep(self._maximization(sums, cross_correlation), "run")
            memory.keep(state.halves, "run")
        for half in state.halves:
            # only what stays for longer: the thread that sends holds it for a moment after the call
            self.world.broadcast_(half.references)
        with memory.scope("chunk"):
            schedule.update_changes(state, old_euler, old_offsets, self.operators)

    # start

    def _set_up(
        self, options: RefineOptions, particles: Particles, mask: np.ndarray | None, folder: Path | str | None,
        world: World | None, simulated: bool, progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        options.check()
        options.check_against(particles)
        assert options.dataset.particle_diameter is not None
        self.options, self.particles, self.diameter = options, particles, options.dataset.particle_diameter
        self.world = world or World(device=device_named(options.device))
        self.device = self.world.device
        if self.device.type == "cpu":
            with memory.scope("chunk"):
                allow_fast_products()
        self.dtype = torch.float64 if options.precision == "double" else torch.float32
        be_deterministic(options.deterministic)
        memory.warm_up(self.device)
        self.optics = particles.optics
        self.box, self.pixel_size = self.optics[0].box, self.optics[0].pixel_size
        self.operators = torch.from_numpy(operators(options.dataset.symmetry or "C1")).to(self.device)
        radius = self.diameter / (2 * self.pixel_size)
        self.mask = (
            soft_sphere(self.box, radius, MASK_EDGE_PX, dtype=self.dtype, device=self.device)
            if mask is None
            else torch.tensor(mask, dtype=self.dtype, device=self.device)
        )
        self.shell_counts = [FourierPixels.of(optics.box, self.device).shell_counts() for optics in self.optics]
        self.optics_group = torch.tensor(particles.optics_group)
        self.group = torch.tensor(particles.group, device=self.device)
        self.ctf_parameters = torch.tensor(particles.ctf_parameters, device=self.device) if options.ctf else None
        # dealt one by one, so that every rank has its share of each half and each micrograph
        self.mine = torch.arange(self.world.rank, len(particles), self.world.size)
        self.plan = make_plan(
            len(self.mine), max(o.box for o in self.optics), self.device, self.dtype, map_box=self.box,
            symmetric=len(self.operators) > 1, samples=self._most_samples(), table=self._largest_table(),
            children=32**options.sampling.oversampling, lists=self._lists_bytes(), noise=not options.zero_mask,
            limit=options.memory.limit_bytes(),
        )  # fmt: skip
        log.info("plan: %s", self.plan)
        self.images = ParticleImages(particles, self.dtype, self.device, self.plan.keep_images)
        self.joined = None
        self._told: set[str] = set()
        self.output = Output(Path(folder), particles, options, simulated) if folder is not None else None
        self.progress = progress

    def _make_grid(self) -> None:
        with memory.scope("chunk"):
            self.grid = Grid(self.state.sampling, self.device)
            memory.keep(vars(self.grid), "run")

    def _most_samples(self) -> int:
        """Coarse samples of a particle that may be significant: all of the first grid, or of a local search."""
        s = self.options.sampling
        shifts = len(disc(s.offset_range, s.offset_step))
        return max(72 * 8**s.healpix_order // len(self.operators), LOCAL_ORIENTATIONS) * shifts

    def _lists_bytes(self) -> int:
        """Bytes of the ramps of all coarse and fine translations, and of the poses before and after."""
        s = self.options.sampling
        steps = max(s.offset_range / s.offset_step, schedule.MOST_STEPS)
        shifts = len(disc(steps, 1.0)) * (1 + 4**s.oversampling)
        pixels = sum(FourierPixels.of(o.box, self.device).count(o.box) for o in set(self.optics))
        return shifts * pixels * self.dtype.to_complex().itemsize + len(self.particles) * 8 * (FOUND + 6)

    def _largest_table(self) -> int:
        """Complex values in all coarse slices of a global search, at the finest grid there will be one."""
        s, step = self.options.sampling, self.options.sampling.offset_step
        sizes = []
        for order in range(s.healpix_order, max(s.healpix_order + 1, s.local_healpix_order)):
            sampling = Sampling(self.options.dataset.symmetry or "C1", s.offset_range, step, healpix_order=order)
            size = schedule.coarse_size(sampling, self.box, self.pixel_size, self.diameter, self.box)
            orientations = 72 * 8**order // len(self.operators)
            sizes.append(orientations * FourierPixels.of(self.box, self.device).count(size))
        return max(sizes)

    # expectation

    def _expectation(
        self, geometries: list[ImageGeometry], volumes: list[Tensor], cross_correlation: bool
    ) -> list[Sums]:
        """The sums of both halves over all particles of all ranks; sets the poses.

        Volumes of the first halves, as many as there are; each is gone with its half's work.
        """
        state = self.state
        settings = ExpectationSettings(
            current_size=state.current_size, coarse_size=state.coarse_size,
            adaptive_fraction=self.options.sampling.adaptive_fraction, cross_correlation=cross_correlation,
            local_sigma=state.local_sigma, padding=PADDING, chunk_elements=self.plan.chunk_elements,
            fine_weights=self.plan.fine_weights,
        )  # fmt: skip
        # all copies to and from the device at once: each waits for what the device has to do
        poses = state.poses
        last = torch.cat((poses.euler, poses.offset_angst, poses.norm_correction[:, None]), 1).to(self.device)
        found = torch.zeros((len(self.particles), FOUND), dtype=torch.float64, device=self.device)
        self._finished = 0
        parts = [self._parts_of_half(number) for number in range(len(state.halves))]
        # the first images of a half are read while the last of the other are worked on
        images = self.images.batches([part for of_half in parts for _, part in of_half])
        shared = Shared()
        sums = [
            self._expectation_of_half(
                Expectation(half, self.grid, settings, self.operators, shared, volumes.pop(0) if volumes else None),
                mine, geometries, images, last, found,
            )
            for half, mine in zip(state.halves, parts, strict=True)
        ]  # fmt: skip
        self.world.sum_(found)
        euler = torch.stack(euler_angles(found[:, :9].view(-1, 3, 3)), 1)
        *columns, done = torch.cat((euler, found[:, 9:]), 1).cpu().split((3, 2, 1, 1, 1, 1, 1, 1), 1)
        for (name, kept), new in zip(vars(poses).items(), columns, strict=True):
            # an unusable particle keeps what it had
            setattr(poses, name, torch.where(done > 0, new, kept.view(new.shape)).to(kept.dtype).view(kept.shape))
        return sums

    def _parts_of_half(self, number: int) -> list[tuple[int, Tensor]]:
        """Optics group and particles of each batch of this process."""
        mine = self.mine[self.state.subset[self.mine] == number]
        return [
            (group, part)
            for group in range(len(self.optics))
            if len(members := mine[self.optics_group[mine] == group])
            for part in members.split(self.plan.batch_particles)
        ]

    def _expectation_of_half(
        self, expectation: Expectation, parts: list[tuple[int, Tensor]], geometries: list[ImageGeometry],
        batches: Iterator[tuple[Tensor, Tensor]], last: Tensor, found: Tensor,
    ) -> Sums:  # fmt: skip
        """The sums of one half; notes what was found for its particles."""
        for group, part in parts:
            images, indices = next(batches)
            if len(indices):
                with memory.scope("batch"):
                    self._batch(expectation, group, geometries[group], images, indices, last, found)
            if self.progress is not None:
                self._finished += len(part)
                self.progress(self._finished, len(self.mine))
        ladder = LADDER if self.device.type == "cuda" else CPU_LADDER
        for precision in sorted(expectation.precisions - self._told, key=ladder.__getitem__):
            log.info("scores are computed in %s (largest Σ|C·P/σ|² up to %g)", precision, ladder[precision])
            self._told.add(precision)
        for tensor in expectation.sums.tensors():
            self.world.sum_(tensor)
        return expectation.sums

    def _batch(
        self, expectation: Expectation, group: int, geometry: ImageGeometry, images: Tensor, indices: Tensor,
        last: Tensor, found: Tensor,
    ) -> None:  # fmt: skip
        """Run the E-step on one batch and note what was found for its particles."""
        options, half = self.options, expectation.model
        euler, offset_angst, norm = last[indices].split((3, 2, 1), 1)
        norm = norm[:, 0]
        with memory.scope("chunk"):
            batch = memory.keep(prepare_images(
                images, indices, geometry, None if self.ctf_parameters is None else self.ctf_parameters[indices],
                half.norm_average / norm if options.norm else torch.ones_like(norm), offset_angst, self.diameter,
                None if options.zero_mask else half.sigma2_noise[group], options.seed + self.state.iteration,
                expectation.settings.cross_correlation,
            ), "batch")  # fmt: skip
        result = expectation(batch, group, self.group[indices], norm, euler)
        columns = (
            result.class_number, result.norm_correction if options.norm else norm, result.pmax, result.significant,
            result.log_likelihood, torch.ones_like(norm),
        )  # fmt: skip
        # doubles hold every one of these numbers exactly
        found.index_copy_(0, indices, torch.cat(
            (result.euler_matrix.flatten(1), result.offset_angst, *(values[:, None].double() for values in columns)), 1
        ))  # fmt: skip

    # maximization

    def _maximization(self, sums: list[Sums], cross_correlation: bool) -> Joined | None:
        """New maps, spectra and parameters of both halves; in the last iteration also their joined map."""
        state, options = self.state, self.options
        width, join = self.box * self.pixel_size, options.sampling.low_resol_join_halves
        known = options.reference.ini_high if state.iteration == 1 else state.current_resolution
        joined = update_halves(
            state.halves, sums, self.operators, PADDING, tau2_fudge=options.tau2_fudge,
            join_shell=width / max(join, known) if join > 0 else None,
            mask=self.mask if options.solvent_correct_fsc else None,
            seed=options.seed + state.iteration, last=state.converged,
        )  # fmt: skip
        pairs = list(zip(state.halves, sums, strict=True))
        if joined is not None:
            pairs.append((joined.model, sums[0].with_particles_of(sums[1])))
        for model, sum_ in pairs:
            update_parameters(
                model, sum_, self.shell_counts, norm=options.norm, scale=options.scale,
                cross_correlation=cross_correlation,
            )  # fmt: skip
        first, second = state.halves
        second.average_pmax = first.average_pmax  # one figure for both, as in RELION
        schedule.size_after_fsc(state, first.fsc[0])
        if cross_correlation:
            self._filter_again()
            shell = round_half_away(width / options.reference.ini_high)
        else:
            shell = schedule.resolution_shell((joined.model if joined else first).data_vs_prior)
        schedule.update_resolution(state, shell, self.box, self.pixel_size)
        for model in state.halves:
            if not state.converged:
                model.references = model.references * self.mask
        return joined

    def _filter_again(self) -> None:
        """After the first, cross-correlation iteration the maps are trusted no further than the reference was."""
        resolution = self.options.reference.ini_high
        curve = raised_cosine_lowpass(self.box, self.pixel_size, resolution, dtype=torch.float64, device=self.device)
        for model in self.state.halves:
            model.references = low_pass(model.references[0], self.pixel_size, resolution)[None]
            model.tau2 = model.tau2 * curve[0, 0] ** 2
            model.data_vs_prior = model.data_vs_prior * curve[0, 0] ** 2

    # schedule and files

    def _estimate_accuracy(self, volumes: Tensor, geometries: list[ImageGeometry]) -> None:
        """How well the data can tell poses apart, from 100 particles and the first half's map (all ranks alike)."""
        state = self.state
        shuffled = torch.randperm(len(self.particles), generator=state.generator)
        group = int(self.optics_group[shuffled[0]])
        chosen = shuffled[self.optics_group[shuffled] == group][: schedule.ACCURACY_PARTICLES]
        geometry = geometries[group]
        parameters = None if self.ctf_parameters is None else self.ctf_parameters[chosen.to(self.device)]
        ctf, _ = modulations(geometry, parameters, len(chosen), self.dtype)
        inverse_sigma2 = state.halves[0].inverse_sigma2(group)
        shell = geometry.pixels.shell[: geometry.n_pixels]
        state.accuracy_angles, state.accuracy_offsets, state.orientability = schedule.estimate_accuracy(
            volumes, geometry, ctf, inverse_sigma2.to(self.dtype)[shell],
            state.poses.euler[chosen].to(self.device), state.poses.class_number[chosen].to(self.device),
            state.current_size // 2, PADDING, self.box, state.generator,
        )  # fmt: skip
        state.orientability = memory.keep(state.orientability, "run")

    def _write(self) -> None:
        if self.output is not None and self.world.rank == 0:
            self.output.write(self.state, self.grid, self.joined)
