"""The picture of a refinement: FSC, slices of the map, angular distribution, resolution by iteration.

matplotlib is imported where it draws, in the second process of a command, which only names what is to be called.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchem.data.mrc import read_map
from torchem.data.star import read_star

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# resolutions (Å) that an axis may name
_ROUND = (400, 200, 100, 80, 60, 50, 40, 30, 25, 20, 15, 12, 10, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.5, 2.2, 2, 1.5, 1.2, 1)


def run_figure(folder: Path, title: str, simulated: bool = False) -> Path:
    """Draw a run from the files in its folder: the joined result, or the last iteration's first half.

    Parameters
    ----------
    title
        First line of the picture.
    simulated
        Mark the picture as one of simulated particles.

    Returns
    -------
    Path of the PNG, ``run.png`` in `folder`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    stem = "run" if (folder / "run_model.star").is_file() else f"run_it{_iterations(folder)[-1]:03d}"
    half = "" if stem == "run" else "_half1"
    shells = read_star(folder / f"{stem}{half}_model.star", last="model_class_1")["model_class_1"]
    volume, pixel_size = read_map(folder / f"{stem}{half}_class001.mrc")
    particles = read_star(folder / f"{stem}_data.star")["particles"]

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        # margins by hand: matplotlib's own layouts draw everything twice
        figure = Figure(figsize=(11, 6.6))
        grid = figure.add_gridspec(2, 3, left=0.06, right=0.985, bottom=0.08, top=0.89, wspace=0.35, hspace=0.35)
        _fsc(figure.add_subplot(grid[0, 0]), shells)
        _angles(
            figure.add_subplot(grid[0, 1]),
            particles["rlnAngleRot"].to_numpy(float),
            particles["rlnAngleTilt"].to_numpy(float),
        )
        _history(figure.add_subplot(grid[0, 2]), folder)
        middle = volume.shape[0] // 2
        width = volume.shape[0] * (pixel_size or 1)
        low, high = np.percentile(volume, [1, 99.8])
        for column, (axes, section) in enumerate(
            [("xy", volume[middle]), ("xz", volume[:, middle]), ("yz", volume[:, :, middle])]
        ):
            axis = figure.add_subplot(grid[1, column])
            axis.imshow(section, cmap="gray", vmin=low, vmax=high, origin="lower", extent=(0, width, 0, width))
            axis.set(title=f"central section {axes}", xlabel=f"{axes[0]} (Å)", ylabel=f"{axes[1]} (Å)")
        figure.suptitle(title)
        if simulated:
            figure.text(0.995, 0.995, "simulated particles", ha="right", va="top", color="firebrick", weight="bold")
        path = folder / "run.png"
        temporary = path.with_name(".run.part.png")
        # smaller files would take longer than all of the drawing
        figure.savefig(temporary, dpi=150, pil_kwargs={"compress_level": 1})
        temporary.replace(path)
    return path


def _fsc(axis: Axes, shells: pd.DataFrame) -> None:
    frequency = shells["rlnResolution"].to_numpy(float)
    fsc = shells["rlnGoldStandardFsc"].to_numpy(float)
    axis.axhline(0.143, color="0.6", linewidth=0.8)
    axis.axhline(0, color="0.8", linewidth=0.8)
    axis.plot(frequency, fsc, color="C0")
    axis.text(frequency[-1], 0.143, "0.143", ha="right", va="bottom", color="0.4", size=8)
    ticks: list[float] = []
    for angst in _ROUND:
        if 1 / angst <= frequency[-1] and 1 / angst - (ticks[-1] if ticks else 0) > frequency[-1] / 7:
            ticks.append(1 / angst)
    axis.set_xticks(ticks, [f"1/{1 / tick:g}" for tick in ticks])
    axis.set(
        title="gold-standard FSC", xlabel="resolution (1/Å)", ylabel="FSC",
        xlim=(0, frequency[-1]), ylim=(min(-0.1, fsc.min()), 1.02),
    )  # fmt: skip


def _angles(axis: Axes, rot: np.ndarray, tilt: np.ndarray) -> None:
    # equal areas: directions that are spread evenly give an even picture
    image = axis.hist2d(rot, np.cos(np.deg2rad(tilt)), bins=(36, 18), range=((-180, 180), (-1, 1)), cmap="magma")[3]
    axis.figure.colorbar(image, ax=axis, label="particles")
    axis.set_yticks(np.cos(np.deg2rad([0, 60, 90, 120, 180])), ["0", "60", "90", "120", "180"])
    axis.set(title="viewing directions", xlabel="rot (°)", ylabel="tilt (°)", xticks=(-180, -90, 0, 90, 180))


def _history(axis: Axes, folder: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    points = [
        (iteration, _resolution(folder / f"run_it{iteration:03d}_half1_model.star"))
        for iteration in _iterations(folder)
        if iteration > 0
    ]
    if (folder / "run_model.star").is_file():
        points.append((points[-1][0] + 1 if points else 1, _resolution(folder / "run_model.star")))
    axis.plot(*zip(*points, strict=True), "o-", color="C0", markersize=4)
    axis.set(title="resolution by iteration", xlabel="iteration", ylabel="resolution (Å)", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _iterations(folder: Path) -> list[int]:
    names = (re.fullmatch(r"run_it(\d+)_half1_model\.star", path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


def _resolution(model: Path) -> float:
    """Resolution (Å) in a model file's first block; the rest, which can be long, is not read."""
    with model.open() as lines:
        for line in lines:
            if line.startswith("_rlnCurrentResolution"):
                return float(line.split()[1])
    return float("nan")
