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
# what else a reader wants to know of a case, in words
GIVEN = {
    "device": "{}", "n_particles": "{} particles", "box": "{} px", "last_ring": "last ring {} px",
    "n_references": "K = {}", "n_orientations": "{} orientations", "n_shifts": "{} shifts",
}  # fmt: skip
UNITS = {"box": "box (px)", "x_range": "x_range, y_range (± px)"}
FLOOR = "floor: products and memory alone, at this device's rates"


def draw(table: pd.DataFrame, columns: tuple[str, ...], path: Path) -> None:
    """Draw ``columns`` of a table, a panel each, the last measurement of every case; as PNG.

    Memory in megabytes shares one logarithmic panel. A column's floor, what the device could do, is dashed. What all
    cases have in common stands above, what those of a line have in common beside its name.
    """
    there = [name for name in AXES if name in table]
    alike = "precision" if "precision" in there else there[0]
    axis = next((name for name in there if table[name].nunique() > 1), alike)
    together = all(name.endswith("_mb") for name in columns)
    lines = [name for name in LINES if name in table and name != axis and table[name].nunique() > 1]
    panels = [columns] if together else [(name,) for name in columns]
    given = [name for name in GIVEN if name in table and name != axis and name not in lines]
    common = [name for name in given if table[name].nunique() == 1]
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            for key, part in table.groupby(lines) if lines else [((), table)]:
                last = part.drop_duplicates(axis, keep="last").sort_values(axis, kind="stable")
                own = [name for name in given if name not in common and last[name].nunique() == 1]
                label = " ".join([*([name] if together else []), *map(str, key)])
                label = ", ".join([label, *_said(last, own)])
                line = axes.plot(last[axis], last[name], "o" if axis in KINDS else "o-", label=label, alpha=0.7)
                if f"floor_{name}" in table:
                    axes.plot(last[axis], last[f"floor_{name}"], "--", color=line[0].get_color())
            if f"floor_{name}" in table:
                axes.plot([], [], "--", color="gray", label=FLOOR)
        axes.set_xlabel(UNITS.get(axis, axis))
        if axis not in KINDS:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("MB" if together else names[0])
        if together:
            axes.set_yscale("log")
        if together or lines:
            axes.legend(fontsize="small")
    figure.suptitle(", ".join([path.stem, *_said(table, common)]), fontsize="small", wrap=True)
    figure.savefig(path)


def _said(rows: pd.DataFrame, names: list[str]) -> list[str]:
    """What all rows have in common, of these columns."""
    return [GIVEN[name].format(rows[name].iloc[0]) for name in names]
