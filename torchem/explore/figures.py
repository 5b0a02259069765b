"""Figures of an alignment, each a matplotlib `Figure` that a notebook shows and `savefig` writes.

Parameters come as `torchem.data.alignment.COLUMNS`, histories as `class_counts` of every iteration, one after the
other.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import matplotlib.backends.backend_agg  # what saving a picture would import
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_GALLERY = 200  # averages that a page can show so that they can be seen
_NAMED_CLASSES = 20  # colours that an eye tells apart


class Picture(Figure):
    """A figure that notebooks show, whatever their settings."""

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as file:
            self.savefig(file, format="png")
            return file.getvalue()


def gallery(
    averages: Tensor | np.ndarray, members: np.ndarray | None = None, labels: list[str] | None = None, columns: int = 10
) -> Figure:
    """Class averages, the largest class first, each in its own grey scale.

    Parameters
    ----------
    averages
        `(k, L, L)`, of any device.
    members
        `(k,)` sizes of the classes, which are written below the averages; without it in the given order.
    labels
        further text for each, like its resolution.
    """
    images = np.asarray(torch.as_tensor(averages).detach().cpu(), np.float32)
    order = np.arange(len(images)) if members is None else np.argsort(-np.asarray(members), kind="stable")
    order = order[:_GALLERY]
    columns = min(columns, len(order))
    rows = -(-len(order) // columns)
    side, text = 1.1, 0.34 if labels else 0.2  # inches
    head = 0.3 if len(images) > _GALLERY else 0.03
    # one picture of all: a hundred axes take matplotlib seconds
    box = images.shape[-1]
    wide, high = math.ceil(1.03 * box), math.ceil((1 + text / side) * box)
    sheet = np.full((rows * high, columns * wide), np.nan, np.float32)
    shown = images[order, ::-1]  # y upwards
    low, top = np.percentile(shown, [0.5, 99.8], axis=(1, 2), keepdims=True)
    shown = (shown - low) / np.maximum(top - low, 1e-12)
    with matplotlib.rc_context(_STYLE):
        height = side / box * len(sheet) + head
        figure = Picture(figsize=(side / box * sheet.shape[1], height))
        axis = figure.add_axes((0, 0, 1, 1 - head / height))
        axis.set_axis_off()
        for place, index in enumerate(order.tolist()):
            row, column = divmod(place, columns)
            y, x = row * high, column * wide
            sheet[y : y + box, x : x + box] = shown[place]
            name = f"{index}" if members is None else f"{index}: {int(members[index]):,}"
            name += f"\n{labels[index]}" if labels else ""
            axis.text(x + box / 2, y + 1.01 * box, name, fontsize=7, ha="center", va="top")
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=1, aspect="auto")
        if len(images) > _GALLERY:
            figure.suptitle(f"the {_GALLERY} largest of {len(images)} classes", y=1 - head / height / 2, va="center")
    return figure


def shift_histogram(parameters: pd.DataFrame) -> Figure:
    """How far images were shifted (px), and turned."""
    with matplotlib.rc_context(_STYLE):
        figure = Picture(figsize=(10, 3.2), layout="constrained")
        plane, along, turned = figure.subplots(1, 3)
        x, y = parameters["sx"].to_numpy(float), parameters["sy"].to_numpy(float)
        reach = max(1.0, float(np.abs(np.concatenate([x, y])).max(initial=0)))
        bins = np.linspace(-reach, reach, 42)
        image = plane.hist2d(x, y, bins=(bins, bins), cmap="magma")[3]
        figure.colorbar(image, ax=plane, label="images")
        plane.set(title="shifts", xlabel="sx (px)", ylabel="sy (px)", aspect="equal")
        for values, name in ((x, "sx"), (y, "sy")):
            along.hist(values, bins=bins, histtype="step", label=name)
        along.legend(frameon=False)
        along.set(title="shifts along x and y", xlabel="px", ylabel="images")
        straight = parameters["mirror"].to_numpy() == 0
        alpha = parameters["alpha"].to_numpy(float) % 360
        turned.hist([alpha[straight], alpha[~straight]], bins=np.linspace(0, 360, 37), stacked=True)
        turned.legend(["straight", "mirrored"], loc="lower right")
        turned.set(title="angles", xlabel="alpha (°)", ylabel="images", xticks=range(0, 361, 90))
    return figure


def class_histogram(parameters: pd.DataFrame, n_classes: int | None = None) -> Figure:
    """Sizes of the classes, mirrored images apart, and the peaks of their members."""
    class_id = parameters["class_id"].to_numpy(np.int64)
    n_classes = n_classes or int(class_id.max(initial=0)) + 1
    mirrored = parameters["mirror"].to_numpy() == 1
    with matplotlib.rc_context(_STYLE):
        figure = Picture(figsize=(10, 3.2), layout="constrained")
        sizes, peaks = figure.subplots(1, 2, width_ratios=(2, 1))
        straight = np.bincount(class_id[~mirrored], minlength=n_classes)
        flipped = np.bincount(class_id[mirrored], minlength=n_classes)
        sizes.bar(np.arange(n_classes), straight, label="straight")
        sizes.bar(np.arange(n_classes), flipped, bottom=straight, label="mirrored")
        sizes.axhline(len(class_id) / n_classes, color="0.5", linewidth=0.8)
        sizes.legend(frameon=False)
        sizes.set(title="sizes of classes; the line is their mean", xlabel="class", ylabel="images")
        sizes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if "peak" in parameters:
            peaks.hist(parameters["peak"].to_numpy(float), bins=50)
        peaks.set(title="peaks of the correlation", xlabel="peak", ylabel="images")
    return figure


def class_counts(
    iteration: int, parameters: pd.DataFrame, before: pd.DataFrame | None = None, n_classes: int | None = None
) -> pd.DataFrame:
    """What a history keeps of an iteration, one row a class.

    Parameters
    ----------
    parameters, before
        those of this iteration, and of the one before where there is one.

    Returns
    -------
    Columns ``iteration``, ``class_id``, ``members``, ``joined`` (members that were in another class before, 0 in the
    first iteration) and, if ``parameters`` has it, ``peak`` (mean of the members, NaN without any).
    """
    class_id = parameters["class_id"].to_numpy(np.int64)
    n_classes = n_classes or int(class_id.max(initial=0)) + 1
    members = np.bincount(class_id, minlength=n_classes)
    moved = np.zeros(0, np.int64) if before is None else class_id[class_id != before["class_id"].to_numpy(np.int64)]
    rows = {
        "iteration": np.full(n_classes, iteration),
        "class_id": np.arange(n_classes),
        "members": members,
        "joined": np.bincount(moved, minlength=n_classes),
    }
    if "peak" in parameters:
        total = np.bincount(class_id, parameters["peak"].to_numpy(np.float64), n_classes)
        rows["peak"] = np.where(members > 0, total / np.maximum(members, 1), np.nan)
    return pd.DataFrame(rows)


def occupancy(history: pd.DataFrame) -> pd.DataFrame:
    """Occupancy and attraction of every class by iteration.

    Occupancy is the class's share of all images. Attraction is the share of the images of other classes an iteration
    before that moved into it: a class that draws images from everywhere, wherever they belong, stands out.

    Returns
    -------
    ``history`` with the columns ``occupancy`` and ``attraction``; the latter is missing (NaN) in the first iteration,
    and everywhere without ``joined``.
    """
    history = history.sort_values(["class_id", "iteration"], ignore_index=True)
    total = history.groupby("iteration")["members"].transform("sum")
    result = history.assign(occupancy=history["members"] / total, attraction=np.nan)
    if "joined" in history:
        others = total - history.groupby("class_id")["members"].shift()
        result["attraction"] = np.where(others > 0, history["joined"] / others.where(others > 0), np.nan)
    return result.sort_values(["iteration", "class_id"], ignore_index=True)


def class_history(history: pd.DataFrame) -> Figure:
    """Occupancy and attraction of the classes by iteration, smallest and largest class, and the mean peak.

    Of one class, as in reference-free alignment, the mean peak is all there is to show.
    """
    table = occupancy(history)
    by_iteration = table.groupby("iteration")
    one = table["class_id"].nunique() == 1
    with matplotlib.rc_context(_STYLE):
        figure = Picture(figsize=(5, 3) if one else (10, 6), layout="constrained")
        axes: list[Axes] = figure.subplots(1 if one else 2, 1 if one else 2, squeeze=False).ravel().tolist()
        score = axes[-1]
        if "peak" in table:
            weighted = (table["peak"] * table["members"]).groupby(table["iteration"]).sum()
            score.plot(weighted.index, weighted / by_iteration["members"].sum(), "o-", markersize=4)
        score.set(title="mean peak", xlabel="iteration", ylabel="peak")
        if not one:
            _plane(axes[0], table, "occupancy", "occupancy (share of all images)")
            _plane(axes[1], table, "attraction", "attraction (share of the others' images that came)")
            sizes = by_iteration["members"].agg(["min", "mean", "max"])
            axes[2].fill_between(sizes.index, sizes["min"], sizes["max"], alpha=0.3)
            axes[2].plot(sizes.index, sizes["mean"], "o-", markersize=4)
            axes[2].set(title="smallest, mean and largest class", xlabel="iteration", ylabel="images")
        for axis in axes:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _plane(axis: Axes, table: pd.DataFrame, column: str, title: str) -> None:
    """A column of the history as a picture, classes over iterations."""
    plane = table.pivot(index="class_id", columns="iteration", values=column)
    axis.set(title=title, xlabel="iteration", ylabel="class")
    if not plane.notna().to_numpy().any():
        axis.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axis.transAxes, color="0.5")
        return
    extent = (plane.columns[0] - 0.5, plane.columns[-1] + 0.5, plane.index[0] - 0.5, plane.index[-1] + 0.5)
    image = axis.imshow(
        plane.to_numpy(float), cmap="viridis", aspect="auto", origin="lower", extent=extent, interpolation="nearest"
    )
    axis.figure.colorbar(image, ax=axis)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def embedding_figure(points: Mapping[str, np.ndarray], class_id: np.ndarray) -> Figure:
    """Scatter plots of embedded images, coloured by class, each under its name."""
    columns = min(2, len(points))
    rows = -(-len(points) // columns)
    named = int(class_id.max(initial=0)) < _NAMED_CLASSES
    with matplotlib.rc_context(_STYLE):
        figure = Picture(figsize=(5 * columns, 4.2 * rows), layout="constrained")
        axes: list[Axes] = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for axis, (name, values) in zip(axes, points.items(), strict=False):
            dots = axis.scatter(
                values[:, 0], values[:, 1] if values.shape[1] > 1 else np.zeros(len(values)), s=4, linewidths=0,
                c=class_id, cmap="tab20" if named else "turbo", vmin=0, vmax=_NAMED_CLASSES if named else None,
            )  # fmt: skip
            axis.set(title=name, xticks=[], yticks=[])
        for axis in axes[len(points) :]:
            axis.set_visible(False)
        if not named:
            figure.colorbar(dots, ax=axes, label="class", shrink=0.5)
    return figure
