"""Matrix products and threads on a CPU."""

from collections.abc import Iterator

import pytest
import torch

from torchem.runtime import cpu
from torchem.runtime.cpu import allow_fast_products, side_by_side

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason="this PyTorch does not let oneDNN choose how to multiply",
)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("shape", [(1, 40, 63), (63, 616, 1000), (257, 3000, 9), (1000, 84, 616)])
def test_products_stay_exact(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn((m, k), generator=generator), torch.randn((n, k), generator=generator)
    allow_fast_products()
    expected = a.double() @ b.double().T
    assert float((a @ b.T - expected).abs().max()) < 1e-5 * k**0.5


@pytest.mark.parametrize("large", [64, 1000])
def test_a_cpu_that_would_round_keeps_its_products(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    equal = torch.equal
    monkeypatch.setattr(cpu, "_made_by_amd", lambda: True)
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(torch, "equal", lambda a, b: len(a) < large and equal(a, b))
    allow_fast_products()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("threads", [1, 2, 20])
def test_parts_come_back_in_their_order(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert side_by_side(lambda part: part * part, range(50)) == [i * i for i in range(50)]
    assert side_by_side(str, []) == []
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda part: 1 // part, [1, 0])
    monkeypatch.undo()
    assert torch.get_num_threads() == before
