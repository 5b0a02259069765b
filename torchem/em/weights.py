"""Fine-pass weights in blocks: one index for the fine children of a significant sample (Zhang et al. 2018, §4).

Rows are the particles of a batch, a block is 1 × O: the 8^o orientation times 4^o translation children of one coarse
sample (32 at oversampling 1, orientations first). A block's column is orientation · T + translation.
"""

import warnings

import torch
from torch import Tensor

from torchem.ops.significant import row_starts

warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")


def block_sparse(rows: Tensor, columns: Tensor, values: Tensor, n_rows: int, n_columns: int) -> Tensor:
    """The `torch.sparse_bsr_tensor` of fine weights; ``values`` is aliased, not copied.

    Parameters
    ----------
    rows, columns
        `(b,)` int64, sorted by row, then column.
    values
        `(b, O)`.
    n_rows, n_columns
        particles, and coarse samples a particle.

    Returns
    -------
    sparse `(n_rows, n_columns · O)`; indices are int32 where they fit.
    """
    block = values.shape[1]
    largest = max(n_columns * block, len(rows))
    index = torch.int32 if largest < 2**31 else torch.int64
    return torch.sparse_bsr_tensor(
        row_starts(rows, n_rows).to(index), columns.to(index), values[:, None], size=(n_rows, n_columns * block),
        check_invariants=False,
    )  # fmt: skip
