"""The picture of a benchmark's table: what was measured against the first size that varies."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# axes from left to right: iterations, sizes; else kinds of arithmetic or memory
AXES = (
    "iteration", "n_orientations", "box", "n_particles", "x_range", "n_shifts", "n_references", "precision",
    "allocator",
)  # fmt: skip
KINDS = ("precision", "allocator")
LINES = ("operation", "stage", "allocator", "precision", "backend", "deterministic", "device")


def draw(table: pd.DataFrame, columns: tuple[str, ...], path: Path) -> None:
    """Draw ``columns`` of a table, a panel each, the last measurement of every case; as PNG.

    Memory in megabytes shares one logarithmic panel. A column's floor, what the device could do, is dashed.
    """
    axis = next((name for name in AXES if name in table and table[name].nunique() > 1), "precision")
    together = all(name.endswith("_mb") for name in columns)
    lines = [name for name in LINES if name in table and name != axis and table[name].nunique() > 1]
    panels = [columns] if together else [(name,) for name in columns]
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            for key, part in table.groupby(lines) if lines else [((), table)]:
                last = part.drop_duplicates(axis, keep="last").sort_values(axis, kind="stable")
                label = " ".join([*([name] if together else []), *map(str, key)])
                line = axes.plot(last[axis], last[name], "o" if axis in KINDS else "o-", label=label, alpha=0.7)
                if f"floor_{name}" in table:
                    axes.plot(last[axis], last[f"floor_{name}"], "--", color=line[0].get_color(), label="floor")
        axes.set_xlabel(axis)
        if axis not in KINDS:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("MB" if together else names[0])
        if together:
            axes.set_yscale("log")
        if together or lines:
            axes.legend(fontsize="small")
    figure.savefig(path)
