"""The trace of the memory stack as a table and a picture."""

from pathlib import Path

import matplotlib.image
import pandas as pd

from torchem.report.memory_figure import memory_figure
from torchem.runtime.memory import Arena


def test_trace_of_nested_scopes(tmp_path: Path) -> None:
    arena = Arena(64 << 20, chunk=2 << 20)
    arena.trace()
    for _ in range(2):
        with arena.scope("iteration"):
            kept = arena.allocate(3 << 20)
            with arena.scope("batch"):
                arena.release(arena.allocate(1000))
            arena.release(kept)
    arena.trace(False)
    arena.release(arena.allocate(1))
    memory_figure(tmp_path, arena.events())
    table = pd.read_csv(tmp_path / "memory.csv")
    ends = ["release", "close", "release", "close"]
    first = ["open", "map", "allocate", "open", "map", "allocate", *ends]
    assert table["event"].tolist() == [*first, *(event for event in first if event != "map")]
    inner = table.iloc[5]
    assert (inner["lifetime"], inner["bytes"], inner["top"], inner["live"]) == ("batch", 1024, 1024, 1024)
    assert table.loc[table["event"] == "allocate", "block"].tolist() == [1, 2, 3, 4]
    assert table.loc[table["event"] == "release", "block"].tolist() == [2, 1, 4, 3]
    assert (table["seconds"].diff().dropna() >= 0).all() and table["seconds"][0] == 0
    assert matplotlib.image.imread(tmp_path / "memory.png").shape[2] == 4
