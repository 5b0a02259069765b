"""The row-wise arg-maximum against PyTorch."""

import pytest
import torch

from torchem.ops.row_argmax import row_argmax

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("columns", [1, 63, 512, 1537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_row_argmax(n: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    # whole numbers, so that there are ties
    table = torch.randint(-50, 0, (n, columns), generator=generator).to(DEVICE, dtype)
    expected = table.max(1)
    for backend in ("triton", "reference"):
        values, place = row_argmax(table, backend)
        assert torch.equal(values, expected.values)
        assert torch.equal(table.gather(1, place[:, None])[:, 0], values)
        assert all(not (row[:first] == row[first]).any() for row, first in zip(table, place.tolist(), strict=True))


def test_rows_of_minus_infinity_and_none() -> None:
    values, place = row_argmax(torch.full((2, 7), -torch.inf, device=DEVICE), "triton")
    assert (values == -torch.inf).all() and (place == 0).all()
    assert row_argmax(torch.zeros((0, 7), device=DEVICE), "triton")[0].shape == (0,)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="columns"):
        row_argmax(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="backend"):
        row_argmax(torch.zeros(3, 1), "cuda")
