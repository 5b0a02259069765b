"""The smallest set of samples of each particle that carries a given fraction of its weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

# of the histogram of each row's log weights
BINS = 1024
# weights are summed as whole multiples of 1/UNIT, so that the order of the sums does not matter
UNIT = 2**40
# the kernel narrows a row's threshold this often, each time by EDGES: 24 nats to 2e-5
PASSES, EDGES = 4, 32


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
    """Normalise the rows of a ragged list and keep the significant entries, as :func:`significant_samples` has them.

    Parameters
    ----------
    log_weights
        `(b,)` real.
    first
        `(n + 1,)` int64: where each row begins, and the end; no row is empty.
    fraction
        RELION's adaptive_fraction.
    """
    if log_weights.is_cuda and log_weights.dtype == torch.float32:
        return _posterior_on_gpu(log_weights, first, fraction)
    n_rows = len(first) - 1
    rows = torch.repeat_interleave(torch.arange(n_rows, device=first.device), first.diff())
    top, log_total = row_logsumexp(log_weights, rows, n_rows)
    significant = significant_samples(log_weights, rows, log_total, fraction)
    probability = (log_weights.double() - log_total[rows]).exp().to(log_weights.dtype)
    return Posterior(
        torch.where(significant, probability, 0.0), top, log_total, first_best(log_weights, rows, top)
    )


def significant_of_rows(log_weights: Tensor, log_totals: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the significant entries of a matrix, as :func:`significant_samples` has them.

    Parameters
    ----------
    log_weights, log_totals
        `(n, c)` real, and `(n,)` float64 log of each row's whole weight.
    """
    floor = log_totals - _deepest(torch.full_like(log_totals, log_weights.shape[1]), fraction)
    row, column = torch.nonzero(log_weights > floor[:, None].to(log_weights.dtype), as_tuple=True)
    candidates = log_weights[row, column]
    if candidates.is_cuda and candidates.dtype == torch.float32:
        first = torch.searchsorted(row, torch.arange(len(log_weights) + 1, device=row.device))
        keep = _posterior_on_gpu(candidates, first, fraction).kept > 0
    else:
        keep = significant_samples(candidates, row, log_totals, fraction)
    return row[keep], column[keep]


def first_best(values: Tensor, rows: Tensor, top: Tensor) -> Tensor:
    """`(n,)`: place of the first largest value of each row of a ragged list, `top` being these values."""
    place = torch.arange(len(values), device=values.device)
    best = torch.full((len(top),), len(values), dtype=torch.int64, device=values.device)
    return best.scatter_reduce_(0, rows, torch.where(values == top[rows], place, len(values)), "amin")


def _deepest(counts: Tensor, fraction: float) -> Tensor:
    """Nats under a row's total from which on its `counts` samples together do not reach the rest of the fraction."""
    return torch.log(counts.clamp(min=1).double() / max((1 - fraction) * 1e-3, 1e-300))


def _posterior_on_gpu(log_weights: Tensor, first: Tensor, fraction: float) -> Posterior:
    from torchem.kernels.significant import posterior_kernel

    n, device = len(first) - 1, first.device
    kept = torch.empty_like(log_weights)
    top = torch.empty(n, dtype=torch.float32, device=device)
    log_total = torch.empty(n, dtype=torch.float64, device=device)
    best = torch.empty(n, dtype=torch.int64, device=device)
    deepest = _deepest(first.diff(), fraction).float()
    if n:
        posterior_kernel[(n,)](
            log_weights, first, kept, top, log_total, best, fraction, deepest,
            BLOCK=256, EDGES=EDGES, PASSES=PASSES, num_warps=4, num_stages=1,
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


def significant_samples(
    log_weights: Tensor, rows: Tensor, log_totals: Tensor, fraction: float
) -> Tensor:
    """Mark the significant samples of a ragged list of weights (RELION's adaptive oversampling, Scheres 2012 §2.3).

    The weights of a row are taken from the largest down until their sum exceeds ``fraction`` of the row's total;
    the last one taken is the threshold, and ties with it are kept.

    Parameters
    ----------
    log_weights, rows
        `(b,)` real and int64. Samples too small to matter may be missing from the list.
    log_totals
        `(n_rows,)` float64: log of each row's whole weight.
    fraction
        RELION's adaptive_fraction, 0.999.

    Returns
    -------
    `(b,)` bool.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be in (0, 1]")
    n_rows = len(log_totals)
    below = log_totals[rows] - log_weights  # nats under the row's total, >= 0 but for rounding
    # a sample that far down cannot be needed: all such samples of a row together do not reach the rest
    deepest = _deepest(torch.bincount(rows, minlength=n_rows), fraction)
    candidates = below <= deepest[rows]
    # find the bin of log weights in which the sum passes the fraction; only that bin is sorted
    width = (deepest / BINS)[rows]
    bins = rows * BINS + (below / width).long().clamp(0, BINS - 1)
    weights = (torch.exp(-below.double()) * UNIT).round().long()
    mass = torch.zeros(n_rows * BINS, dtype=torch.int64, device=rows.device)
    mass.index_add_(0, bins, torch.where(candidates, weights, 0))
    reached = torch.cumsum(mass.view(n_rows, BINS), 1)
    wanted = torch.full((n_rows, 1), round(fraction * UNIT), device=rows.device)
    crossing = torch.searchsorted(reached, wanted, right=True)[:, 0]
    crossing_bin = torch.arange(n_rows, device=rows.device) * BINS + crossing
    undecided = torch.nonzero(candidates & (bins == crossing_bin[rows]))[:, 0]
    undecided = undecided[torch.argsort(log_weights[undecided], descending=True, stable=True)]
    undecided = undecided[torch.argsort(rows[undecided], stable=True)]
    row = rows[undecided]
    weights = weights[undecided]
    before = torch.cumsum(weights, 0) - weights
    counts = torch.bincount(row, minlength=n_rows)
    first = torch.cumsum(counts, 0) - counts
    above = torch.where(crossing > 0, reached.gather(1, (crossing - 1).clamp(min=0)[:, None])[:, 0], 0)
    taken = before - before[first[row]] + above[row] <= wanted[row, 0]
    threshold = torch.full((n_rows,), torch.inf, dtype=log_weights.dtype, device=rows.device)
    threshold.scatter_reduce_(0, row, torch.where(taken, log_weights[undecided], torch.inf), "amin")
    return candidates & ((bins < crossing_bin[rows]) | (log_weights >= threshold[rows]))
