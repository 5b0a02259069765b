"""The trace of the memory stack as a table and a picture: top pointers over time (Zhang et al. 2018, fig. 3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from torchem.runtime.memory import EVENTS, LIFETIMES

# points of a curve; of what lies between two, the highest is drawn
_POINTS = 3000


def memory_figure(folder: Path, events: np.ndarray) -> None:
    """Write ``memory.csv`` and ``memory.png``.

    Parameters
    ----------
    events
        of :meth:`torchem.runtime.memory.Arena.events`; at least one.
    """
    table = pd.DataFrame({
        "seconds": events["seconds"] - events["seconds"][0],
        "event": pd.Categorical.from_codes(events["kind"], categories=EVENTS),
        "lifetime": pd.Categorical.from_codes(events["range"], categories=LIFETIMES),
        "bytes": events["size"], "top": events["top"], "live": events["live"], "block": events["block"],
    })  # fmt: skip
    table.to_csv(folder / "memory.csv", index=False, float_format="%.6f")

    seconds, tops, live = (table["seconds"].to_numpy(), *(_by_lifetime(events, name) for name in ("top", "live")))
    changes = np.where(events["kind"] == EVENTS.index("map"), events["size"], 0)
    changes -= np.where(events["kind"] == EVENTS.index("unmap"), np.abs(events["size"]), 0)
    step = max(1, len(events) // _POINTS)
    starts = np.arange(0, len(events), step)
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes, holes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bounds = np.maximum.reduceat(np.cumsum(tops, axis=1), starts) / 2**20
    below = np.zeros(len(starts))
    for name, above in zip(LIFETIMES, bounds.T, strict=True):
        axes.fill_between(seconds[starts], below, above, step="post", alpha=0.6, linewidth=0, label=f"{name}: top")
        below = above
    held = np.maximum.reduceat(live.sum(1), starts) / 2**20
    axes.step(seconds[starts], held, "k-", where="post", linewidth=0.8, label="live")
    axes.step(seconds[starts], np.cumsum(changes)[starts] / 2**20, "k:", where="post", linewidth=0.8, label="mapped")
    empty = np.maximum.reduceat((tops - live).sum(1), starts) / 2**20
    holes.fill_between(seconds[starts], empty, step="post", color="0.5", linewidth=0)
    for mark in seconds[(events["kind"] == EVENTS.index("open")) & (events["range"] == LIFETIMES.index("iteration"))]:
        axes.axvline(mark, color="0.8", linewidth=0.6, zorder=0)
    axes.set_ylabel("MiB")
    figure.legend(loc="outside upper center", fontsize="small", ncols=6)
    holes.set_ylabel("holes, MiB")
    holes.set_xlabel("seconds (grey lines: iterations begin)")
    figure.savefig(folder / "memory.png", dpi=120)


def _by_lifetime(events: np.ndarray, name: str) -> np.ndarray:
    """`(events, lifetimes)`: each lifetime's value after every event."""
    columns = []
    for lifetime in range(len(LIFETIMES)):
        # the last event of this lifetime up to each event
        last = np.maximum.accumulate(np.where(events["range"] == lifetime, np.arange(len(events)), -1))
        columns.append(np.where(last >= 0, events[name][last], 0))
    return np.stack(columns, 1)
