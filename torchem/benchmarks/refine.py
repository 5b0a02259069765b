"""A whole refinement of simulated particles of the phantom, iteration by iteration."""

from collections.abc import Iterator
from pathlib import Path

from torchem.benchmarks.measure import DEVICE, Case, peak_mb
from torchem.data.particles import Particles
from torchem.em.options import RefineOptions
from torchem.em.reference import read_reference
from torchem.em.refiner import Iteration, Refiner
from torchem.errors import InputError
from torchem.imaging.simulation import make_dataset

# particles and box; orientations and shifts are those of the refinement
SIZES = {"cuda": (1000, 64, 0, 0), "cpu": (100, 32, 0, 0)}
REPEATS, PLOTTED = 99, ("seconds", "resolution_angst")
DATASETS = Path("outputs/datasets")
# the phantom's box in Å, its diameter and its symmetry
WIDTH_ANGST, DIAMETER_ANGST, SYMMETRY = 226.56, 200.0, "D2"


def rows(case: Case) -> Iterator[dict]:
    """A row for each iteration; ``repeats`` bounds their number."""
    refiner = make_refiner(case)
    found: list[Iteration] = []
    while not refiner.state.converged and len(found) < case.repeats:
        peak = peak_mb(lambda: found.append(refiner.step()))
        i = found[-1]
        yield {
            "n_particles": case.n_particles, "box": case.box, "precision": case.precision or "single",
            "iteration": i.number, "healpix_order": i.healpix_order, "local": i.local,
            "current_size": i.current_size, "coarse_size": i.coarse_size, "seconds": i.seconds,
            "resolution_angst": i.resolution_angst, "pmax": i.pmax, "peak_mb": peak,
        }  # fmt: skip


def check_parity() -> None:
    """Nothing to compare: the tests hold refinements to RELION's."""


def make_refiner(case: Case) -> Refiner:
    """The refinement of simulated particles, which are made on first use.

    Raises
    ------
    InputError
        Orientations or shifts are chosen: a refinement chooses its own.
    """
    if case.n_orientations or case.n_shifts:
        raise InputError("n_orientations, n_shifts: a refinement chooses its own; give n_particles and box")
    folder = particles_of(case)
    options = RefineOptions(precision=case.precision or "single", device=DEVICE.type)
    options.dataset.particle_diameter, options.dataset.symmetry = DIAMETER_ANGST, SYMMETRY
    reference = read_reference(folder / "reference.mrc", case.box, WIDTH_ANGST / case.box)
    return Refiner(options, Particles.read(folder / "particles.star"), reference)


def particles_of(case: Case) -> Path:
    """The folder of the simulated particles, which are made on first use."""
    folder = DATASETS / f"bench_{case.n_particles}x{case.box}"
    if not (folder / "particles.star").is_file():
        make_dataset(
            folder, snr=0.05, n_particles=case.n_particles, box=case.box, pixel_size=WIDTH_ANGST / case.box,
            symmetry=SYMMETRY, device=DEVICE.type,
        )  # fmt: skip
    return folder
