"""The smallest set of samples of each particle that carries a given fraction of its weight."""

import torch
from torch import Tensor


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
    # below this, all samples of a row together cannot reach the threshold: only the others are sorted
    counts = torch.bincount(rows, minlength=len(log_totals))
    floor = log_totals + torch.log((1 - fraction) * 1e-3 / counts.clamp(min=1))
    candidates = torch.nonzero(log_weights >= floor[rows])[:, 0]
    kept_rows, values = rows[candidates], log_weights[candidates]
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(kept_rows[order], stable=True)]
    sorted_rows, sorted_values = kept_rows[order], values[order]
    weights = (sorted_values.double() - log_totals[sorted_rows]).exp()
    before = torch.cumsum(weights, 0) - weights
    counts = torch.bincount(kept_rows, minlength=len(log_totals))
    first = torch.cumsum(counts, 0) - counts
    before = before - before[first[sorted_rows]]
    taken = torch.where(before <= fraction, sorted_values, torch.inf)
    threshold = torch.full((len(log_totals),), torch.inf, dtype=log_weights.dtype, device=log_weights.device)
    threshold.scatter_reduce_(0, sorted_rows, taken, "amin")
    return log_weights >= threshold[rows]
