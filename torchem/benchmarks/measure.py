"""What the benchmarks share: cases, times, the card's own rates."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """What is measured; ``precision`` and ``backend`` None: all that there are."""

    n_particles: int
    box: int  # px
    n_orientations: int
    n_shifts: int
    precision: str | None = None
    backend: str | None = None
    repeats: int = 5
    n_references: int = 10
    x_range: float = 3.0  # px


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[..., object], *arguments: object, repeats: int = 5, **options: object) -> float:
    """Median time of one call. On a GPU that of launching is left out: calls are recorded and replayed together."""
    if DEVICE.type == "cpu":
        return seconds_with_host(call, *arguments, repeats=repeats, **options)
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
    return statistics.median(times)


def seconds_with_host(call: Callable[..., object], *arguments: object, repeats: int = 5, **options: object) -> float:
    """Median time of one call as its caller sees it, for what reads sizes back from the device."""
    call(*arguments, **options)
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call(*arguments, **options)
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_mb(call: Callable[..., object], *arguments: object) -> float | None:
    """MB of the GPU's memory that a call takes at most beside its arguments; on a CPU the call is made, too: None."""
    if DEVICE.type == "cpu":
        call(*arguments)
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(*arguments)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def copied_bytes_per_second(repeats: int = 5) -> float:
    """Bytes read and written in a second by a copy that no cache holds."""
    source = torch.empty(2**28 if DEVICE.type == "cuda" else 2**25, dtype=torch.float32, device=DEVICE)
    return 2 * source.nbytes / seconds(torch.empty_like(source).copy_, source, repeats=repeats)


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    expected = expected.cpu()
    return float((found.cpu().to(expected.dtype) - expected).abs().amax() / expected.abs().amax())


def require_parity(what: str, error: float, bound: float) -> None:
    """Raise AssertionError unless an error is within its bound."""
    if not error <= bound:
        raise AssertionError(f"{what}: error {error:.2g} > {bound:g}; nothing is timed")


def table(rows: list[dict]) -> str:
    """Rows as aligned text."""
    cells = [list(rows[0])] + [[_text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def _text(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
