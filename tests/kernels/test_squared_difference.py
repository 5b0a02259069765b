"""The kernels against the PyTorch reference in float64."""

import math

import pytest
import torch
from torch import Tensor

from torchem.ops.squared_difference import (
    LADDER,
    PRECISIONS,
    LogWeights,
    Tiling,
    choose_precision,
    log_weights,
    plain_squared_difference,
    prepare_projections,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the interpreter adds up to infinity, too
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in add")
BY_KERNELS = [name for name in PRECISIONS if name != "fp64"]
SMALL = Tiling(32, 32, 32, 16)
# n, k, r of a class, t, p
SIZES = [(1, 1, 1, 1, 1), (3, 1, 63, 5, 63), (2, 2, 33, 7, 257), (1, 1, 257, 1, 65), (18, 1, 17, 1, 33)]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out unwritten holds NaN."""
    empty = torch.empty

    def poisoned(*arguments: object, **options: object) -> Tensor:
        return empty(*arguments, **options).fill_(math.nan)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", poisoned)


def problem(n: int, k: int, r: int, t: int, p: int, power: float = 300.0) -> dict[str, Tensor]:
    """Images that are one of the projections plus noise; Σ|C·P/σ|² is about ``power``."""
    generator = torch.Generator().manual_seed(n + k + r + t + p)

    def normal(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    sigma = normal(p).exp()
    angles = normal(t, p)
    angles[0] = 0
    ctf = torch.cos(3 * normal(n, p))
    projections = normal(k * r, p, dtype=torch.complex128)
    projections *= (power / (ctf[0].square() * projections[0].abs().square()).sum()).sqrt() * sigma
    images = ctf * projections[0] + normal(n, p, dtype=torch.complex128) * 2**0.5 * sigma
    x = {
        "ctf": ctf, "sigma": sigma, "raw": images, "projections": projections,
        "images": images * ctf / sigma**2, "weights": (ctf / sigma) ** 2,
        "phases": torch.polar(torch.ones(t, p).double(), angles),
        "orientation_prior": normal(k * r), "offset_prior": normal(n, k, t),
        "constant": -0.5 * (images.abs() / sigma).square().sum(1), "power": images.abs().square().sum(1),
    }  # fmt: skip
    return {name: value.to(DEVICE) for name, value in x.items()}


def single(x: Tensor) -> Tensor:
    return x.to(torch.complex64 if x.is_complex() else torch.float32)


def run(
    x: dict[str, Tensor], k: int, precision: str, backend: str, correlation: bool, constant: bool = False
) -> LogWeights:
    """The op in float64 by PyTorch or in float32 by the kernels."""
    reference = backend != "triton"
    images, weights, phases, projections = (
        x[name] if reference else single(x[name]) for name in ("images", "weights", "phases", "projections")
    )
    tiling = SMALL if DEVICE.type == "cpu" else None
    if correlation:
        ready = prepare_projections(projections, precision, None, k, backend)
        return log_weights(images, weights, ready, phases, power=x["power"], tiling=tiling)
    ready = prepare_projections(projections, precision, 1 / x["sigma"], k, backend)
    return log_weights(
        images, weights, ready, phases, x["orientation_prior"], x["offset_prior"],
        constant=x["constant"] if constant else None, tiling=tiling,
    )  # fmt: skip


def bound(x: dict[str, Tensor], precision: str) -> float:
    """Five standard deviations of what rounding both operands changes, and the rounding of the largest sums."""
    steps = {"fp16": 2**-11, "split": 2**-11, "three": 2**-21, "tf32": 2**-10, "fp32": 2**-23}
    power = float((x["weights"] @ x["projections"].abs().square().T).max())
    p = x["images"].shape[1]
    operand = math.sqrt((power + 2 * p) * power / p) + math.sqrt(power)  # of a sum of rounding errors, for step 1
    return 5 * steps[precision] * operand + 2**-21 * (power + 2 * p) + 1e-5


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("precision", BY_KERNELS)
def test_log_weights(sizes: tuple[int, int, int, int, int], precision: str) -> None:
    x = problem(*sizes)
    expected = run(x, sizes[1], precision, "reference", correlation=False)
    found = run(x, sizes[1], precision, "triton", correlation=False)
    assert found.values.shape == expected.values.shape == (sizes[0], sizes[3], sizes[1] * sizes[2])
    tolerance = bound(x, precision)
    assert float((found.values.double() - expected.values).abs().max()) <= tolerance
    assert torch.allclose(found.log_total(), expected.log_total(), atol=tolerance)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("precision", BY_KERNELS)
def test_correlation(sizes: tuple[int, int, int, int, int], precision: str) -> None:
    x = problem(*sizes)
    expected = run(x, sizes[1], precision, "reference", correlation=True)
    found = run(x, sizes[1], precision, "triton", correlation=True)
    half = PRECISIONS[precision].mode == "tf32" and precision != "three"
    assert float((found.values.double() - expected.values).abs().max()) <= (2e-3 if half else 2e-6)
    assert torch.allclose(found.tile_max.amax(), found.values.amax(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", BY_KERNELS)
def test_constant_is_added(precision: str) -> None:
    x = problem(3, 1, 63, 5, 63)
    expected = run(x, 1, precision, "reference", correlation=False, constant=True)
    found = run(x, 1, precision, "triton", correlation=False, constant=True)
    assert float((found.values.double() - expected.values).abs().max()) <= bound(x, precision)


@pytest.mark.parametrize("power", [10.0, 300.0, 1e4, 1e6])
def test_chosen_precision(power: float) -> None:
    """Log weights within 20 of the best, across orientations and shifts: what the ladder promises."""
    n, r, t, p = 2, 257, 2, 257
    x = problem(n, 1, r, t, p, power)
    generator = torch.Generator().manual_seed(1)
    # others hardly differ from the first
    spread = torch.linspace(0, 30, r)[:, None].double() / p
    noise = torch.randn((r, p), generator=generator, dtype=torch.complex128)
    x["projections"] = (x["projections"][:1].cpu() + noise * spread.sqrt() * x["sigma"].cpu()).to(DEVICE)
    angles = torch.randn(p, generator=generator, dtype=torch.float64) * (20 / power) ** 0.5
    x["phases"][1] = torch.polar(torch.ones_like(angles), angles)
    x = {name: value if name in ("constant", "sigma") else single(value).to(value.dtype) for name, value in x.items()}
    precision = choose_precision(float((x["weights"] @ x["projections"].abs().square().T).max()))
    expected = run(x, 1, "fp32", "reference", correlation=False, constant=True).values.flatten(1)
    found = run(x, 1, precision, "triton", correlation=False, constant=True).values.flatten(1).double()
    best = expected.argmax(1, keepdim=True)
    near = expected > expected.gather(1, best) - 20
    assert near.sum() > 100
    error = (found - found.gather(1, best) - (expected - expected.gather(1, best)))[near]
    assert float(error.square().mean().sqrt()) <= 0.02


def test_norms_by_half_precision_products() -> None:
    """High and low terms keep what float32 would."""
    x = problem(3, 2, 33, 1, 257, 1e4)
    ready = prepare_projections(single(x["projections"]), "split", 1 / x["sigma"], 2, "triton")
    assert ready.terms is not None and ready.squares is not None and ready.unit is not None
    weights = x["weights"] * x["sigma"] ** 2
    power = ready.terms.double().unflatten(1, (2, -1)).square().sum(1)[:, :257]
    expected = 0.5 * weights @ power.T
    high = weights.half()
    terms = torch.cat([high, (weights - high).half()]).double()
    high, low = (part[:, :257].double() for part in ready.squares.chunk(2, dim=1))
    norms = (terms @ (high + low).T * ready.unit.double()).unflatten(0, (2, -1)).sum(0)
    assert float((norms - expected).abs().max()) <= 2**-21 * float(expected.max())


@pytest.mark.parametrize("correlation", [False, True])
def test_matrix_products(correlation: bool) -> None:
    x = problem(2, 2, 33, 7, 65)
    expected = run(x, 2, "fp32", "reference", correlation)
    found = run(x, 2, "fp32", "matmul", correlation)
    for name in ("values", "tile_max", "tile_sum"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


def test_tile_sums_survive_impossible_orientations() -> None:
    x = problem(1, 1, 63, 5, 63)
    x["orientation_prior"][:40] = -math.inf
    found = run(x, 1, "fp16", "triton", correlation=False)
    assert bool((found.values[..., :40] == -math.inf).all()) and bool(found.values[..., 40:].isfinite().all())
    assert not torch.isnan(found.tile_sum).any()
    assert torch.allclose(found.log_total(), torch.logsumexp(found.values.double().flatten(1), 1), atol=1e-4)


@pytest.mark.parametrize("tiled", [False, True])
def test_plain(tiled: bool) -> None:
    x = problem(2, 1, 9 if DEVICE.type == "cpu" else 257, 3, 65)
    images, ctf = x["raw"] / x["sigma"], x["ctf"] / x["sigma"]
    model = (ctf[:, None] * x["projections"])[:, None]
    expected = -0.5 * ((images[:, None] * x["phases"])[:, :, None] - model).abs().square().sum(-1)
    found = plain_squared_difference(*map(single, (images, ctf, x["projections"], x["phases"])), tiled=tiled)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_ladder() -> None:
    assert [choose_precision(x) for x in (0, 400, 401, 1e4, 1e5, math.inf)] == [
        "fp16", "fp16", "split", "three", "fp64", "fp64",
    ]  # fmt: skip
    assert set(LADDER) <= set(PRECISIONS)
    with pytest.raises(ValueError, match="nan"):
        choose_precision(math.nan)


def test_bad_arguments() -> None:
    x = problem(2, 1, 3, 3, 5)
    ready = prepare_projections(x["projections"], backend="matmul")
    operands = x["images"], x["weights"], ready, x["phases"]
    with pytest.raises(ValueError, match="phases"):
        log_weights(*operands[:3], x["phases"][:, :2], x["orientation_prior"], x["offset_prior"])
    with pytest.raises(ValueError, match="offset_prior"):
        log_weights(*operands, x["orientation_prior"])
    with pytest.raises(ValueError, match="no priors"):
        log_weights(*operands, x["orientation_prior"], x["offset_prior"], x["power"])
    with pytest.raises(ValueError, match="precision"):
        prepare_projections(x["projections"], "fp8")
    with pytest.raises(ValueError, match="classes"):
        prepare_projections(x["projections"], n_classes=2)
