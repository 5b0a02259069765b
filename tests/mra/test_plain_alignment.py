"""The alignment against the same algorithm in plain NumPy."""

import numpy as np
import pytest
import torch

from tests.mra.plain_alignment import Alignment as Plain
from torchem.ops.correlation import References, Shifts, align, best_scores, correlation_table
from torchem.ops.polar import Rings

FIRST, LAST = 2, 6
SHIFTS = Shifts(1.0, 0.5, 0.5)


def problem(box: int, n: int = 4, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """References, and images that hardly differ from them but in noise and contrast."""
    random = np.random.default_rng(box)
    axis = np.arange(box) - box // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    blobs = random.uniform(-4, 4, (k, 5, 2))
    references = np.exp(-((x - blobs[..., 0, None, None]) ** 2 + (y - blobs[..., 1, None, None]) ** 2) / 4).sum(1)
    references *= np.array([1, 5, 0.2])[:, None, None]
    chosen = references[np.arange(n) % k]
    chosen = np.where((np.arange(n) % 2 == 1)[:, None, None], np.rot90(chosen[:, :, ::-1], axes=(1, 2)), chosen)
    images = np.roll(chosen, (1, 0), (2, 1)) / chosen.std((1, 2), keepdims=True) + random.normal(size=chosen.shape)
    return references, images + 3


@pytest.mark.parametrize("box", [18, 19])
def test_table_and_peaks(box: int) -> None:
    references, images = problem(box)
    shifts = SHIFTS.table().numpy()
    plain = Plain(references, FIRST, LAST)
    expected = np.array([plain.table(image, shifts) for image in images])

    x, rings = torch.tensor(images), Rings(box, FIRST, LAST)
    centres = torch.zeros(len(x), 2)
    every = SHIFTS.table().expand(len(x), -1, -1)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        ready = References(torch.tensor(references, dtype=dtype), rings)
        table = correlation_table(x.to(dtype), every, ready).double().numpy()
        np.testing.assert_allclose(table, expected, rtol=0, atol=tolerance * np.abs(expected).max())
        scores = best_scores(x.to(dtype), centres, ready, SHIFTS).double().numpy()
        np.testing.assert_allclose(scores, expected.max(-1), rtol=tolerance)

        found = align(x.to(dtype), centres, ready, SHIFTS)
        best = [np.unravel_index(e.argmax(), e.shape) for e in expected]
        assert found.reference.tolist() == [k for _, _, k, _ in best]
        assert found.mirror.tolist() == [m == 1 for _, m, _, _ in best]
        refined = np.array([
            plain.refined(image, *shifts[t], k, m == 1, a) for image, (t, m, k, a) in zip(images, best, strict=True)
        ])  # fmt: skip
        tolerance = max(tolerance / 10, 1e-10)
        np.testing.assert_allclose(found.peak.numpy(), refined[:, 3], rtol=tolerance)
        turn = np.angle(np.exp(1j * (found.angle.numpy() - refined[:, 0])))
        assert np.abs(turn).max() < 1e3 * tolerance
        np.testing.assert_allclose(found.offset.numpy(), refined[:, 1:3], atol=1e3 * tolerance)


def test_straight_only() -> None:
    references, images = problem(18)
    ready = References(torch.tensor(references), Rings(18, FIRST, LAST), mirror=False)
    both = References(torch.tensor(references), Rings(18, FIRST, LAST))
    x, centres = torch.tensor(images), torch.zeros(len(images), 2)
    straight = best_scores(x, centres, ready, SHIFTS)
    assert torch.allclose(straight, best_scores(x, centres, both, SHIFTS)[:, :, :1], rtol=1e-12)
    assert not align(x, centres, ready, SHIFTS).mirror.any()


def test_without_shifts() -> None:
    """An axis that is not searched keeps its place, and does not disturb the others."""
    references, images = problem(18)
    ready = References(torch.tensor(references), Rings(18, FIRST, LAST))
    found = align(torch.tensor(images), torch.zeros(len(images), 2), ready, Shifts(1, 0, 1))
    assert (found.offset[:, 1] == 0).all() and (found.offset[:, 0] != 0).any()


def test_whole_pixel_centres_are_shifts() -> None:
    references, images = problem(19)
    ready = References(torch.tensor(references), Rings(19, FIRST, LAST))
    x = torch.tensor(images)
    near = align(x, torch.zeros(len(x), 2), ready, Shifts(1, 1, 1))
    around = align(x, torch.tensor([[1.0, 0.0]]).expand(len(x), 2), ready, Shifts(1, 1, 1))
    inside = (near.offset[:, 0] > -0.4).numpy()
    assert inside.any()
    np.testing.assert_allclose(around.peak.numpy()[inside], near.peak.numpy()[inside], rtol=1e-10)
