"""Row-wise arg-maximum of a table, where a whole table is asked for (the search itself never writes one)."""

import torch
from torch import Tensor


def row_argmax(table: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Largest value of every row, and the first column that has it.

    Parameters
    ----------
    table
        `(n, columns)` real, without NaN.
    backend
        "triton" or "reference"; by default Triton on a GPU.

    Returns
    -------
    `(n,)` values and `(n,)` int64 columns.
    """
    if table.ndim != 2 or table.shape[1] < 1:
        raise ValueError(f"the table is {tuple(table.shape)}, not (n, columns) with at least one column")
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend is {backend!r}; it must be triton or reference")
    if backend == "reference" or (backend is None and not table.is_cuda):
        values = table.amax(1)
        return values, (table == values[:, None]).int().argmax(1)
    from torchem.kernels.row_argmax import row_argmax as kernel

    table = table.contiguous()
    values = torch.empty(len(table), dtype=table.dtype, device=table.device)
    columns = torch.empty(len(table), dtype=torch.int64, device=table.device)
    if len(table):
        kernel[(len(table),)](table, values, columns, len(table), table.shape[1], THREADS=512, num_warps=4)
    return values, columns
