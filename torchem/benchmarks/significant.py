"""Significant samples: probabilities of a ragged list, and the samples of a whole grid."""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchem.benchmarks.measure import (
    DEVICE,
    Case,
    copied_bytes_per_second,
    largest_difference,
    peak_mb,
    require_parity,
    seconds_with_host,
)
from torchem.ops.significant import posterior, significant_of_rows

SIZES = {"cuda": (64, 42, 9216, 37), "cpu": (16, 22, 1152, 21)}
REPEATS, PLOTTED = 5, ("ms", "of_copy")
FRACTION = 0.999


def rows(case: Case) -> Iterator[dict]:
    """A row for each operation; bytes are those of reading every log weight once and writing what has their size."""
    values, log_total = problem(case.n_particles, case.n_shifts * case.n_orientations)
    if case.precision == "double":
        values = values.double()
    first = torch.arange(case.n_particles + 1, device=DEVICE) * values.shape[1]
    copied = copied_bytes_per_second(case.repeats)
    calls = (
        ("posterior", posterior, (values.flatten(), first, FRACTION), 2 * values.nbytes),
        ("significant_of_rows", significant_of_rows, (values, log_total, FRACTION), values.nbytes),
    )
    for name, call, arguments, moved in calls:
        peak = peak_mb(call, *arguments)
        time = seconds_with_host(call, *arguments, repeats=case.repeats)
        yield {
            "operation": name, "n_particles": case.n_particles, "n_shifts": case.n_shifts,
            "n_orientations": case.n_orientations, "precision": case.precision or "single", "ms": time * 1e3,
            "gb_per_s": moved / time / 1e9, "copy_gb_per_s": copied / 1e9, "of_copy": moved / time / copied,
            "peak_mb": peak,
        }  # fmt: skip


def check_parity() -> None:
    """Raise AssertionError if single precision on the device keeps other weight than double precision on the CPU."""
    values, log_total = problem(5, 2000)
    first = torch.arange(6, device=DEVICE) * 2000
    found = posterior(values.flatten(), first, FRACTION)
    expected = posterior(values.flatten().double().cpu(), first.cpu(), FRACTION)
    require_parity("posterior", largest_difference(found.kept, expected.kept), 1e-3)
    row, column = significant_of_rows(values, log_total, FRACTION)
    kept = torch.zeros_like(values)
    kept[row, column] = (values - log_total[:, None]).exp().float()[row, column]
    require_parity("significant_of_rows", largest_difference(kept.flatten(), expected.kept), 1e-3)


def problem(n: int, columns: int) -> tuple[Tensor, Tensor]:
    """Log weights `(n, columns)` with a long tail, and their log totals `(n,)`."""
    generator = torch.Generator(DEVICE).manual_seed(columns)
    values = -100 * torch.rand((n, columns), generator=generator, device=DEVICE) ** 0.3
    return values, values.double().logsumexp(1)
