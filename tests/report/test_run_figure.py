"""The picture of a run, from files alone."""

import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from torchem.data.mrc import write_map
from torchem.data.star import write_star
from torchem.report.run_figure import run_figure


def write_model(path: Path, resolution: float) -> None:
    frequency = np.arange(17) / (32 * 4.0)
    shells = pd.DataFrame({"rlnResolution": frequency, "rlnGoldStandardFsc": np.exp(-((frequency * resolution) ** 2))})
    write_star(path, {"model_general": {"rlnCurrentResolution": resolution}, "model_class_1": shells})


def write_run(folder: Path, stem: str, half: str) -> None:
    rng = np.random.default_rng(1)
    write_model(folder / f"{stem}{half}_model.star", 14.0)
    write_map(folder / f"{stem}{half}_class001.mrc", rng.standard_normal((32, 32, 32)), 4.0)
    angles = pd.DataFrame({"rlnAngleRot": rng.uniform(-180, 180, 50), "rlnAngleTilt": rng.uniform(0, 180, 50)})
    write_star(folder / f"{stem}_data.star", {"particles": angles})


@pytest.mark.parametrize("iterations", [0, 3])
def test_of_a_finished_run(tmp_path: Path, iterations: int) -> None:
    write_run(tmp_path, "run", "")
    for iteration in range(iterations):
        write_model(tmp_path / f"run_it{iteration:03d}_half1_model.star", 60.0 / (iteration + 1))
    path = run_figure(tmp_path, "particles, C1: 15.3 Å")
    assert path == tmp_path / "run.png"
    assert matplotlib.image.imread(path).shape[1] > 1000
    # the same bytes from the same files; others when marked
    plain = path.read_bytes()
    assert run_figure(tmp_path, "particles, C1: 15.3 Å").read_bytes() == plain
    assert run_figure(tmp_path, "particles, C1: 15.3 Å", simulated=True).read_bytes() != plain
    assert not [file for file in tmp_path.iterdir() if "part." in file.name]


def test_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    write_model(tmp_path / "run_it001_half1_model.star", 40.0)
    write_run(tmp_path, "run_it002", "_half1")
    assert run_figure(tmp_path, "stopped").stat().st_size > 10_000


def test_of_relions_files(shared: Path, tmp_path: Path) -> None:
    for file in (shared / "data" / "relion_parity" / "auto_cc").glob("run_it*"):
        shutil.copy(file, tmp_path)
    assert run_figure(tmp_path, "RELION").stat().st_size > 10_000
