"""Memory of the fine-pass weights in four layouts, iteration by iteration (Zhang et al. 2018, §4, eq. 4.1, fig. 4).

With b significant coarse samples of O children each, out of all R·T that were scored:

=========  ===================================================  ==================
dense      an array of all                                      4 O·R·T a particle
samples    a value and an index each (as GeRelion)              8 O·b
relion     a value and four 8-byte indices each                 36 O·b
blocks     O values and one index a coarse sample               (4 + 4 O)·b
=========  ===================================================  ==================
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from torchem.benchmarks.measure import Case, largest_difference, require_parity
from torchem.benchmarks.refine import REPEATS, SIZES, make_refiner
from torchem.em import refiner
from torchem.em.expectation import Expectation
from torchem.em.weights import block_sparse

__all__ = ["PLOTTED", "REPEATS", "SIZES", "check_parity", "rows"]

PLOTTED = ("dense_mb", "samples_mb", "relion_mb", "blocks_mb", "held_mb")


@dataclass
class Counts:
    """What one iteration's fine passes held."""

    scored: int = 0  # coarse samples
    children: int = 0  # O
    held: list[int] = field(default_factory=list)  # bytes of each block-sparse tensor


def rows(case: Case) -> Iterator[dict]:
    """A row for each of ``repeats`` iterations, both halves together; ``held`` is what the tensors take."""
    run = make_refiner(case)
    for _ in range(case.repeats):
        with patch.object(refiner, "Expectation", _counting(counts := Counts())):
            i = run.step()
        significant, o = int(run.state.poses.significant.sum()), counts.children
        sizes = weight_bytes(counts.scored, significant, o)
        yield {
            "n_particles": case.n_particles, "box": case.box, "iteration": i.number,
            "healpix_order": i.healpix_order, "local": i.local, "children": o, "scored": counts.scored,
            "significant": significant, **{f"{name}_mb": size / 1e6 for name, size in sizes.items()},
            "held_mb": sum(counts.held) / 1e6, "held_at_once_mb": max(counts.held) / 1e6,
            "blocks_of_dense": sizes["blocks"] / sizes["dense"],
        }  # fmt: skip
        if i.converged:
            return


def weight_bytes(scored: int, significant: int, children: int) -> dict[str, int]:
    """Bytes of the fine weights of ``significant`` coarse samples out of ``scored``, by layout."""
    values = significant * children
    return {
        "dense": 4 * scored * children, "samples": 8 * values, "relion": 36 * values,
        "blocks": 4 * significant + 4 * values,
    }  # fmt: skip


def check_parity() -> None:
    """Raise AssertionError if blocks hold other weights than the dense array, or take other memory than counted."""
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand((5, 60), generator=generator) < 0.2
    values = torch.rand((int(keep.sum()), 32), generator=generator)
    dense = torch.zeros(5, 60, 32)
    dense[keep] = values
    row, column = torch.nonzero(keep, as_tuple=True)
    blocks = block_sparse(row, column, values, 5, 60)
    require_parity("blocks", largest_difference(blocks.to_dense(), dense.flatten(1)), 0)
    counted = weight_bytes(keep.numel(), len(row), 32)["blocks"] + blocks.crow_indices().nbytes
    require_parity("bytes", abs(held_bytes(blocks) - counted), 0)


def held_bytes(weights: Tensor) -> int:
    """Bytes of a block-sparse tensor."""
    return sum(part.nbytes for part in (weights.crow_indices(), weights.col_indices(), weights.values()))


def _counting(counts: Counts) -> type[Expectation]:
    """An E-step that notes in ``counts`` what it holds."""

    class Counting(Expectation):
        def _fine_pass(self, batch: Any, *arguments: Any) -> Any:
            weights, found = super()._fine_pass(batch, *arguments)
            counts.children = self.grid.orientation_children * self.grid.translation_children
            counts.held.append(held_bytes(weights))
            if self.settings.local_sigma is None:
                per_particle = self.model.n_classes * self.grid.n_orientations * self.grid.n_translations
                counts.scored += len(batch) * per_particle
            return weights, found

        def _local_scores(self, *arguments: Any) -> Any:
            found = super()._local_scores(*arguments)
            counts.scored += found[2].numel()
            return found

    return Counting
