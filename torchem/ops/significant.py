"""The smallest set of samples of each particle that carries a given fraction of its weight."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchem.runtime.cpu import side_by_side

# of the histogram of each row's log weights
BINS = 1024
# entries that a CPU works on at once, each on a core of its own: they stay in its caches
BLOCK = 2**16
# nats under the top where exp stops: a CPU takes seven times as long for subnormal numbers
NOTHING = 80.0
# the kernel narrows a row's threshold this often, each time by EDGES: 24 nats to 1e-5
PASSES, EDGES = 7, 8


@dataclass(frozen=True)
class Posterior:
    """What becomes of a ragged list `(b,)` of log weights, n rows one after the other.

    Attributes
    ----------
    kept
        `(b,)` probability of each significant entry, 0 elsewhere.
    top, log_total
        `(n,)` largest log weight, and float64 log of the row's whole weight.
    best
        `(n,)` int64: place in the list of each row's first largest entry.
    """

    kept: Tensor
    top: Tensor
    log_total: Tensor
    best: Tensor


def posterior(log_weights: Tensor, first: Tensor, fraction: float) -> Posterior:
    """Normalise the rows of a ragged list and keep their significant entries (Scheres 2012, §2.3).

    The weights of a row are taken from the largest down until their sum exceeds ``fraction`` of the row's total; the
    last one taken is the threshold, and ties with it are kept.

    Parameters
    ----------
    log_weights
        `(b,)` real.
    first
        `(n + 1,)` int64: where each row begins, and the end; no row is empty.
    fraction
        RELION's adaptive_fraction, 0.999.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be in (0, 1]")
    if log_weights.is_cuda and log_weights.dtype == torch.float32:
        return _posterior_on_gpu(log_weights, first, fraction)
    return _posterior(log_weights, first, fraction, None)


def _posterior(log_weights: Tensor, first: Tensor, fraction: float, log_totals: Tensor | None) -> Posterior:
    """:func:`posterior`; significant is a fraction of totals `(n,)`, where the list does not have everything."""
    ends, kept = first.tolist(), torch.empty_like(log_weights)

    def some(rows: range) -> tuple[Tensor, Tensor, Tensor]:
        here = slice(ends[rows.start], ends[rows.stop])
        counts = first[rows.start : rows.stop + 1].diff()
        inside = torch.arange(int(counts.max()), device=first.device) < counts[:, None]
        table = log_weights.new_full(inside.shape, -torch.inf).masked_scatter_(inside, log_weights[here])
        probability, top, log_total, place = _posterior_of_table(
            table, counts, fraction, None if log_totals is None else log_totals[rows.start : rows.stop]
        )
        kept[here] = probability[inside]
        return top, log_total, first[rows.start : rows.stop] + place

    parts = side_by_side(some, _rows_at_once(ends, 2**24 if kept.is_cuda else BLOCK))
    return Posterior(kept, *(torch.cat(part) for part in zip(*parts, strict=True)))


def _rows_at_once(ends: list[int], most: int) -> Iterator[range]:
    """Ranges of rows that fill a table of up to `most` entries."""
    start, longest = 0, 0
    for row, (begin, end) in enumerate(pairwise(ends)):
        longest = max(longest, end - begin)
        if longest * (row + 1 - start) > most and row > start:
            yield range(start, row)
            start, longest = row, end - begin
    yield range(start, len(ends) - 1)


def _posterior_of_table(
    table: Tensor, counts: Tensor, fraction: float, log_totals: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :class:`Posterior` has, of the rows of a table `(n, c)` that -inf fills up; places within the row."""
    n = len(table)
    top, place = table.max(1)
    below = top[:, None] - table
    share = below.clamp(max=NOTHING).neg_().exp_()
    # find the bin of log weights in which the sum passes the fraction; only that bin is sorted
    bins = below.mul_((BINS / _deepest(counts, fraction)).to(below)[:, None]).clamp_(max=BINS - 1).int()
    if n > 1:
        bins += BINS * torch.arange(n, dtype=bins.dtype, device=bins.device)[:, None]
    mass = torch.zeros(n * BINS, dtype=torch.float64, device=table.device)
    mass.index_add_(0, bins.flatten(), share.flatten().double())
    reached = mass.view(n, BINS).cumsum(1)
    total = reached[:, -1]
    wanted = fraction * (total if log_totals is None else (log_totals - top).exp())
    # the last bin that counts, where nothing passes it
    crossing = ((reached <= wanted[:, None]) & (reached < total[:, None])).sum(1)
    above = reached.gather(1, crossing[:, None])[:, 0] - mass.view(n, BINS).gather(1, crossing[:, None])[:, 0]
    numbers = torch.arange(n, device=table.device)
    row, column = torch.nonzero(bins == (numbers * BINS + crossing).to(bins)[:, None], as_tuple=True)
    order = torch.argsort(table[row, column], descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    row, column = row[order], column[order]
    before = torch.cumsum(share[row, column].double(), 0) - share[row, column]
    starts = torch.searchsorted(row, numbers)
    taken = before - before[starts[row]] + above[row] <= wanted[row]
    values = table[row, column]
    threshold = torch.full_like(top, torch.inf).scatter_reduce_(
        0, row, torch.where(taken, values, torch.inf), "amin"
    )
    probability = (share * (1 / total).to(share)[:, None]).masked_fill_(table < threshold[:, None], 0.0)
    return probability, top, top.double() + total.log(), place


def significant_of_rows(log_weights: Tensor, log_totals: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the significant entries of a matrix, as :func:`posterior` has them.

    Parameters
    ----------
    log_weights, log_totals
        `(n, c)` real, and `(n,)` float64 log of each row's whole weight.
    """
    floor = log_totals - _deepest(torch.tensor(log_weights.shape[1]), fraction)
    row, column = torch.nonzero(log_weights > floor[:, None].to(log_weights.dtype), as_tuple=True)
    first = row_starts(row, len(log_weights))
    candidates = log_weights[row, column]
    if candidates.is_cuda and candidates.dtype == torch.float32:
        kept = _posterior_on_gpu(candidates, first, fraction).kept
    else:
        kept = _posterior(candidates, first, fraction, log_totals).kept
    place = torch.nonzero(kept)[:, 0]
    return row[place], column[place]


def row_starts(rows: Tensor, n_rows: int) -> Tensor:
    """`(n + 1,)`: where each row of an ascending list `(m,)` begins, and the end."""
    return torch.searchsorted(rows, torch.arange(n_rows + 1, device=rows.device))


def first_best(values: Tensor, rows: Tensor, top: Tensor) -> Tensor:
    """`(n,)`: place of the first largest value of each row of a ragged list, `top` being these values."""
    place = torch.arange(len(values), device=values.device)
    best = torch.full((len(top),), len(values), dtype=torch.int64, device=values.device)
    return best.scatter_reduce_(0, rows, torch.where(values == top[rows], place, len(values)), "amin")


def _deepest(counts: Tensor, fraction: float) -> Tensor:
    """Nats under a row's total from which on its `counts` samples together do not reach the rest of the fraction."""
    return torch.log(counts.clamp(min=1)) - math.log(max((1 - fraction) * 1e-3, 1e-300))


def _posterior_on_gpu(log_weights: Tensor, first: Tensor, fraction: float) -> Posterior:
    from torchem.kernels.significant import posterior_kernel

    n, device = len(first) - 1, first.device
    kept = torch.empty_like(log_weights)
    top = torch.empty(n, dtype=torch.float32, device=device)
    log_total = torch.empty(n, dtype=torch.float64, device=device)
    best = torch.empty(n, dtype=torch.int64, device=device)
    deepest = _deepest(first.diff(), fraction)
    if n:
        posterior_kernel[(n,)](
            log_weights, first, kept, top, log_total, best, fraction, deepest,
            BLOCK=512, CHUNK=16, EDGES=EDGES, PASSES=PASSES, num_warps=4, num_stages=1,
        )  # fmt: skip
    return Posterior(kept, top, log_total, best)


def row_logsumexp(log_weights: Tensor, rows: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Maximum and log of the sum of exponentials of each row of a ragged list.

    Parameters
    ----------
    log_weights, rows
        `(b,)` real and int64: the row of each entry.
    n_rows
        number of rows; a row without entries gives -inf.

    Returns
    -------
    `(n_rows,)` maximum, `(n_rows,)` float64 log-sum-exp.
    """
    top = torch.full((n_rows,), -torch.inf, dtype=log_weights.dtype, device=log_weights.device)
    top.scatter_reduce_(0, rows, log_weights, "amax")
    total = torch.zeros(n_rows, dtype=torch.float64, device=log_weights.device)
    total.index_add_(0, rows, (log_weights - top[rows]).double().exp())
    return top, top.double() + total.log()
