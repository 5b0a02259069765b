"""Pairs of an image and an orientation on a CPU: image by image is as pair by pair."""

import pytest
import torch
from torch import Tensor

from tests.kernels.test_pairs import SIZES, Problem
from torchem.ops import pairs

THREADS = pytest.mark.parametrize("threads", [1, 3])


@pytest.fixture(autouse=True)
def _threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


@THREADS
@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("chunk", [1, 2**12], ids=["cut when needed", "cut once"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scores(sizes: tuple[int, ...], chunk: int, correlation: bool) -> None:
    x = Problem(*sizes)
    given = x.slices, x.orientation, x.which, x.images, x.weights, x.phases, x.power if correlation else None
    assert torch.allclose(pairs._score_on_cpu(*given, chunk), pairs._score_by_slice(*given, 2**12), rtol=1e-11)


@THREADS
@pytest.mark.parametrize("block", [1, 2**19])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums(sizes: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "ADDED_BLOCK", block)
    x = Problem(*sizes)

    def sums(broad: bool) -> tuple[Tensor, ...]:
        data = torch.ones_like(x.slices.volumes)
        weight = torch.ones_like(data.real)
        given = x.slices, x.orientation, x.which, x.probability, x.phases, x.operands, data, weight, 2**12
        assert len(x.which) <= len(x.images) * len(x.phases)  # else add_pairs takes the same way
        return data, weight, *(pairs._add_on_cpu if broad else pairs.add_pairs)(*given)

    for one, other in zip(sums(True), sums(False), strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-11 * float(other.abs().max()))
