"""Triton kernel for the row-wise arg-maximum.

Fixed threads stride a row of any length, coalesced, each with its own maximum, then a tree (Chung et al. 2021).
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("n_rows",))
def row_argmax(table, values, indices, n_rows, n_columns, THREADS: tl.constexpr):
    """Largest value of each row and its first column; program: a row, THREADS columns at a time, coalesced."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, THREADS)
    top = tl.full((THREADS,), float("-inf"), table.dtype.element_ty)
    place = tl.zeros((THREADS,), tl.int64) + lane
    for start in range(0, n_columns, THREADS):
        column = start + lane
        value = tl.load(table + row * n_columns + column, column < n_columns, other=float("-inf"))
        better = value > top
        top = tl.where(better, value, top)
        place = tl.where(better, column.to(tl.int64), place)
    highest = tl.max(top, 0)
    # of equal ones the first
    first = tl.min(tl.where(top == highest, place, n_columns), 0)
    tl.store(values + row, highest)
    tl.store(indices + row, first)
