"""The kernels of rotational correlation against the PyTorch reference in float64."""

import math

import pytest
import torch
from torch import Tensor

from torchem.ops import correlation
from torchem.ops.correlation import (
    References,
    Shifts,
    Tables,
    align,
    align_by_kernels,
    best_by_kernels,
    best_scores,
    correlation_table,
    peaks_by_kernel,
    polar_references,
    polar_references_by_kernels,
    refine_peaks,
)
from torchem.ops.polar import Rings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# box, rings, images, references, mirror: one ring length and several, odd and even boxes, partial tiles
CASES = [(20, (1, 7), 3, 1, False), (33, (2, 14), 3, 5, True), (90, (40, 42), 1, 1, True)]
SHIFTS = Shifts(0.5, 0, 0.5)


def unpacked(best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 value and the numbers of shift and angle, packed into integers that sort as the values do."""
    bits = (best >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), best >> 16 & 0xFFFF, best & 0xFFFF


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out unwritten holds NaN."""
    empty = torch.empty

    def poisoned(*arguments: object, **options: object) -> Tensor:
        values = empty(*arguments, **options)  # type: ignore[call-overload]
        return values.fill_(math.nan) if values.is_floating_point() else values

    monkeypatch.setattr(torch, "empty", poisoned)


def problem(box: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """References of blobs, and noisy images of them."""
    generator = torch.Generator().manual_seed(box + n + k)
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    spots = (torch.rand((k, 6, 2, 1, 1), generator=generator, dtype=torch.float64) - 0.5) * 0.6 * box
    distance = (axis - spots[:, :, 0]) ** 2 + (axis[:, None] - spots[:, :, 1]) ** 2
    references = torch.exp(-distance / 6).sum(1)
    images = references[torch.arange(n) % k] * torch.linspace(1, 3, n)[:, None, None]
    images = images.transpose(1, 2).roll(1, 2) + 0.3 * torch.randn(images.shape, generator=generator) + 2
    return references.to(DEVICE), images.to(DEVICE)


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    return torch.var_mean(images.float(), (1, 2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_best_angles(case: tuple[int, tuple[int, int], int, int, bool]) -> None:
    box, (first, last), n, k, mirror = case
    references, images = problem(box, n, k)
    rings, table = Rings(box, first, last), SHIFTS.table().to(DEVICE)
    centres = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]], dtype=torch.float64, device=DEVICE)[:n]
    exact = correlation_table(images, centres[:, None] + table, References(references, rings, mirror))
    exact = exact.permute(0, 3, 2, 1, 4).flatten(1, 2)  # (n, k·sides, t, a)
    expected = exact.amax((2, 3))

    ready = References(references.float(), rings, mirror)
    values, shifts, angles = unpacked(best_by_kernels(images.float(), centres, ready, SHIFTS, statistics(images)).T)
    assert values.shape == expected.shape
    assert float((values - expected).abs().max()) < 5e-4
    there = exact.flatten(2).gather(2, (shifts * rings.n_angles + angles)[..., None])[..., 0]
    assert float((there - expected).abs().max()) < 5e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alignment(case: tuple[int, tuple[int, int], int, int, bool]) -> None:
    """Peaks are those of double precision to 1e-5, whatever half precision found first."""
    box, (first, last), n, k, mirror = case
    references, images = problem(box, n, k)
    rings, centres = Rings(box, first, last), torch.zeros((n, 2), dtype=torch.float64, device=DEVICE)
    expected = align(images, centres, References(references, rings, mirror), SHIFTS)
    found = align_by_kernels(images.float(), centres, References(references.float(), rings, mirror), SHIFTS)
    assert found.reference.tolist() == expected.reference.tolist()
    assert found.mirror.tolist() == expected.mirror.tolist()
    assert torch.allclose(found.peak, expected.peak, rtol=1e-5)
    assert torch.allclose(found.offset, expected.offset, atol=1e-3)
    turn = torch.remainder(found.angle - expected.angle + math.pi, 2 * math.pi) - math.pi
    assert float(turn.abs().max()) < 1e-4


@pytest.mark.parametrize("level, tolerance", [(0.0, 1e-5), (1000.0, 1e-3)])
@pytest.mark.parametrize("box, first, last, k", [(20, 1, 7, 17), (33, 2, 14, 5), (90, 40, 42, 1)])
def test_polar_references(box: int, first: int, last: int, k: int, level: float, tolerance: float) -> None:
    """Also of references at a level of a thousand deviations, and of an empty one."""
    references, rings = problem(box, k, k)[1].float(), Rings(box, first, last)
    references += level * references.std((1, 2), keepdim=True)
    references[1:2] = 0
    expected = polar_references(references.double(), rings)
    for found, exact in zip(polar_references_by_kernels(references, rings), expected, strict=True):
        assert found.shape == exact.shape
        assert float((found - exact).abs().max()) < tolerance * float(exact.abs().max())
        assert not found[1:2].any()


def packed(value: float, shift: int, angle: int) -> int:
    return int(torch.tensor(value).view(torch.int32)) << 32 | shift << 16 | angle


@pytest.mark.parametrize("below, taken", [(0.5, 1), (2.0, 0)])
def test_candidates(below: float, taken: int) -> None:
    """Of those within the margin the best is taken and refined, as the reference does it; others are not looked at."""
    references, images = problem(20, 2, 2)
    rings, exact = Rings(20, 1, 7), References(references, Rings(20, 1, 7))
    start = torch.zeros((2, 2), dtype=torch.float64, device=DEVICE)
    right, at = align(images, start, exact, SHIFTS), start + SHIFTS.table().to(DEVICE)[2]
    table = correlation_table(images, at[:, None], exact)
    nearest = table[torch.arange(2), 0, right.mirror.long(), right.reference].argmax(1).tolist()
    best = torch.tensor([
        [packed(0.9, 1, 3) for _ in nearest],
        [packed(0.9 - below * correlation.MARGIN, 2, angle) for angle in nearest],
    ], device=DEVICE)  # fmt: skip
    own = 2 * right.reference + right.mirror.long()
    which = torch.stack([3 - own, own])
    ready = References(references.float(), rings)
    found = peaks_by_kernel(images.float(), statistics(images)[1], start, ready, SHIFTS, best, which)
    assert (2 * found.reference + found.mirror.long()).tolist() == which[taken].tolist()
    if taken:
        expected = refine_peaks(images, at, exact, right.reference, right.mirror, SHIFTS.free())
        assert torch.allclose(found.peak, expected.peak, rtol=1e-5)
        assert torch.allclose(found.offset, expected.offset, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_device() -> None:
    references, images = problem(33, 5, 3)
    ready = References(references.float(), Rings(33, 2, 14))
    centres = torch.zeros((5, 2), dtype=torch.float64, device=DEVICE)
    align(images.float(), centres, ready, SHIFTS)  # compiles, fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        align(images.float(), centres, ready, SHIFTS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_frequencies_that_references_have() -> None:
    """Smooth references need few frequencies, and nothing changes without the others; each ring has rows of its own."""
    references, _ = problem(90, 1, 3)
    rings = Rings(90, 1, 36)
    smooth = torch.nn.functional.avg_pool2d(references, 9, 1, 4)
    noisy = references + torch.randn((3, 90, 90), device=DEVICE)
    for images, expected in ((smooth, 64), (noisy, 128)):
        assert References(images.float(), rings).n_frequencies == expected
    noise = torch.randn((2, 90, 90), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ready, centres = References(smooth, rings), torch.zeros((2, 2), dtype=torch.float64, device=DEVICE)
    exact = correlation_table(noise.double(), centres[:, None], ready).flatten(1, 3).amax(-1)  # (n, sides·k)
    best = best_by_kernels(
        noise, centres, References(smooth.float(), rings), Shifts(0, 0, 1), statistics(noise)
    )  # fmt: skip
    found = unpacked(best.T)[0].unflatten(1, (3, 2)).mT.flatten(1)
    assert float((found - exact).abs().max()) < 5e-4
    for m in (64, 128):
        tables = Tables.of(rings, m, torch.device("cpu"))
        used = [
            int(row) + 2 * ring + part
            for row, count in zip(tables.first_row, tables.ring_counts, strict=True)
            for ring in range(int(count))
            for part in (0, 1)
        ]
        assert sorted(used) == list(range(tables.n_rows))
        assert tables.n_rows == sum(min(n, 2 * m) for n in rings.lengths)


def test_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is held at once, the same is found."""
    references, images = problem(20, 70, 3)
    ready = References(references.float(), Rings(20, 1, 7))
    centres = torch.zeros((70, 2), dtype=torch.float64, device=DEVICE)
    expected = best_by_kernels(images.float(), centres, ready, SHIFTS, statistics(images))
    monkeypatch.setattr(correlation, "CHUNK_BYTES", 1)
    monkeypatch.setattr(correlation, "REFERENCES_AT_ONCE", 2)
    monkeypatch.setattr(correlation, "ANGLE_PAIRS", 3)
    found = best_by_kernels(images.float(), centres, ready, SHIFTS, statistics(images))
    assert torch.allclose(unpacked(found)[0], unpacked(expected)[0], rtol=1e-6)
    assert torch.equal(found & 0xFFFFFFFF, expected & 0xFFFFFFFF)


def test_scores_of_the_matrix_products() -> None:
    """On a CPU in blocks, by sparse resampling: the same as the table."""
    references, images = problem(33, 5, 3)
    rings, table = Rings(33, 2, 14), SHIFTS.table()
    ready = References(references.cpu(), rings)
    exact = correlation_table(images.cpu(), table.expand(5, -1, -1), ready)
    found = best_scores(images.cpu(), torch.zeros(5, 2), ready, SHIFTS)
    assert torch.allclose(found, exact.amax(-1), rtol=1e-10)
