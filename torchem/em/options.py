"""Settings of a refinement: plain dataclasses, RELION's names, units and defaults (its job form).

The command turns its Hydra config into a :class:`RefineOptions`; a notebook makes one directly.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchem.errors import InputError, Problems

if TYPE_CHECKING:
    from torchem.data.particles import Particles


@dataclass
class StandIn:
    """Particles simulated from the built-in phantom, used where a data set's own files are not here."""

    n_particles: int = 1000
    box: int = 64  # px
    pixel_size: float = 3.54  # Å
    snr: float = 0.1  # variance of the signal over that of the noise
    voltage: float = 300.0  # kV
    cs: float = 2.7  # mm
    amplitude_contrast: float = 0.1
    seed: int = 1


@dataclass
class DatasetOptions:
    """The particles: where they are and what they show."""

    name: str | None = None  # names the run folder; the STAR file's own name if not given
    star: str | None = None  # .star or .cs
    root: str | None = None  # folder that image paths are relative to
    pixel_size: float | None = None  # Å, where the STAR file has none
    particle_diameter: float | None = None  # Å, of the circular mask
    symmetry: str | None = None  # C1 if neither given nor known of the data set
    source: str | None = None  # where the real data is had, for messages
    stand_in: StandIn | None = None


@dataclass
class ReferenceOptions:
    """The initial reference and the solvent mask."""

    map: str | None = None  # .mrc of any box and pixel size, or .pdb/.cif
    ini_high: float = 60.0  # Å, low-pass filter of the initial reference
    mask: str | None = None  # .mrc with values in [0, 1]; a soft sphere of the particle diameter if none
    absolute_greyscale: bool = False  # False: the first iteration uses cross-correlation


@dataclass
class SamplingOptions:
    """Angles, offsets and priors."""

    healpix_order: int = 2  # angular step 360 / (6 · 2^order) degrees
    offset_range: float = 5.0  # px
    offset_step: float = 2.0  # px
    oversampling: int = 1
    adaptive_fraction: float = 0.999
    perturb: float = 0.5  # of the angular step and of the offset step
    local_healpix_order: int = 4  # local searches from this order on, in the first iteration if there are poses
    low_resol_join_halves: float = 40.0  # Å; -1: the halves are never joined
    start_from_poses: bool = False  # local searches around the poses of the input
    sigma_ang: float | None = None  # degrees, width of the first local searches' angular prior; coarse step if none

    def starts_locally(self, has_poses: bool) -> bool:
        """Whether the first iteration searches around the poses: if told to, or as fine a grid as RELION does it on."""
        return self.start_from_poses or (has_poses and self.healpix_order >= self.local_healpix_order)


@dataclass
class DistributedOptions:
    """How several processes talk to each other."""

    backend: str = "auto"  # nccl, gloo, mpi; auto: nccl on GPUs, gloo on CPUs


@dataclass
class MemoryOptions:
    """Where tensors' memory comes from, and how much of it there is; for the commands."""

    # stack: one range a lifetime, empty at its end; torch: PyTorch's own; auto: stack for one process on a GPU
    allocator: str = "auto"
    limit: str | None = None  # of all tensors of a process, such as 8GiB; all that the device has if not given
    strict: bool = False  # stack: raise for what outlives its scope, and say where it was made
    trace: bool = False  # stack: write every event to memory.csv, and memory.png

    def check(self) -> None:
        """Refuse what cannot be.

        Raises
        ------
        InputError
            Option, value, remedy.
        """
        if self.allocator not in ("auto", "stack", "torch"):
            raise InputError(f"memory.allocator={self.allocator}: must be one of auto, stack, torch")
        for option in ("strict", "trace"):
            if getattr(self, option) and self.allocator == "torch":
                raise InputError(f"memory.{option}=true: needs memory.allocator=stack")
        self.limit_bytes()

    def limit_bytes(self) -> int:
        """The limit; 0 if there is none."""
        if self.limit is None:
            return 0
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", self.limit.strip(), re.IGNORECASE)
        size = 0
        if match:
            base = 1024 if match[3] else 1000
            size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
        if size < 64 << 20:
            raise InputError(f"memory.limit={self.limit}: must be a size of at least 64MiB, such as 8GiB or 500MB")
        return size


@dataclass
class RefineOptions:
    """Every setting of a gold-standard 3D refinement."""

    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    tau2_fudge: float = 1.0
    zero_mask: bool = True
    norm: bool = True
    scale: bool = True
    ctf: bool = True
    solvent_correct_fsc: bool = False
    max_iterations: int = 999
    seed: int = 1
    device: str = "auto"  # auto, cpu, cuda
    precision: str = "single"  # single, double
    deterministic: bool = False
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    resume: str = "auto"  # auto, never, or the folder of the run to go on from
    run_name: str = "run"

    def check(self) -> None:
        """Refuse settings that are wrong whatever the particles are.

        Raises
        ------
        InputError
            One line a problem: option, value, remedy.
        """
        s, r, d = self.sampling, self.reference, self.dataset
        problems = Problems()
        problems.positive("dataset.pixel_size", d.pixel_size)
        problems.positive("dataset.particle_diameter", d.particle_diameter)
        if d.symmetry is not None:
            from torchem.imaging.symmetry import canonical

            try:
                canonical(d.symmetry)
            except InputError as error:
                problems.add(f"dataset.symmetry={d.symmetry}: {error}")
        problems.folder_name("dataset.name", d.name)
        problems.folder_name("run_name", self.run_name)
        problems.positive("reference.ini_high", r.ini_high)
        problems.require(
            0 <= s.healpix_order <= 8, "sampling.healpix_order", s.healpix_order,
            "must be between 0 (60°) and 8 (0.23°)",
        )  # fmt: skip
        problems.require(
            0 <= s.local_healpix_order <= 9, "sampling.local_healpix_order", s.local_healpix_order,
            "must be between 0 and 9",
        )  # fmt: skip
        problems.require(0 <= s.oversampling <= 3, "sampling.oversampling", s.oversampling, "must be between 0 and 3")
        problems.require(
            0 <= s.offset_range < math.inf, "sampling.offset_range", s.offset_range, "must be 0 or more pixels"
        )
        problems.positive("sampling.offset_step", s.offset_step)
        problems.require(
            not s.offset_step > 0 or s.offset_range / s.offset_step <= 50, "sampling.offset_step", s.offset_step,
            f"would make more than 7,800 offsets within offset_range={s.offset_range}; take a larger step",
        )  # fmt: skip
        problems.require(
            0 < s.adaptive_fraction <= 1, "sampling.adaptive_fraction", s.adaptive_fraction,
            "must be above 0 and at most 1 (RELION: 0.999)",
        )  # fmt: skip
        problems.require(0 <= s.perturb <= 1, "sampling.perturb", s.perturb, "must be between 0 (none) and 1")
        problems.require(
            s.low_resol_join_halves == -1 or 0 < s.low_resol_join_halves < math.inf,
            "sampling.low_resol_join_halves", s.low_resol_join_halves,
            "must be a resolution in Å, or -1 for none",
        )  # fmt: skip
        problems.positive("sampling.sigma_ang", s.sigma_ang)
        problems.positive("tau2_fudge", self.tau2_fudge)
        problems.require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "must be at least 1")
        problems.require(0 <= self.seed < 2**63, "seed", self.seed, "must be 0 or a positive integer")
        problems.one_of("device", self.device, "auto", "cpu", "cuda")
        problems.one_of("precision", self.precision, "single", "double")
        try:
            self.memory.check()
        except InputError as error:
            problems.add(str(error))
        problems.one_of("distributed.backend", self.distributed.backend, "auto", "nccl", "gloo", "mpi")
        problems.require(
            not self.solvent_correct_fsc or r.mask is not None, "solvent_correct_fsc", True,
            "needs the mask whose effect is corrected: give reference.mask=FILE.mrc",
        )  # fmt: skip
        problems.require(self.resume.strip() != "", "resume", repr(self.resume), "must be auto, never or a run folder")
        problems.tell()

    def check_against(self, particles: Particles) -> None:
        """Refuse settings that do not fit these particles (the diameter is for ``Particles.check``).

        Raises
        ------
        InputError
            One line a problem: option, value, remedy.
        """
        s = self.sampling
        problems = Problems()
        if self.dataset.particle_diameter is None:
            problems.add(
                "dataset.particle_diameter is not given: give the particle's longest dimension and a margin, in Å"
            )
        for optics in particles.optics:
            if s.offset_range >= optics.box / 2:
                problems.add(
                    f"sampling.offset_range={s.offset_range:g}: reaches the edge of the {optics.box} px box of "
                    f"optics group {optics.name}; give less than {optics.box // 2}"
                )
        model = particles.optics[0]
        lowest, highest = model.box * model.pixel_size, 2 * model.pixel_size
        if not highest < self.reference.ini_high <= lowest:
            problems.add(
                f"reference.ini_high={self.reference.ini_high:g}: these images hold resolutions between "
                f"{highest:g} Å (Nyquist) and {lowest:g} Å (the box); RELION's usual choice is 60"
            )
        if s.sigma_ang is not None and not s.starts_locally(has_poses=True):
            problems.add(
                f"sampling.sigma_ang={s.sigma_ang:g}: the first search is not local; give "
                "sampling.start_from_poses=true, or leave it out"
            )
        if s.start_from_poses and not particles.has_poses:
            problems.add(
                f"sampling.start_from_poses=true: {particles.source} has no rlnAngleRot, rlnAngleTilt and "
                "rlnAnglePsi; leave it false for a global search"
            )
        problems.tell()
