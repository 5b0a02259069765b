"""Block-sparse weights are dense weights with most blocks left out."""

import pytest
import torch

from torchem.em.weights import block_sparse


@pytest.mark.parametrize("block", [1, 8, 32])
@pytest.mark.parametrize("n_rows", [1, 5])
def test_block_sparse_is_dense(block: int, n_rows: int) -> None:
    generator = torch.Generator().manual_seed(block)
    n_columns = 23
    present = torch.rand((n_rows, n_columns), generator=generator) < 0.2
    if n_rows > 1:
        present[2] = False  # a particle may have no block in a part
    rows, columns = torch.nonzero(present, as_tuple=True)
    values = torch.rand((len(rows), block), generator=generator)
    sparse = block_sparse(rows, columns, values, n_rows, n_columns)
    dense = torch.zeros((n_rows, n_columns, block))
    dense[rows, columns] = values
    assert torch.equal(sparse.to_dense(), dense.flatten(1))
    assert torch.equal(torch.repeat_interleave(sparse.crow_indices().diff()), rows)
    # what is done to the values is done to the matrix
    values *= 2
    assert torch.equal(sparse.to_dense(), 2 * dense.flatten(1))


def test_invariants_and_index_types() -> None:
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([1, 6, 3])
    small = block_sparse(rows, columns, torch.ones(3, 32), 3, 7)
    assert small.layout == torch.sparse_bsr
    assert small.col_indices().dtype == small.crow_indices().dtype == torch.int32
    torch._validate_sparse_bsr_tensor_args(small.crow_indices(), small.col_indices(), small.values(), small.shape)
    # 3.2e9 columns, as at order 7, need longer indices
    large = block_sparse(rows, columns, torch.ones(3, 32), 3, 10**8)
    assert large.col_indices().dtype == torch.int64
    assert large.shape == (3, 32 * 10**8)
