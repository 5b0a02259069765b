"""Scores of given pairs, slices cut on the way: local searches and the fine pass."""

from collections.abc import Iterator

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
from torchem.benchmarks.pairs import CHUNK_ELEMENTS, Pairs
from torchem.ops.pairs import score_pairs

SIZES = {"cuda": (500, 128, 140, 9), "cpu": (4, 32, 20, 9)}
REPEATS, PLOTTED = 5, ("gpixels_per_s",)
# eight complex values of single precision around each pixel of a slice
BYTES_A_PIXEL = 64


def rows(case: Case) -> Iterator[dict]:
    """A row; bytes are those of the voxels that slices are interpolated from, wherever they come from."""
    precision = case.precision or "single"
    x = Pairs.random(case.n_particles, case.box, case.n_orientations, case.n_shifts).on_device(precision)
    copied = copied_bytes_per_second(case.repeats)
    for volumes in ("single", "half") if DEVICE.type == "cuda" and precision == "single" else (precision,):
        half = volumes == "half"
        peak = peak_mb(score, x, half)
        time = seconds_with_host(score, x, half, repeats=case.repeats)
        pixels = len(x.which) * x.images.shape[1]
        yield {
            "n_particles": case.n_particles, "box": case.box, "n_orientations": case.n_orientations,
            "n_shifts": case.n_shifts, "n_pixels": x.images.shape[1], "precision": volumes, "ms": time * 1e3,
            "gpixels_per_s": pixels / time / 1e9, "tflops": 4 * pixels * case.n_shifts / time / 1e12,
            "copy_gb_per_s": copied / 1e9, "of_copy": pixels * BYTES_A_PIXEL / time / copied, "peak_mb": peak,
        }  # fmt: skip


def check_parity() -> None:
    """Raise AssertionError if scores in single precision on the device differ from double precision on the CPU."""
    x = Pairs.random(3, 16, 7, 9)
    expected = score_pairs(x.slices, x.orientation, x.which, x.images, x.weights, x.phases, None, 2**12)
    require_parity("score_pairs", largest_difference(score(x.on_device("single"), False), expected), 1e-4)


def score(x: Pairs, half: bool) -> Tensor:
    """`(m, t)` scores."""
    return score_pairs(
        x.slices, x.orientation, x.which, x.images, x.weights, x.phases, None, CHUNK_ELEMENTS[DEVICE.type], half
    )
