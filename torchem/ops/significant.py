"""The smallest set of samples of each particle that carries a given fraction of its weight."""

import torch
from torch import Tensor

# of the histogram of each row's log weights
BINS = 1024
# weights are summed as whole multiples of 1/UNIT, so that the order of the sums does not matter
UNIT = 2**40


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
    counts = torch.bincount(rows, minlength=n_rows).clamp(min=1)
    deepest = torch.log(counts / max((1 - fraction) * 1e-3, 1e-300))
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
