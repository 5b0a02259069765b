"""Squared difference: parity, rates, errors of log weights, tiled against untiled.

``python -m torchem.benchmarks.squared_difference`` does all of it at the sizes of a refinement, on a GPU.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchem.benchmarks.measure import DEVICE, Case, peak_mb, require_parity, seconds, table
from torchem.errors import InputError
from torchem.ops.squared_difference import (
    PRECISIONS,
    LogWeights,
    Projections,
    choose_precision,
    log_weights,
    plain_squared_difference,
    prepare_projections,
)

# particles × shifts × orientations × complex pixels
SHAPES = ((64, 29, 36864, 1400), (256, 21, 4608, 6400), (64, 21, 1152, 190), (64, 37, 9216, 693))
POWERS = (10.0, 300.0, 1e4, 1e6)
IMAGE_SIZES = (32, 64, 128, 256)
# particles, box, orientations, shifts of a coarse pass at order 3, or what two cores do in a second
SIZES = {"cuda": (64, 42, 9216, 37), "cpu": (4, 22, 1152, 21)}
REPEATS, PLOTTED = 5, ("tflops", "of_lower")


def problem(
    n: int, t: int, r: int, p: int, power: float = 300.0, spread: float | None = None, double: bool = False
) -> dict[str, Tensor]:
    """Images of the first projection plus noise, whitened, under a falling spectrum; Σ|C·P/σ|² is about ``power``.

    With ``spread``, the projections and shifts differ so little from the first that log weights fall by as much.
    """
    generator = torch.Generator(DEVICE).manual_seed(n + t + r + p)
    dtype, complex_dtype = (torch.float64, torch.complex128) if double else (torch.float32, torch.complex64)

    def normal(*size: int, of: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=of, device=DEVICE)

    k2 = torch.arange(p, device=DEVICE, dtype=dtype) / p  # pixels lie by radius, their number grows with its square
    falling = torch.exp(-4 * k2.sqrt())
    ctf = torch.cos(40 * torch.rand(n, 1, generator=generator, device=DEVICE, dtype=dtype) + 300 * k2)
    angles = normal(t, p, of=dtype)
    first = normal(1, p, of=complex_dtype) * falling
    first *= (power / (ctf[0].square() * first.abs().square()).sum()).sqrt()
    if spread is None:
        projections = normal(r, p, of=complex_dtype) * first.abs()
    else:
        projections = normal(r, p, of=complex_dtype)
        projections *= torch.linspace(0, (4 * spread / p) ** 0.5, r, device=DEVICE, dtype=dtype)[:, None]
        projections += first
        angles *= (spread / power) ** 0.5
    angles[0] = 0
    images = ctf * first + normal(n, p, of=complex_dtype) * 2**0.5
    return {
        "images": images, "ctf": ctf, "ctf_images": images * ctf, "ctf2": ctf.square(), "projections": projections,
        "phases": torch.polar(torch.ones_like(angles), angles),
        "orientation_prior": normal(r, of=dtype), "offset_prior": normal(n, 1, t, of=dtype),
        "power": images.abs().square().sum(1), "constant": -0.5 * images.abs().square().sum(1).double(),
    }  # fmt: skip


def prepared(
    x: dict[str, Tensor], precision: str, backend: str | None = None, correlation: bool = False
) -> Projections:
    whitening = None if correlation else torch.ones_like(x["ctf"][0])
    return prepare_projections(x["projections"], precision, whitening, backend=backend)


def scores(x: dict[str, Tensor], ready: Projections, correlation: bool = False, constant: bool = False) -> LogWeights:
    operands = x["ctf_images"], x["ctf2"], ready, x["phases"]
    if correlation:
        return log_weights(*operands, power=x["power"])
    priors = x["orientation_prior"], x["offset_prior"]
    return log_weights(*operands, *priors, constant=x["constant"] if constant else None)


def single(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float32, but for the constant."""
    return {
        name: v if name == "constant" else v.to(torch.complex64 if v.is_complex() else torch.float32)
        for name, v in x.items()
    }


def check_parity() -> None:
    """Raise AssertionError if a precision is far from matrix products in double, at odd sizes."""
    on_gpu = DEVICE.type == "cuda"
    for sizes in ((3, 5, 63, 65), (20, 1, 257, 65), (2, 37, 1153, 693))[: 3 if on_gpu else 1]:
        x = problem(*sizes, double=True)
        for correlation in (False, True):
            truth = "matmul" if on_gpu else "reference"
            expected = scores(x, prepared(x, "fp32", truth, correlation), correlation).values
            for precision in PRECISIONS if on_gpu else ("fp32", "fp64"):
                backend = "triton" if on_gpu else "matmul"
                found = scores(single(x), prepared(single(x), precision, backend, correlation), correlation).values
                require_parity(
                    f"{sizes} {precision} {correlation=}", float((found - expected).abs().max()),
                    2e-3 if correlation else 0.5 if precision in ("fp16", "tf32", "split") else 0.01,
                )  # fmt: skip
        if on_gpu:
            y = single(x)
            found = plain_squared_difference(y["images"], y["ctf"], y["projections"], y["phases"])
            model = (x["ctf"][:, None] * x["projections"])[:, None]
            for i, t in ((0, 0), (1, sizes[1] - 1)):
                distance = -0.5 * (x["images"][i] * x["phases"][t] - model[i, 0]).abs().square().sum(-1)
                torch.testing.assert_close(found[i, t].double(), distance, rtol=1e-5, atol=0)


def rows(case: Case) -> Iterator[dict]:
    """A row for each precision at one size."""
    pixels = round(math.pi * (case.box / 2) ** 2 / 2)
    known = (*PRECISIONS, "correlation", "plain") if DEVICE.type == "cuda" else ("fp32", "fp64", "correlation")
    precisions = known if case.precision is None else (case.precision,)
    if precisions[0] not in known:
        raise InputError(f"precision={case.precision}: must be one of {', '.join(known)} with device={DEVICE.type}")
    backends = ("triton", "matmul", "reference")[DEVICE.type == "cpu" :]
    if case.backend not in (None, *backends):
        raise InputError(f"backend={case.backend}: must be one of {', '.join(backends)}")
    yield from time_shape(
        case.n_particles, case.n_shifts, case.n_orientations, pixels, precisions, case.backend, case.repeats
    )


def time_shape(
    n: int, t: int, r: int, p: int, precisions: tuple[str, ...] = tuple(PRECISIONS), backend: str | None = None,
    repeats: int = 5,
) -> Iterator[dict]:  # fmt: skip
    """Times of the whole operation, of matrix products of the same shape, and of writing the result.

    Counted are the operations of the matrix product, 2·(n·t)·(2p)·r. ``of_lower`` is the share of the lower of the
    rate of the card's own product, in half precision (fp32 and plain: single; CPUs: single), and the rate of writing.
    """
    x = problem(n, t, r, p)
    half = torch.float16 if DEVICE.type == "cuda" else torch.float32
    product = {dtype: time_product(n * t, r, 2 * p, dtype, repeats) for dtype in {half, torch.float32}}
    writing = seconds(torch.empty((n, t, r), device=DEVICE).fill_, 1, repeats=repeats)
    for precision in precisions:
        correlation = precision == "correlation"
        if precision == "plain":
            operands: tuple = x["images"], x["ctf"], x["projections"], x["phases"]
            call, preparing = plain_squared_difference, 0.0
        else:
            how = (x, "fp16" if correlation else precision, backend, correlation)
            call, operands = scores, (x, prepared(*how), correlation)  # type: ignore[assignment]
            preparing = seconds(prepared, *how, repeats=3)
        peak = peak_mb(call, *operands)
        slow = precision in ("fp32", "fp64", "plain")
        time = seconds(call, *operands, repeats=min(3, repeats) if slow else repeats)
        best = product[torch.float32 if precision in ("fp32", "plain") else half]
        counted = 2 * n * t * 2 * p * r
        yield {
            "n_particles": n, "n_shifts": t, "n_orientations": r, "n_pixels": p, "precision": precision,
            "backend": backend or "auto", "ms": time * 1e3, "tflops": counted / time / 1e12,
            "product_tflops": counted / best / 1e12, "of_product": best / time, "writing_ms": writing * 1e3,
            "of_lower": max(best, writing) / time, "prepare_ms": preparing * 1e3, "peak_mb": peak,
        }  # fmt: skip


def time_product(rows: int, columns: int, depth: int, dtype: torch.dtype, repeats: int = 5) -> float:
    """Seconds that a matrix library would need for a product, from one whose depth is padded to whole cache lines."""
    padded = -(-depth // 64) * 64
    a, b = (torch.randn(m, padded, device=DEVICE).to(dtype) for m in (rows, columns))
    out = torch.empty((rows, columns), device=DEVICE, dtype=dtype)
    return seconds(torch.mm, a, b.T, out=out, repeats=repeats) * depth / padded


def errors(powers: tuple[float, ...] = POWERS) -> Iterator[dict]:
    """Errors of log weights within 20 of each particle's best, relative to it, against float64."""
    for power in powers:
        x = problem(64, 2, 2048, 1400, power, spread=20.0, double=True)
        # what float32 holds is the truth
        x = {
            name: value.to(torch.complex128 if value.is_complex() else torch.float64)
            for name, value in single(x).items()
        }
        expected = scores(x, prepared(x, "fp32", "matmul"), constant=True).values.flatten(1)
        best = expected.argmax(1, keepdim=True)
        near = expected - expected.gather(1, best)
        largest = float((x["ctf2"] @ x["projections"].abs().square().T).max())
        for precision in PRECISIONS:
            found = scores(single(x), prepared(single(x), precision), constant=True).values.flatten(1).double()
            error = (found - found.gather(1, best) - near)[near > -20].abs()
            yield {
                "power": power, "largest": largest, "precision": precision, "samples": error.numel(),
                "rms": float(error.square().mean().sqrt()), "p999": float(error.quantile(0.999)),
                "chosen": precision == choose_precision(largest),
            }  # fmt: skip


def time_tiling(sizes: tuple[int, ...] = IMAGE_SIZES) -> Iterator[dict]:
    """The plain kernels by image size (Zhang et al. 2018, figure 5): 16 particles, 16 shifts, 1,152 orientations."""
    for size in sizes:
        n, t, r, p = 16, 16, 1152, round(math.pi * (size / 2) ** 2 / 2)
        x = problem(n, t, r, p)
        operands = x["images"], x["ctf"], x["projections"], x["phases"]
        tiled, untiled = (seconds(plain_squared_difference, *operands, tiled=how, repeats=3) for how in (True, False))
        yield {"size": size, "pixels": p, "tiled_ms": tiled * 1e3, "untiled_ms": untiled * 1e3, "gain": untiled / tiled}


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    check_parity()
    every = (*PRECISIONS, "correlation", "plain")
    tables = (row for shape in SHAPES for row in time_shape(*shape, every)), errors(), time_tiling()
    for title, lines in zip(("rates", "errors", "tiled and untiled"), tables, strict=True):
        print(f"{title}\n{table(list(lines))}\n", flush=True)
