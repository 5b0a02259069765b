"""Squared difference: parity, rates, errors of log weights, tiled against untiled.

Run it with ``python -m torchem.benchmarks.squared_difference``.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

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
DEVICE = torch.device("cuda")


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


def prepared(x: dict[str, Tensor], precision: str, backend: str = "triton", correlation: bool = False) -> Projections:
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


def seconds(call: Callable[..., object], *arguments: object, repeats: int = 5, **options: object) -> float:
    """Median time of one call on the device, without that of launching: calls are recorded and replayed together."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):  # the second time nothing is compiled
        start.record()
        call(*arguments, **options)
        end.record()
        end.synchronize()
    calls = max(1, min(20, int(2 / start.elapsed_time(end))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call(*arguments, **options)
    graph.replay()
    times = []
    for _ in range(repeats):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / calls)
    return sorted(times)[repeats // 2]


def check_parity() -> None:
    """Raise if a precision is far from matrix products in double, at odd sizes."""
    for sizes in ((3, 5, 63, 65), (2, 37, 1153, 693)):
        x = problem(*sizes, double=True)
        for correlation in (False, True):
            expected = scores(x, prepared(x, "fp32", "matmul", correlation), correlation).values
            for precision in PRECISIONS:
                found = scores(single(x), prepared(single(x), precision, "triton", correlation), correlation).values
                error = float((found - expected).abs().max())
                bound = 2e-3 if correlation else 0.5 if precision in ("fp16", "tf32", "split") else 0.01
                if not error <= bound:
                    raise AssertionError(f"{sizes} {precision} {correlation=}: largest error {error:.2g} > {bound:g}")
        y = single(x)
        found = plain_squared_difference(y["images"], y["ctf"], y["projections"], y["phases"])
        model = (x["ctf"][:, None] * x["projections"])[:, None]
        for i, t in ((0, 0), (1, 4)):
            distance = -0.5 * (x["images"][i] * x["phases"][t] - model[i, 0]).abs().square().sum(-1)
            torch.testing.assert_close(found[i, t].double(), distance, rtol=1e-5, atol=0)


def time_shapes(
    shapes: tuple[tuple[int, int, int, int], ...] = SHAPES, precisions: tuple[str, ...] = tuple(PRECISIONS)
) -> Iterator[dict]:
    """Times of the whole operation, of matrix products of the same shape, and of writing the result."""
    for n, t, r, p in shapes:
        x = problem(n, t, r, p)
        product = {dtype: time_product(n * t, r, 2 * p, dtype) for dtype in (torch.float16, torch.float32)}
        result = torch.empty((n, t, r), device=DEVICE)
        writing = seconds(result.fill_, 1)
        del result
        for precision in (*precisions, "correlation", "plain"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            if precision == "plain":
                operands = x["images"], x["ctf"], x["projections"], x["phases"]
                time, preparing = seconds(plain_squared_difference, *operands, repeats=3), 0.0
            else:
                correlation = precision == "correlation"
                how = (x, "fp16" if correlation else precision, "triton", correlation)
                time = seconds(
                    scores, x, prepared(*how), correlation, repeats=3 if precision in ("fp32", "fp64") else 5
                )
                preparing = seconds(prepared, *how, repeats=3)
            best = product[torch.float32 if precision in ("fp32", "plain") else torch.float16]
            counted = 2 * n * t * 2 * p * r
            yield {
                "shape": f"{n}x{t}x{r}x{p}", "precision": precision, "ms": time * 1e3, "tflops": counted / time / 1e12,
                "product_ms": best * 1e3, "product_tflops": counted / best / 1e12, "writing_ms": writing * 1e3,
                "of_product": best / time, "of_lower": max(best, writing) / time, "prepare_ms": preparing * 1e3,
                "peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9,
            }  # fmt: skip


def time_product(rows: int, columns: int, depth: int, dtype: torch.dtype) -> float:
    """Seconds that cuBLAS would need for a product, from one whose depth is padded to whole cache lines."""
    padded = -(-depth // 64) * 64
    a, b = (torch.randn(m, padded, device=DEVICE).to(dtype) for m in (rows, columns))
    return seconds(torch.mm, a, b.T, out=torch.empty((rows, columns), device=DEVICE, dtype=dtype)) * depth / padded


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


def run() -> dict[str, list[dict]]:
    """Parity, then every table."""
    torch.backends.cuda.matmul.allow_tf32 = False
    check_parity()
    return {"rates": list(time_shapes()), "errors": list(errors()), "tiled and untiled": list(time_tiling())}


def table(rows: list[dict]) -> str:
    """Rows as aligned text."""
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


if __name__ == "__main__":
    for title, rows in run().items():
        print(f"{title}\n{table(rows)}\n", flush=True)
