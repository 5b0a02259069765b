"""What a run of alignment leaves behind: parameters and averages of each iteration, and what is needed to go on.

Files are written under temporary names; the table comes last and marks the iteration as whole.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import torch

from torchem.data.alignment import to_relion, write_parameters
from torchem.data.checkpoint import read_checkpoint, write_checkpoint
from torchem.data.images import Images
from torchem.data.mrc import write_stack
from torchem.data.star import write_star
from torchem.mra.state import Iteration, State
from torchem.ops.correlation import Alignment
from torchem.runtime.run_folder import ALIGNED as MARK
from torchem.runtime.run_folder import last_checkpoint


class Output:
    """The run folder's writer.

    Parameters
    ----------
    images
        the set, whose own columns stay in the output if it is a table.
    simulated
        mark every file as made from simulated images.
    """

    def __init__(self, folder: Path, images: Images, simulated: bool) -> None:
        self.folder, self.images = folder, images
        self.comment = "torchem" + (": simulated particles" if simulated else "")

    def write(self, iteration: Iteration, state: State, last: bool) -> None:
        """Write run_it003_*, and in the last iteration run_* before these are marked as whole.

        Raises
        ------
        InputError
            They could not be written.
        """
        stem = f"run_it{state.iteration:03d}"
        self._classes(f"{stem}_classes.mrcs", iteration)
        save_checkpoint(self.folder / f"{stem}_checkpoint.pt", state)
        if last or state.converged:
            self._classes("run_classes.mrcs", iteration)
            write_parameters(self.folder / "run_params.csv", iteration.parameters)
            self._data(f"run_{MARK}", iteration.parameters)
        self._data(f"{stem}_{MARK}", iteration.parameters)

    def _classes(self, name: str, iteration: Iteration) -> None:
        averages = iteration.averages.cpu().numpy()
        write_stack(self.folder / name, averages, self.images.pixel_size or 1.0, label=self.comment)

    def _data(self, name: str, parameters: pd.DataFrame) -> None:
        """Write RELION's table: the input's with what was found, or a new one."""
        found = to_relion(parameters, self.images.pixel_size or 1.0)
        particles = self.images.particles
        if particles is None:
            blocks = {"particles": found}
            if self.images.pixel_size is not None:
                optics = {
                    "rlnOpticsGroupName": ["opticsGroup1"],
                    "rlnOpticsGroup": [1],
                    "rlnImagePixelSize": [self.images.pixel_size],
                    "rlnImageSize": [self.images.box],
                    "rlnImageDimensionality": [2],
                }
                blocks = {"optics": pd.DataFrame(optics), "particles": found.assign(rlnOpticsGroup=1)}
            write_star(self.folder / name, blocks, self.comment)
            return
        table = particles.table.copy()
        for label in found.columns.drop("rlnImageName"):
            table[label] = found[label].to_numpy()
        dataclasses.replace(particles, table=table).write(self.folder / name, self.comment)


def save_checkpoint(path: Path, state: State) -> None:
    """Write all of a state, exactly; the same state gives the same bytes."""
    plain = dict(vars(state))
    plain["alignment"] = {name: values.cpu() for name, values in vars(state.alignment).items()}
    for name in ("references", "pixel_error"):
        plain[name] = plain[name].cpu().clone()
    write_checkpoint(path, plain)


def load_checkpoint(folder: Path, device: torch.device) -> State:
    """The state after the last iteration that a folder holds whole.

    Raises
    ------
    InputError
        There is none.
    """
    plain = read_checkpoint(last_checkpoint(folder, MARK))
    plain["alignment"] = Alignment(**{name: values.to(device) for name, values in plain["alignment"].items()})
    for name in ("references", "pixel_error"):
        plain[name] = plain[name].to(device)
    return State(**plain)
