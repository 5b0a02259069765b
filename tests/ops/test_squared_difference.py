"""Scores against the sums that they stand for."""

import math

import pytest
import torch
from torch import Tensor

from torchem.benchmarks import squared_difference as bench
from torchem.ops.squared_difference import CPU_LADDER, choose_precision, score, score_pairs
from torchem.runtime.cpu import allow_fast_products


def problem(n: int, r: int, t: int, p: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + r + t + p)

    def normal(*size: int, dtype: torch.dtype = torch.complex128) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    return {
        "images": normal(n, p),
        "ctf": normal(n, p, dtype=torch.float64),
        "inverse_sigma2": normal(p, dtype=torch.float64).square(),
        "projections": normal(r, p),
        "phases": torch.polar(torch.ones(t, p).double(), 2 * math.pi * normal(t, p, dtype=torch.float64)),
    }


def operands(x: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    c = dtype.to_complex()
    return (
        (x["images"] * x["ctf"] * x["inverse_sigma2"]).to(c), (x["ctf"].square() * x["inverse_sigma2"]).to(dtype),
        x["projections"].to(c), x["phases"].to(c),
    )  # fmt: skip


def distances(x: dict[str, Tensor]) -> Tensor:
    """`(n, r, t)`: minus half the weighted squared distance, written out."""
    shifted = x["images"][:, None, None] * x["phases"]
    model = (x["ctf"][:, None] * x["projections"])[:, :, None]
    return -0.5 * ((shifted - model).abs().square() * x["inverse_sigma2"]).sum(-1)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 5, 4, 63), (2, 63, 1, 257)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_score_is_minus_half_the_squared_distance(sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x = problem(*sizes)
    of_image = -0.5 * (x["images"].abs().square() * x["inverse_sigma2"]).sum(-1)
    found = score(*operands(x, dtype)).double() + of_image[:, None, None]
    assert found.shape == sizes[:3]
    assert torch.allclose(found, distances(x), atol=tolerance)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 5, 4, 63), (2, 63, 1, 257)])
def test_correlation(sizes: tuple[int, ...]) -> None:
    x = problem(*sizes)
    images, ctf, power = x["images"], x["ctf"], x["images"].abs().square().sum(1)
    found = score(images * ctf, ctf.square(), x["projections"], x["phases"], power)
    model = ctf[:, None] * x["projections"]
    cross = (model[:, :, None].conj() * images[:, None, None] * x["phases"]).real.sum(-1)
    expected = cross / (model.abs().square().sum(-1) * power[:, None]).sqrt()[..., None]
    assert torch.allclose(found, expected, atol=1e-12)
    assert float(found.abs().max()) <= 1 + 1e-12


@pytest.mark.parametrize("with_power", [False, True])
def test_pairs_score_as_all_do(with_power: bool) -> None:
    x = problem(4, 6, 5, 63)
    images, weights, projections, phases = operands(x)
    power = x["images"].abs().square().sum(1) if with_power else None
    every = score(images, weights, projections, phases, power)
    chosen = torch.tensor([[0, 3], [5, 5], [1, 0], [2, 4]])
    found = score_pairs(images, weights, projections[chosen], phases, power)
    assert torch.allclose(found, torch.stack([every[i, chosen[i]] for i in range(4)]), atol=1e-12)


@pytest.mark.parametrize("power", [10.0, 300.0, 8e3, 1e6])
def test_precision_chosen_on_a_cpu(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log weights within 20 of the best: what the ladder promises, with the products that a refinement uses."""
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    allow_fast_products()
    x = bench.single(bench.problem(32, 2, 1024, 1400, power, spread=20.0, double=True))
    double = {name: value.to(torch.promote_types(value.dtype, torch.float64)) for name, value in x.items()}
    largest = float((x["ctf2"] @ x["projections"].abs().square().T).max())
    precision = choose_precision(largest, CPU_LADDER)
    assert precision == ("fp64" if power > 1e4 else "fp32")
    expected = bench.scores(double, bench.prepared(double, "fp32")).values.flatten(1)
    found = bench.scores(x, bench.prepared(x, precision)).values.flatten(1).double()
    best = expected.argmax(1, keepdim=True)
    near = expected > expected.gather(1, best) - 20
    error = (found - found.gather(1, best) - (expected - expected.gather(1, best)))[near].abs()
    assert float(error.square().mean().sqrt()) <= 0.02
    assert float(error.quantile(0.999)) <= 0.07
