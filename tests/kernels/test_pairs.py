"""The kernels for pairs of an image and an orientation against the PyTorch reference in double precision."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torchem.imaging.symmetry import rotation_matrix
from torchem.ops import pairs
from torchem.ops.pairs import Operands
from torchem.ops.slices import Slices

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PADDING = 2


class Problem:
    """m pairs of n images and u orientations in k volumes, t shifts; what lies beyond r_max is left out."""

    def __init__(self, m: int, n: int, u: int, t: int, size: int, k: int = 2) -> None:
        generator = torch.Generator().manual_seed(m + 7 * n + u + t + size)

        def normal(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        def whole(high: int, count: int) -> Tensor:
            return torch.randint(0, high, (count,), generator=generator)

        r_max = size // 2
        half = PADDING * r_max + 1
        kx, ky = (a.flatten().double() for a in torch.meshgrid(
            torch.arange(r_max + 1), torch.arange(-r_max, r_max + 1), indexing="ij"
        ))  # fmt: skip
        p = len(kx)
        angles = 360 * torch.rand((3, u), generator=generator, dtype=torch.float64)
        self.slices = Slices(
            normal(k, 2 * half + 1, 2 * half + 1, half + 1), whole(k, u), rotation_matrix(*angles), kx, ky, PADDING,
            r_max,
        )  # fmt: skip
        self.orientation, self.which = whole(u, m), whole(n, m)
        self.images, self.weights = normal(n, p), normal(n, p, dtype=torch.float64).square()
        turns = normal(t, p, dtype=torch.float64)
        self.phases = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
        self.power = 1 + normal(n, dtype=torch.float64).square()
        self.probability = torch.rand((m, t), generator=generator, dtype=torch.float64)
        self.operands = Operands(
            normal(n, p), normal(n, p, dtype=torch.float64).square(), normal(n, p),
            normal(n, p, dtype=torch.float64).square(), 0.5 + torch.rand(n, generator=generator).double(),
            (torch.rand(p, generator=generator) < 0.5).double(),
        )  # fmt: skip

    def single(self) -> "Problem":
        """The same in single precision, on the device."""
        other = Problem.__new__(Problem)
        for name, value in vars(self).items():
            setattr(other, name, _single(value))
        return other


def _single(value: object) -> object:
    if isinstance(value, Tensor):
        narrow = {torch.float64: torch.float32, torch.complex128: torch.complex64}
        return value.to(DEVICE, narrow.get(value.dtype, value.dtype))
    return replace(value, **{
        name: _single(part) for name, part in vars(value).items() if isinstance(part, Tensor)
    })  # fmt: skip


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert torch.linalg.norm(found.cpu().to(expected.dtype) - expected) <= tolerance * torch.linalg.norm(expected)


SIZES = [(1, 1, 1, 1, 4), (37, 5, 7, 9, 8), (33, 3, 40, 17, 6), (20, 4, 3, 65, 6)]


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scores(sizes: tuple[int, ...], correlation: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = Problem(*sizes)

    def scores(x: Problem) -> Tensor:
        power = x.power if correlation else None
        return pairs.score_pairs(x.slices, x.orientation, x.which, x.images, x.weights, x.phases, power, 2**12)

    expected = scores(x)
    monkeypatch.setattr(Slices, "on_gpu", True)
    assert_close(scores(x.single()), expected)


def test_scores_of_half_precision_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = Problem(37, 5, 7, 9, 8)
    x.slices = replace(x.slices, volumes=1e-4 * x.slices.volumes)

    def scores(x: Problem, half: bool) -> Tensor:
        return pairs.score_pairs(x.slices, x.orientation, x.which, x.images, x.weights, x.phases, None, 2**12, half)

    expected = scores(x, False)
    monkeypatch.setattr(Slices, "on_gpu", True)
    assert_close(scores(x.single(), True), expected, 5e-4)
    assert torch.linalg.norm(scores(x.single(), True).cpu() - expected) > 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums(sizes: tuple[int, ...], deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = Problem(*sizes)

    def sums(x: Problem) -> tuple[Tensor, ...]:
        data = torch.ones_like(x.slices.volumes)
        weight = torch.ones_like(data.real)
        return data, weight, *pairs.add_pairs(
            x.slices, x.orientation, x.which, x.probability, x.phases, x.operands, data, weight, 2**12
        )  # fmt: skip

    expected = sums(x)
    monkeypatch.setattr(Slices, "on_gpu", True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    for mine, double in zip(sums(x.single()), expected, strict=True):
        assert_close(mine, double)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", [4, 9])
def test_insertion(size: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = Problem(1, 1, 37, 1, size)
    generator = torch.Generator().manual_seed(size)
    shape = len(x.slices), len(x.slices.kx)
    values = torch.randn(shape, generator=generator, dtype=torch.complex128)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)

    def inserted(slices: Slices, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        data = torch.ones_like(slices.volumes)
        weight = torch.ones_like(data.real)
        slices.insert(data, weight, values, weights)
        return data, weight

    expected = inserted(x.slices, values, weights)
    monkeypatch.setattr(Slices, "on_gpu", True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    found = inserted(x.single().slices, _single(values), _single(weights))
    for mine, double in zip(found, expected, strict=True):
        assert_close(mine, double)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="NumPy's products, which the interpreter uses, depend on the order")
def test_deterministic_sums_do_not_depend_on_the_order_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = Problem(40, 5, 7, 9, 6).single()
    monkeypatch.setattr(Slices, "on_gpu", True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    found = []
    for order in (torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(1))):
        order = order.to(DEVICE)
        data = torch.zeros_like(x.slices.volumes)
        weight = torch.zeros_like(data.real)
        residual, _ = pairs.add_pairs(
            x.slices, x.orientation[order], x.which[order], x.probability[order], x.phases, x.operands, data, weight,
            2**12,
        )  # fmt: skip
        found.append((data, weight, residual))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
