"""Weighted sums of given pairs, scattered into a volume: as fast as can be, and deterministic."""

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
from torchem.benchmarks.pairs import CHUNK_ELEMENTS, Pairs
from torchem.ops.pairs import add_pairs

SIZES = {"cuda": (500, 128, 37, 36), "cpu": (4, 32, 10, 36)}
REPEATS, PLOTTED = 5, ("gpixels_per_s",)
# a complex value, a weight and padding in eight voxels around each pixel of a slice
BYTES_A_PIXEL = 128


def rows(case: Case) -> Iterator[dict]:
    """A row for each order of summation; bytes are those added to voxels, wherever these are held."""
    precision = case.precision or "single"
    x = Pairs.random(case.n_particles, case.box, case.n_orientations, case.n_shifts).on_device(precision)
    copied = copied_bytes_per_second(case.repeats)
    before = torch.are_deterministic_algorithms_enabled()
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            peak = peak_mb(add, x)
            time = seconds_with_host(add, x, repeats=case.repeats)
        finally:
            torch.use_deterministic_algorithms(before)
        pixels = len(x.which) * x.images.shape[1]
        yield {
            "n_particles": case.n_particles, "box": case.box, "n_orientations": case.n_orientations,
            "n_shifts": case.n_shifts, "n_pixels": x.images.shape[1], "precision": precision,
            "deterministic": deterministic, "ms": time * 1e3, "gpixels_per_s": pixels / time / 1e9,
            "copy_gb_per_s": copied / 1e9, "of_copy": pixels * BYTES_A_PIXEL / time / copied, "peak_mb": peak,
        }  # fmt: skip


def check_parity() -> None:
    """Raise AssertionError if sums in single precision on the device differ from double precision on the CPU."""
    x = Pairs.random(3, 16, 7, 9)
    for name, found, expected in zip(("data", "weight"), add(x.on_device("single")), add(x), strict=True):
        require_parity(f"add_pairs: {name}", largest_difference(found, expected), 1e-4)


def add(x: Pairs) -> tuple[Tensor, Tensor]:
    """Numerators and weights of the volume."""
    data, weight = torch.zeros_like(x.slices.volumes), torch.zeros_like(x.slices.volumes.real)
    add_pairs(
        x.slices, x.orientation, x.which, x.probability, x.phases, x.operands, data, weight,
        CHUNK_ELEMENTS[DEVICE.type],
    )  # fmt: skip
    return data, weight
