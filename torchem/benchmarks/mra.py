"""Passes of 2D alignment: times by references, shifts and image size, beside the floor of the device."""

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
    seconds,
    seconds_with_host,
)
from torchem.errors import InputError
from torchem.ops.correlation import Alignment, References, Shifts, align
from torchem.ops.polar import Rings

SIZES = {"cuda": (10_000, 90, 1, 1), "cpu": (512, 90, 1, 1)}
REPEATS, PLOTTED = 3, ("ms",)
RADIUS = 0.4  # of the box: 36 px of 90


def rows(case: Case) -> Iterator[dict]:
    """A row for multi-reference, and one for reference-free alignment, images on the device."""
    for operation, count in (("mra", case.n_references), ("rfa", 1)):
        if operation == "rfa" and case.n_references != Case.n_references:
            continue
        rings = Rings(case.box, 1, round(RADIUS * case.box))
        if rings.last + case.x_range > rings.reach:
            raise InputError(f"x_range={case.x_range:g}: {case.box} px images have no room for that at their last ring")
        shifts = Shifts(case.x_range, case.x_range, 1.0)
        references, images = problem(case.n_particles, count, case.box)
        references, images = references.to(DEVICE), images.to(DEVICE)
        centres = torch.zeros((len(images), 2), dtype=torch.float64, device=DEVICE)
        peak = peak_mb(one_pass, images, centres, references, rings, shifts)
        time = seconds_with_host(one_pass, images, centres, references, rings, shifts, repeats=case.repeats)
        gpu = DEVICE.type == "cuda"
        kept = References(references, rings).n_frequencies if gpu else rings.n_angles // 2
        floor = floor_seconds(len(images), count, rings, shifts, kept)
        yield {
            "operation": operation, "precision": "single", "n_particles": case.n_particles, "box": case.box,
            "n_references": count, "x_range": case.x_range, "n_shifts": len(shifts.table()), "last_ring": rings.last,
            "n_frequencies": kept,
            "ms": time * 1e3, "images_per_s": len(images) / time, "floor_ms": floor * 1e3,
            "of_floor": floor / time, "peak_mb": peak,
        }  # fmt: skip


def one_pass(images: Tensor, centres: Tensor, references: Tensor, rings: Rings, shifts: Shifts) -> Alignment:
    """All that is done to images in an iteration before they are averaged."""
    return align(images, centres, References(references, rings), shifts)


def check_parity() -> None:
    """Raise AssertionError if single precision on the device finds other peaks than double precision on the CPU."""
    rings, shifts = Rings(48, 1, 20), Shifts(1, 1, 1)
    references, images = problem(24, 5, 48)
    centres = torch.zeros((len(images), 2), dtype=torch.float64)
    expected = align(images.double(), centres, References(references.double(), rings), shifts)
    found = one_pass(images.to(DEVICE), centres.to(DEVICE), references.to(DEVICE), rings, shifts)
    require_parity("align: peaks", largest_difference(found.peak, expected.peak), 1e-5)
    require_parity("align: references", float((found.reference.cpu() != expected.reference).sum()), 0)


def problem(n: int, k: int, box: int) -> tuple[Tensor, Tensor]:
    """References of blobs, and as many noisy images of them as wanted (those of a hundred over again)."""
    generator = torch.Generator().manual_seed(n + k + box)
    axis = torch.arange(box) - box // 2
    spots = (torch.rand((k, 14, 2, 1, 1), generator=generator) - 0.5) * 0.6 * box
    width = (0.02 + 0.04 * torch.rand((k, 14, 1, 1), generator=generator)) * box
    distance = (axis - spots[:, :, 0]) ** 2 + (axis[:, None] - spots[:, :, 1]) ** 2
    references = torch.exp(-distance / (2 * width**2)).sum(1)
    few = references[torch.arange(min(n, 100)) % k]
    few = few + 3 * few.std() * torch.randn(few.shape, generator=generator)
    return references, few[torch.arange(n) % len(few)]


def floor_seconds(n: int, k: int, rings: Rings, shifts: Shifts, n_frequencies: int) -> float:
    """What products and memory alone would take at the rates of the same device in the same run.

    Ring transforms and inverse transforms in quarters, sums over rings as complex products, spectra written and read;
    of the first frequencies only.
    """
    half = torch.float16 if DEVICE.type == "cuda" else torch.float32
    side = 4096 if DEVICE.type == "cuda" else 1024
    a = torch.randn((side, side), device=DEVICE).to(half)
    rate = 2 * side**3 / seconds(torch.mm, a, a)
    kept = [min(length, 2 * n_frequencies) for length in rings.lengths]
    transforms = sum(length * some // 4 for length, some in zip(rings.lengths, kept, strict=True))
    sums = 2 * k * sum(kept)
    angles = 2 * k * rings.n_angles * n_frequencies // 2
    each = 2 * (transforms + sums + angles)
    spectra = 2 * sum(kept) * torch.finfo(half).bits // 8
    return n * len(shifts.table()) * (each / rate + spectra / copied_bytes_per_second())
