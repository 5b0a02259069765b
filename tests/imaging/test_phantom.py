"""The pseudo-protein: size, symmetry, packing and power spectrum."""

from pathlib import Path

import numpy as np
import pytest
import torch

from torchem.data.atoms import read_atoms
from torchem.imaging.density import spread_density
from torchem.imaging.phantom import phantom
from torchem.imaging.symmetry import operators


def rotational_power(xyz: np.ndarray, weights: np.ndarray, box: int = 120, pixel_size: float = 1.9) -> np.ndarray:
    """Mean |F|² of point atoms by shell of 1/(box · pixel_size)."""
    points = torch.from_numpy(xyz - xyz.mean(0)).float()
    volume = spread_density(points, torch.from_numpy(weights).float(), box, pixel_size)
    full, half = torch.fft.fftfreq(box, 1 / box), torch.fft.rfftfreq(box, 1 / box)
    shell = (full[:, None, None] ** 2 + full[:, None] ** 2 + half**2).sqrt().round().long().flatten()
    power = torch.fft.rfftn(volume).abs().square().flatten()
    return (torch.bincount(shell, power) / torch.bincount(shell)).numpy()


@pytest.fixture(scope="module")
def d2() -> tuple[np.ndarray, np.ndarray]:
    return phantom()


def test_default_has_the_size_of_beta_galactosidase(d2: tuple[np.ndarray, np.ndarray]) -> None:
    xyz, weights = d2
    assert xyz.shape == (len(weights), 3) and xyz.dtype == weights.dtype == np.float64
    assert 4 * 8000 <= len(xyz) <= 4 * 9200
    np.testing.assert_allclose(np.ptp(xyz, axis=0), [181, 136, 92], rtol=0.08)
    assert set(weights) == {6.0, 7.0, 8.0, 16.0}


@pytest.mark.parametrize("symmetry", ["C1", "C4", "d2", "D7", "T"])
def test_symmetry_and_centre(symmetry: str) -> None:
    xyz, weights = phantom(symmetry)
    group = operators(symmetry)
    assert len(xyz) % len(group) == 0 and len(xyz) / len(group) >= 8000
    np.testing.assert_allclose((weights[:, None] * xyz).sum(0) / weights.sum(), 0, atol=1e-9)
    # every rotation maps the set of atoms onto itself: compare order-free sums of a generic function
    wave = np.array([[0.031, -0.017, 0.023], [0.11, 0.07, -0.13]])

    def transform(points: np.ndarray) -> np.ndarray:
        return (weights[:, None] * np.exp(1j * points @ wave.T)).sum(0)

    for operator in group:
        np.testing.assert_allclose(transform(xyz @ operator.T), transform(xyz), rtol=0, atol=1e-6 * weights.sum())


def test_seed(d2: tuple[np.ndarray, np.ndarray]) -> None:
    again, other = phantom("D2", 0), phantom("D2", 1)
    assert d2[0].tobytes() == again[0].tobytes() and d2[1].tobytes() == again[1].tobytes()
    assert len(other[0]) != len(d2[0]) or not np.allclose(other[0], d2[0])


def test_packed_like_a_protein(d2: tuple[np.ndarray, np.ndarray]) -> None:
    """Neighbours an atom of one asymmetric unit has within 2, 4 and 6 Å; in 5a1a 2.1, 12 and 41."""
    xyz = d2[0]
    some = xyz[: len(xyz) // 4 : 20]
    distance = np.linalg.norm(some[:, None] - xyz, axis=2)
    within = {r: (distance < r).sum() / len(some) - 1 for r in (1.0, 2.0, 4.0, 6.0)}
    assert within[1.0] < 0.1  # clashes
    assert 1.8 < within[2.0] < 2.6 and 9 < within[4.0] < 16 and 30 < within[6.0] < 55


def test_power_spectrum_is_that_of_a_protein(shared: Path, d2: tuple[np.ndarray, np.ndarray]) -> None:
    shells = slice(int(120 * 1.9 / 20), int(120 * 1.9 / 4) + 1)  # 20 to 4 Å
    ratio = rotational_power(*d2)[shells] / rotational_power(*read_atoms(shared / "data/models/5a1a.pdb"))[shells]
    assert 1 / 3 < ratio.min() and ratio.max() < 3
