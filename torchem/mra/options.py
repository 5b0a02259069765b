"""Settings of an alignment: a plain dataclass, EMAN2's and SPHIRE's names, pixels and degrees.

The command turns its Hydra config into an :class:`AlignOptions`; a notebook makes one directly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchem.errors import Problems

if TYPE_CHECKING:
    from torchem.ops.correlation import Shifts
    from torchem.ops.polar import Rings

MODES = ("mra", "rfa")
# more shifts than these take too long, and on a GPU too much memory
MOST_SHIFTS = 1000


@dataclass
class AlignDataset:
    """Images in a RELION or cryoSPARC table."""

    name: str | None = None  # names the run folder; the file's own name if not given
    star: str | None = None  # .star or .cs
    root: str | None = None  # folder that image paths are relative to
    pixel_size: float | None = None  # Å, where the file has none


@dataclass
class AlignDistributed:
    """How several processes talk to each other."""

    backend: str = "auto"  # nccl, gloo, mpi; auto: nccl on GPUs, gloo on CPUs


@dataclass
class AlignOptions:
    """Every setting of an alignment."""

    mode: str = "mra"  # mra: to several references, which become class averages; rfa: to one running average
    dataset: AlignDataset = field(default_factory=AlignDataset)
    images: str | None = None  # a stack (.mrcs, .hdf, bdb:FOLDER#NAME) or table, in place of dataset.star
    references: str | None = None  # a stack of images to align to; else they are made of the data
    n_classes: int | None = None  # how many to make of the data
    first_ring: int = 1  # px
    last_ring: int | None = None  # px; the largest that fits the box with the shifts
    x_range: float = 3.0  # px on either side
    y_range: float = 3.0
    step: float = 1.0  # px
    mirror: bool = True
    max_iterations: int = 20
    seed: int = 1
    device: str = "auto"  # auto, cpu, cuda
    distributed: AlignDistributed = field(default_factory=AlignDistributed)
    resume: str = "auto"  # auto, never, or the folder of the run to go on from
    run_name: str = "align"

    def check(self) -> None:
        """Refuse settings that are wrong whatever the images are.

        Raises
        ------
        InputError
            One line a problem: option, value, remedy.
        """
        problems = Problems()
        problems.one_of("mode", self.mode, *MODES)
        problems.positive("dataset.pixel_size", self.dataset.pixel_size)
        if self.mode == "rfa":
            for option in ("references", "n_classes"):
                value = getattr(self, option)
                problems.require(value is None, option, value, "mode=rfa makes its one reference itself; leave it out")
        elif self.references is not None and self.n_classes is not None:
            problems.add(
                f"n_classes={self.n_classes}: the references in {self.references} say how many; leave out one of both"
            )
        if self.n_classes is not None:
            problems.require(self.n_classes >= 1, "n_classes", self.n_classes, "must be at least 1")
        problems.require(self.first_ring >= 1, "first_ring", self.first_ring, "must be at least 1 px")
        if self.last_ring is not None:
            problems.require(
                self.last_ring > self.first_ring, "last_ring", self.last_ring,
                f"must be larger than first_ring={self.first_ring}",
            )  # fmt: skip
        for option in ("x_range", "y_range"):
            value = getattr(self, option)
            problems.require(0 <= value < math.inf, option, value, "must be 0 or more pixels")
        problems.positive("step", self.step)
        if not problems:
            columns, rows = (2 * reach / self.step + 1 for reach in (self.x_range, self.y_range))
            problems.require(
                columns * rows <= MOST_SHIFTS, "step", self.step,
                f"makes {columns * rows:.0f} shifts of x_range={self.x_range:g}, y_range={self.y_range:g}; "
                "take a larger step",
            )  # fmt: skip
        problems.require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "must be at least 1")
        problems.require(0 <= self.seed < 2**63, "seed", self.seed, "must be 0 or a positive integer")
        problems.one_of("device", self.device, "auto", "cpu", "cuda")
        problems.one_of("distributed.backend", self.distributed.backend, "auto", "nccl", "gloo", "mpi")
        problems.require(self.resume.strip() != "", "resume", repr(self.resume), "must be auto, never or a run folder")
        problems.folder_name("dataset.name", self.dataset.name)
        problems.folder_name("run_name", self.run_name)
        problems.tell()

    def check_against(self, n_images: int, box: int, references: tuple[int, ...] | None = None) -> None:
        """Refuse settings that do not fit these images and references `(k, L, L)`.

        Raises
        ------
        InputError
            One line a problem: option, value, remedy.
        """
        problems = Problems()
        farthest = self._room(box)
        wide = f"{box} px images with shifts of {max(self.x_range, self.y_range):g} px"
        if self.last_ring is not None and self.last_ring > farthest:
            problems.add(
                f"last_ring={self.last_ring}: {wide} have room for {farthest} px; give a smaller radius or range"
            )
        elif farthest <= self.first_ring:
            problems.add(
                f"x_range={self.x_range:g}, y_range={self.y_range:g}: {wide} leave no ring; give a smaller range"
            )
        if self.mode == "mra" and references is None and self.n_classes is None:
            problems.add(
                "no references: give references=STACK, or n_classes=NUMBER to make them of the images themselves"
            )
        if self.n_classes is not None and self.n_classes > n_images:
            problems.add(f"n_classes={self.n_classes}: there are only {n_images} images; give fewer classes")
        if self.mode == "rfa" and n_images < 2:
            problems.add(f"{n_images} image: an average needs at least two")
        if references is not None and references[1:] != (box, box):
            problems.add(
                f"references={self.references}: {references[-1]} x {references[-2]} px, but the images have {box} px; "
                "scale or clip the references"
            )
        problems.tell()

    def rings(self, box: int) -> Rings:
        """Rings on images of one size."""
        from torchem.ops.polar import Rings

        return Rings(box, self.first_ring, self._room(box) if self.last_ring is None else self.last_ring)

    def shifts(self) -> Shifts:
        """What is tried around each centre."""
        from torchem.ops.correlation import Shifts

        return Shifts(self.x_range, self.y_range, self.step)

    def _room(self, box: int) -> int:
        """The largest ring that stays within the box at every shift."""
        return math.floor(min(box // 2, box - 1 - box // 2) - max(self.x_range, self.y_range))
