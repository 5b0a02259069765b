"""What a 2D alignment found: figures, embeddings of the images before and after it, and a page that shows them all."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchem.explore.embedding import TwoStageReduction, tsne, two_stage_reduction
    from torchem.explore.figures import (
        class_counts,
        class_histogram,
        class_history,
        embedding_figure,
        gallery,
        occupancy,
        shift_histogram,
    )
    from torchem.explore.page import write_report

__all__ = [
    "TwoStageReduction",
    "class_counts",
    "class_histogram",
    "class_history",
    "embedding_figure",
    "gallery",
    "occupancy",
    "shift_histogram",
    "tsne",
    "two_stage_reduction",
    "write_report",
]

_HOME = {name: "figures" for name in __all__} | {
    "TwoStageReduction": "embedding",
    "tsne": "embedding",
    "two_stage_reduction": "embedding",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    # matplotlib and torch take seconds to import: on first use
    if name not in _HOME:
        raise AttributeError(f"module 'torchem.explore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"torchem.explore.{_HOME[name]}"), name)
