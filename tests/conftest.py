"""Fixtures that several test files share."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from torchem.data.mrc import write_map, write_stack
from torchem.data.star import write_star

# processes that tests start find this checkout first, and then what this process found
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")))
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of example data that lies beside some checkouts; the test is skipped where it does not."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"example data {folder} is not here")
    return folder


@pytest.fixture
def small_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes 12 particles × 16 px of 4 Å (white noise) and a reference to the current folder.

    It changes the tables first as told by ``change(optics, particles, images)``, which may return other images.
    """
    monkeypatch.chdir(tmp_path)

    def write(change: Callable | None = None, n: int = 12, box: int = 16) -> Path:
        images = np.random.default_rng(1).standard_normal((n, box, box)).astype(np.float32)
        optics = pd.DataFrame(
            {
                "rlnOpticsGroup": [1],
                "rlnOpticsGroupName": ["opticsGroup1"],
                "rlnVoltage": [300.0],
                "rlnSphericalAberration": [2.7],
                "rlnAmplitudeContrast": [0.1],
                "rlnImagePixelSize": [4.0],
                "rlnImageSize": [box],
                "rlnImageDimensionality": [2],
            }
        )
        particles = pd.DataFrame(
            {
                "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(n)],
                "rlnOpticsGroup": 1,
                "rlnDefocusU": np.linspace(10000, 20000, n),
                "rlnDefocusV": np.linspace(10000, 20000, n),
                "rlnDefocusAngle": 0.0,
            }
        )
        changed = change(optics, particles, images) if change else None
        write_stack(tmp_path / "particles.mrcs", images if changed is None else changed, 4.0)
        write_star(tmp_path / "particles.star", {"optics": optics, "particles": particles})
        axis = np.arange(box) - box // 2
        ball = np.exp(-(axis[:, None, None] ** 2 + axis[:, None] ** 2 + (0.7 * axis) ** 2) / 12)
        write_map(tmp_path / "reference.mrc", ball.astype(np.float32), 4.0)
        return tmp_path / "particles.star"

    return write
