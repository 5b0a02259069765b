"""Simulated particles with a known answer.

    python -m torchem.simulate                                                  1,000 × 64 px of the built-in phantom
    python -m torchem.simulate name=mine model=5a1a.pdb symmetry=D2 box=128 pixel_size=1.77 n_particles=6496
    python -m torchem.simulate name=two 'model=[a.mrc,b.mrc]' symmetry=C1       a mixture
    python -m torchem.simulate -m noise.snr=0.1,0.05                            a sweep

Writes particles.mrcs, particles.star (RELION 5), truth.star (with angles, origins and classes),
truth_class001.mrc … and reference.mrc into outputs/datasets/NAME. The same command again finds them there. Every
option with unit and default: torchem/imaging/simulation.py, or ``--cfg job``.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from torchem.commands import check_option_names, telling, to_options
from torchem.data.mrc import read_map
from torchem.errors import InputError
from torchem.imaging.simulation import SimulateOptions, simulate
from torchem.runtime import run_folder
from torchem.runtime.progress import Progress

log = logging.getLogger("torchem.simulate")


@dataclass
class Settings(SimulateOptions):
    """What is simulated, and where to."""

    name: str = "simulated"  # of the folder in outputs/datasets


ConfigStore.instance().store(name="simulate_schema", node=Settings)


_INTERRUPTED = "the same command makes the particles again"


def main() -> None:
    """Run the command; whatever the user can mend is told without a traceback."""
    with telling(_INTERRUPTED):
        check_option_names(sys.argv[1:], run_folder.flatten(asdict(Settings())))
        _command()


@hydra.main(version_base="1.3", config_path="pkg://torchem.configs", config_name="simulate")
def _command(config: DictConfig) -> None:
    with telling(_INTERRUPTED), Progress() as progress:
        settings = to_options(Settings, OmegaConf.to_container(config, resolve=True))
        make(settings, Path(HydraConfig.get().runtime.output_dir), progress)


def make(settings: Settings, folder: Path, progress: Progress) -> None:
    """Simulate into a folder, unless the same data set is there.

    Raises
    ------
    InputError
        Options that cannot be used, another data set in the folder, no room.
    """
    settings.check()
    wanted = asdict(settings)
    del wanted["name"]
    star = folder / "particles.star"
    there = run_folder.inspect(folder).settings
    if there is not None and (changed := run_folder.changes(there, wanted)):
        raise InputError(
            f"{folder}: holds other particles; give these another name=NEW. Changed:\n  " + "\n  ".join(changed)
        )
    if there is not None and star.is_file():
        log.info("the particles are there: %s", star)
        return
    run_folder.prepare(folder, 4 * settings.n_particles * settings.box**2 + 4 * 4 * settings.box**3)
    log.info("simulating %d particles of %d px in %s", settings.n_particles, settings.box, folder)
    simulate(settings, folder, progress.task("simulating particles"))
    # last: its presence says that the data set is whole
    run_folder.write_settings(folder, wanted)
    log.info(
        "simulated: refine them with  python -m torchem.refine dataset.name=%s dataset.star=%s dataset.symmetry=%s "
        "reference.map=%s reference.ini_high=%g dataset.particle_diameter=%g",
        settings.name, os.path.relpath(star), settings.symmetry, os.path.relpath(folder / "reference.mrc"),
        settings.reference_angst, _diameter(folder),
    )  # fmt: skip


def _diameter(folder: Path) -> float:
    """Å: a sphere around all density above a tenth of the highest, and a tenth more, as far as the box goes."""
    widest = 0.0
    for path in folder.glob("truth_class*.mrc"):
        volume, pixel_size = read_map(path)
        box, step = len(volume), pixel_size or 1.0
        beyond = np.argwhere(volume > 0.1 * volume.max()) - box // 2
        reach = float(np.linalg.norm(beyond, axis=1).max())
        widest = max(widest, min(10 * math.ceil(2.2 * reach * step / 10), math.floor(box * step)))
    return widest


if __name__ == "__main__":
    main()
