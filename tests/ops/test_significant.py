"""The significant samples against a plain sort."""

from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchem.ops import significant
from torchem.ops.significant import posterior, row_logsumexp, significant_of_rows


def sorted_set(log_weights: np.ndarray, log_total: float, fraction: float) -> np.ndarray:
    """From the largest down until the sum exceeds the fraction; ties with the last one stay."""
    weights = np.exp(log_weights - log_total)
    descending = np.sort(weights)[::-1]
    enough = np.flatnonzero(np.cumsum(descending) > fraction)
    return weights >= (descending[enough[0]] if len(enough) else 0)


def by_rows(rows: list[list[float]], fraction: float = 0.999, dtype: torch.dtype = torch.float64) -> list[list[bool]]:
    """The marks of a ragged list."""
    sizes = [len(row) for row in rows]
    first = torch.tensor([0, *accumulate(sizes)])
    found = posterior(torch.tensor([v for row in rows for v in row], dtype=dtype), first, fraction)
    return [part.tolist() for part in (found.kept > 0).split(sizes)]


def test_takes_the_heaviest_until_the_fraction_is_passed() -> None:
    weights = np.log([0.5, 0.3, 0.15, 0.05])
    for fraction, count in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4)):
        assert sum(by_rows([weights.tolist()], fraction)[0]) == count


def test_ties_with_the_last_one_are_kept() -> None:
    assert by_rows([np.log([0.4, 0.2, 0.2, 0.2]).tolist()], 0.5) == [[True] * 4]
    assert by_rows([[0.0] * 5000]) == [[True] * 5000]
    assert by_rows([[3.0] * 7 + [-40.0]]) == [[True] * 7 + [False]]


def test_single_samples_and_the_impossible() -> None:
    assert by_rows([[-1234.5]]) == [[True]]
    assert by_rows([[-7.0], [2.0, -torch.inf]]) == [[True], [True, False]]
    # a sample that is alone with its weight is enough, however deep the others
    assert by_rows([[0.0, -50.0, -700.0, -80000.0]]) == [[True, False, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_kept_for_a_fraction_of_one(dtype: torch.dtype) -> None:
    assert by_rows([[0.0, -5.0, -30.0], [2.0], [-1.0, 4.0]], 1.0, dtype) == [[True] * 3, [True], [True] * 2]


@pytest.mark.parametrize("fraction", [0.5, 0.999])
def test_rows_of_a_matrix(fraction: float) -> None:
    values = 30 * torch.randn((5, 400), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row, column = significant_of_rows(values, torch.logsumexp(values, 1), fraction)
    marks = torch.zeros(values.shape, dtype=torch.bool)
    marks[row, column] = True
    assert marks.tolist() == by_rows(values.tolist(), fraction)


@pytest.mark.parametrize("block", [1, 100, 2**16])
def test_what_each_row_amounts_to(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significant, "BLOCK", block)
    sizes = [3, 1, 90, 300, 40]
    values = 5 * torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = posterior(values, torch.tensor([0, *accumulate(sizes)]), 0.9)
    for i, (row, kept) in enumerate(zip(values.split(sizes), found.kept.split(sizes), strict=True)):
        assert float(found.log_total[i]) == pytest.approx(float(torch.logsumexp(row, 0)), rel=1e-12)
        assert float(found.top[i]) == float(row.max()) == float(values[found.best[i]])
        assert torch.allclose(kept[kept > 0], row.softmax(0)[kept > 0], rtol=1e-12)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_fraction_out_of_bounds(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        posterior(torch.zeros(1), torch.tensor([0, 1]), fraction)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.floats(1e-3, 60.0), st.booleans(), st.integers(0, 2**31)),
        min_size=1, max_size=5,
    ),
    st.sampled_from([0.5, 0.9, 0.999, 0.99999]),
    st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_agrees_with_a_plain_sort(kinds: list, fraction: float, dtype: torch.dtype) -> None:
    rows = []
    for size, spread, rounded, seed in kinds:
        values = np.random.default_rng(seed).normal(-1e3, spread, size)
        # rounding makes ties
        rows.append((np.round(values) if rounded else values).astype(str(dtype).removeprefix("torch.")).tolist())
    found = by_rows(rows, fraction, dtype)
    for values, marks in zip(rows, found, strict=True):
        values = np.array(values)
        top = values.max()
        total = top + np.log(np.exp(values - top).sum())
        expected, marks = sorted_set(values, total, fraction), np.array(marks)
        # where a sum meets the fraction to the last digit, either answer is right
        ordered = np.sort(np.exp(values - total))[::-1]
        if np.abs(np.cumsum(ordered) - fraction).min() > (1e-12 if dtype == torch.float64 else 1e-6):
            assert (marks == expected).all()
        assert np.exp(values - total)[marks].sum() > fraction - 1e-6
        assert values[marks].min() >= values[~marks].max(initial=-np.inf)


def test_row_logsumexp() -> None:
    values = torch.tensor([1.0, -2.0, 1000.0, 1000.0, -torch.inf], dtype=torch.float64)
    rows = torch.tensor([0, 0, 2, 2, 2])
    top, total = row_logsumexp(values, rows, 4)
    assert top.tolist() == [1.0, -torch.inf, 1000.0, -torch.inf]
    expected: list[Tensor] = [torch.logsumexp(values[rows == i], 0) for i in (0, 2)]
    assert total[[0, 2]].tolist() == pytest.approx([float(e) for e in expected], rel=1e-14)
    assert total.dtype == torch.float64
    # a row that nothing was listed for weighs nothing
    assert float(total[1]) == float(total[3]) == -torch.inf
