"""Multi-reference and reference-free alignment, read top to bottom.

Multi-reference alignment (Algorithm 1 of Chung et al. 2021; ISAC, Yang et al. 2012): every image is compared with every
reference, straight and mirrored, at every angle and shift; the best one takes it; the averages of what was taken, each
filtered as its halves agree, are the next references; until images stay where they are. Reference-free alignment
(EMAN2's ali2d) is the same with the running average of all images, over smaller and smaller shifts, for as long as the
average gains power.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from torchem.data.images import Images
from torchem.imaging.planar import transformed
from torchem.mra.averages import (
    SMALLEST,
    ClassSums,
    filtered,
    masked,
    mass_centres,
    ring_correlation,
    rolled,
)
from torchem.mra.images import Batches
from torchem.mra.options import AlignOptions
from torchem.mra.output import Output, load_checkpoint
from torchem.mra.state import Iteration, State
from torchem.ops.correlation import Alignment, References, Shifts, align
from torchem.runtime.distributed import World, device_named
from torchem.runtime.run_folder import refuse_other_input

log = logging.getLogger(__name__)

# settled: of the images fewer than this share changed class or side, the others moved less than this at the last ring
SETTLED_SHARE, SETTLED_PX = 0.01, 0.5
# seeds of the classes are averages of so many images
SEED_IMAGES = 100
# reference-free alignment: shifts are tried in ranges and steps that shrink so, the next when the power stops growing
STAGES = ((1.0, 1.0), (0.5, 0.5), (0.25, 0.25), (0.25, 0.125))
# shares of the mean size: in the first half of a run, classes of less than the first make room, and of less than the
# second if there are any of more than the third
SMALL_SHARE, LOW_SHARE, HIGH_SHARE = 0.2, 0.5, 2.0
# the least growth of the average's power from one iteration to the next
POWER_GAIN = 1e-3


class _Aligner(ABC):
    """What both have in common: iterating, one pass over all images, files."""

    def __init__(
        self, options: AlignOptions, images: Images, references: np.ndarray | None = None, *,
        folder: Path | str | None = None, world: World | None = None, simulated: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        self._set_up(options, images, folder, world, simulated, progress)
        options.check_against(len(images), images.box, None if references is None else references.shape)
        start = self._start() if references is None else torch.tensor(references, dtype=torch.float32)
        self.state = State.initial(len(images), start.to(self.device), options.seed, given=references is not None)

    @classmethod
    def resume(
        cls, options: AlignOptions, images: Images, references: np.ndarray | None = None, *, folder: Path | str,
        world: World | None = None, simulated: bool = False, progress: Callable[[int, int], None] | None = None,
    ) -> Self:  # fmt: skip
        """Go on after the last iteration that ``folder`` holds whole; ``references`` are not looked at."""
        aligner = cls.__new__(cls)
        aligner._set_up(options, images, folder, world, simulated, progress)
        aligner.state = load_checkpoint(Path(folder), aligner.device)
        before = len(aligner.state.alignment.peak), aligner.state.references.shape[-1]
        refuse_other_input(Path(folder), "images", before, images.source, (len(images), images.box))
        return aligner

    def __iter__(self) -> Iterator[Iteration]:
        while not self.state.converged and self.state.iteration < self.options.max_iterations:
            iteration = self.step()
            if self.output is not None and self.world.rank == 0:
                self.output.write(iteration, self.state, self.state.iteration == self.options.max_iterations)
            yield iteration

    @abstractmethod
    def step(self) -> Iteration:
        """One iteration."""

    @abstractmethod
    def _start(self) -> Tensor:
        """The first references `(k, L, L)`, where none are given."""

    def _set_up(
        self, options: AlignOptions, images: Images, folder: Path | str | None, world: World | None, simulated: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        options.check()
        self.options, self.images, self.progress = options, images, progress
        self.world = world or World(device=device_named(options.device))
        self.device = self.world.device
        self.rings = options.rings(images.box)
        self.batches = Batches(images, self.world.share(len(images)), self.device)
        self.output = Output(Path(folder), images, simulated) if folder is not None else None

    def _pass(self, shifts: Shifts) -> tuple[Alignment, ClassSums]:
        """Align every image to the references around where it was, and add it to the sums of its class."""
        state = self.state
        references = References(state.references, self.rings, self.options.mirror)
        sums = ClassSums(references.count, self.images.box, self.device)
        centres = self._centres(shifts)
        found: list[Alignment] = []
        done = 0
        for numbers, images in self.batches:
            here = numbers.to(self.device)
            best = align(images, centres[here], references, shifts)
            sx, sy = best.shift().unbind(1)
            aligned = transformed(images, torch.rad2deg(best.angle), sx, sy, best.mirror)
            sums.add(aligned, best.reference, here)
            found.append(best)
            done += len(numbers)
            if self.progress is not None:
                self.progress(done, len(self.world.share(len(self.images))))
        sums.reduce(self.world)
        return self._gathered(found), sums

    def _centres(self, shifts: Shifts) -> Tensor:
        """`(n, 2)` whole pixels around which shifts are tried: where images were, as far as the rings have room."""
        room = max(0, int(self.rings.reach - self.rings.last - max(shifts.x_range, shifts.y_range)))
        return self.state.alignment.offset.round().clamp(-room, room)

    def _gathered(self, found: list[Alignment]) -> Alignment:
        """All images of all ranks."""
        mine = self.world.share(len(self.images))
        values = torch.zeros((6, len(self.images)), dtype=torch.float64, device=self.device)
        if found:
            values[:, mine.start : mine.stop] = torch.cat([
                torch.stack([best.reference, best.mirror, best.angle, *best.offset.unbind(1), best.peak])
                for best in found
            ], 1)  # fmt: skip
        reference, mirror, angle, x, y, peak = self.world.sum_(values)
        return Alignment(reference.long(), mirror > 0, angle, torch.stack([x, y], 1), peak)

    def _report(
        self, sums: ClassSums, frc: Tensor, averages: Tensor, changed: float, moved: float, shifts: Shifts,
        started: float,
    ) -> Iteration:  # fmt: skip
        state = self.state
        return Iteration(
            state.iteration, _table(state, self.images), averages, frc, sums.members, changed, moved,
            float(state.alignment.peak.mean()), shifts, time.perf_counter() - started, state.converged,
        )  # fmt: skip


class MultiReferenceAligner(_Aligner):
    """A multi-reference alignment; iterating over it runs it.

    Parameters
    ----------
    options
        see :class:`torchem.mra.options.AlignOptions`.
    images
        of any file: ``Images.open(PATH)``.
    references
        `(k, L, L)`; None: ``options.n_classes`` are made of the images.
    folder
        where every iteration is written; None: nowhere.
    world
        this process among all that share the work.
    simulated
        mark all output so.
    progress
        called with (done, total) images of this process as an iteration goes on.
    """

    def step(self) -> Iteration:
        """One iteration: compare, take, average, filter, fill empty seats."""
        started = time.perf_counter()
        state, shifts = self.state, self.options.shifts()
        state.iteration += 1

        # every image goes to the reference that it fits best
        alignment, sums = self._pass(shifts)
        state.update(alignment, self.rings.last)

        # what it fits are now the averages of what they took
        averages = sums.averages().float()
        even, odd = masked(sums.halves().flatten(0, 1).float(), self.rings.last).chunk(2)
        frc = ring_correlation(even, odd)
        references = filtered(averages, frc)
        if not state.given:
            centres = mass_centres(references, self.rings.last)
            averages, references = rolled(averages, centres), rolled(references, centres)
            state.follow(centres)
        state.references = self._reseat(references, sums.members)
        changed, moved = state.movement()
        state.converged = state.iteration > 1 and changed < SETTLED_SHARE and moved < SETTLED_PX
        return self._report(sums, frc, averages, changed, moved, shifts, started)

    def _start(self) -> Tensor:
        """Seeds: averages of a few images each, as they lie."""
        count, n = self.options.n_classes or 1, len(self.images)
        generator = torch.Generator().manual_seed(self.options.seed)
        chosen = torch.randperm(n, generator=generator)
        size = max(1, min(SEED_IMAGES, n // count))
        seeds = [self.batches.read(part).mean(0) for part in chosen[: count * size].split(size)]
        return self.world.broadcast_(torch.stack(seeds).to(self.device))

    def _reseat(self, references: Tensor, members: Tensor) -> Tensor:
        """Give the seats of the smallest classes to those images of the largest that fit these worst.

        A class of fewer than four images is too small; in the first half of a run also one of less than a fifth of the
        mean size, and one of less than half while another has more than twice the mean. What two kinds of images fell
        into one class, its worse half is the other kind; a single noisy image would attract none.
        """
        state, sizes = self.state, members.cpu()
        early = 2 * state.iteration <= self.options.max_iterations
        mean = len(self.images) / len(sizes)
        least = max(float(SMALLEST), SMALL_SHARE * mean if early else 0.0)
        ascending = sizes.argsort(stable=True).tolist()
        for seat, taken in zip(ascending, ascending[::-1], strict=True):
            uneven = early and sizes[seat] < LOW_SHARE * mean and sizes[taken] > HIGH_SHARE * mean
            if not (sizes[seat] < least or uneven) or sizes[taken] < 2 * SMALLEST or seat == taken:
                break
            own = (state.alignment.reference == taken).nonzero()[:, 0]
            worst = own[state.alignment.peak[own].argsort()[: len(own) // 2]]
            chosen = worst[torch.randperm(len(worst), generator=state.generator)[:SEED_IMAGES].to(self.device)]
            log.info("class %d has %d images: some of class %d take its seat", seat, int(sizes[seat]), taken)
            references[seat] = self._average(chosen)
        return references

    def _average(self, numbers: Tensor) -> Tensor:
        """Average of some images as they are aligned now."""
        alignment = self.state.alignment
        sx, sy = alignment.shift()[numbers].unbind(1)
        alpha, mirror = torch.rad2deg(alignment.angle[numbers]), alignment.mirror[numbers]
        return transformed(self.batches.read(numbers.cpu()).to(self.device), alpha, sx, sy, mirror).mean(0)


class ReferenceFreeAligner(_Aligner):
    """A reference-free alignment; iterating over it runs it. Parameters as :class:`MultiReferenceAligner`."""

    def step(self) -> Iteration:
        """One iteration: align to the running average, and average again."""
        started = time.perf_counter()
        state, options = self.state, self.options
        reach, finer = STAGES[min(state.stage, len(STAGES) - 1)]
        shifts = Shifts(reach * options.x_range, reach * options.y_range, finer * options.step)
        state.iteration += 1

        alignment, sums = self._pass(shifts)
        state.update(alignment, self.rings.last)

        averages = sums.averages().float()
        even, odd = masked(sums.halves().flatten(0, 1).float(), self.rings.last).chunk(2)
        frc = ring_correlation(even, odd)
        references = filtered(averages, frc)
        centres = mass_centres(references, self.rings.last)
        averages, references = rolled(averages, centres), rolled(references, centres)
        state.follow(centres)
        state.references = references

        # aligned images add up to more: power that no longer grows asks for finer shifts, and in the end to stop
        power = float(masked(references, self.rings.last).double().square().sum())
        if power <= state.power * (1 + POWER_GAIN):
            state.stage += 1
        state.power = power
        state.converged = state.stage == len(STAGES)
        return self._report(sums, frc, averages, *state.movement(), shifts, started)

    def _start(self) -> Tensor:
        """The average of all images as they lie, centred."""
        total = torch.zeros((self.images.box,) * 2, dtype=torch.float64, device=self.device)
        for _, images in self.batches:
            total += images.double().sum(0)
        average = (self.world.sum_(total) / len(self.images)).float()[None]
        return rolled(average, mass_centres(average, self.rings.last))


def _table(state: State, images: Images) -> pd.DataFrame:
    found = state.alignment
    columns = found.reference, found.mirror, found.angle, *found.shift().unbind(1), found.peak, state.pixel_error
    reference, mirror, angle, sx, sy, peak, error = torch.stack([column.double() for column in columns]).cpu().numpy()
    return pd.DataFrame({
        "image": list(images.names),
        "class_id": reference.astype(np.int64),
        "mirror": mirror.astype(np.int64),
        "alpha": np.mod(np.rad2deg(angle), 360.0),
        "sx": sx,
        "sy": sy,
        "peak": peak,
        "pixel_error": error,
    })  # fmt: skip
