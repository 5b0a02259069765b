"""The command: its keys, what it does about the folder, how it refuses."""

import logging
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from torchem.commands import check_option_names, to_options
from torchem.errors import InputError
from torchem.runtime import run_folder
from torchem.runtime.progress import Progress
from torchem.simulate import Settings, make

# fixed: other programs call the command with them
KEYS = """
model symmetry n_particles box pixel_size low_pass_angst orientations shift_sigma_px defocus_min_angst
defocus_max_angst astigmatism_angst voltage cs amplitude_contrast phase_shift noise.snr noise.spectrum seed
""".split()


def settings(*overrides: str) -> Settings:
    with initialize_config_module("torchem.configs", version_base="1.3"):
        config = compose("simulate", overrides=list(overrides))
    return to_options(Settings, OmegaConf.to_container(config, resolve=True))


@pytest.fixture
def small() -> Settings:
    """Two coarse images of the phantom."""
    return Settings(n_particles=2, box=24, pixel_size=9.5, device="cpu")


def test_defaults_are_those_of_the_dataclass() -> None:
    assert settings() == Settings()
    Settings().check()


@pytest.mark.parametrize("key", KEYS)
def test_fixed_key(key: str) -> None:
    assert key in run_folder.flatten(asdict(Settings()))


def test_values() -> None:
    given = settings("model=[a.pdb,b.mrc]", "noise.snr=inf", "noise.spectrum=s.txt", "low_pass_angst=8", "box=128")
    assert given.models == ["a.pdb", "b.mrc"]
    assert (given.noise.snr, given.noise.spectrum) == (float("inf"), "s.txt")
    assert (given.low_pass_angst, given.box) == (8.0, 128)
    assert settings("model=phantom").models == ["phantom"]


@pytest.mark.parametrize(
    ("argument", "advice"),
    [("n_partcles=3", "did you mean n_particles?"), ("noise.srn=1", "noise.snr"), ("+typo=3", "no option typo")],
)
def test_unknown_option(argument: str, advice: str) -> None:
    with pytest.raises(InputError, match=advice.replace("?", r"\?")):
        check_option_names([argument], run_folder.flatten(asdict(Settings())))
    arguments = ["box=32", "noise.snr=1", "hydra.run.dir=x", "name=a", "-m", "--cfg", "job"]
    check_option_names(arguments, run_folder.flatten(asdict(Settings())))


def test_made_once(small: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torchem")
    progress = Progress(speaking=False)
    make(small, tmp_path, progress)
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(made) >= {"config.yaml", "particles.star", "particles.mrcs", "truth.star", "reference.mrc"}
    # the name and the device make no difference
    make(replace(small, name="other", device="auto"), tmp_path, progress)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    assert "the particles are there" in caplog.messages[-1]
    with pytest.raises(InputError, match=r"name=NEW[^$]*n_particles: 2 -> 3"):
        make(replace(small, n_particles=3), tmp_path, progress)


def test_made_again_if_it_was_not_finished(small: Settings, tmp_path: Path) -> None:
    progress = Progress(speaking=False)
    make(small, tmp_path, progress)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "particles.mrcs").write_bytes(whole["particles.mrcs"][:2000])
    make(small, tmp_path, progress)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_command(tmp_path: Path) -> None:
    def run_module(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return run_module("torchem.simulate", *arguments)

    done = run("n_particles=20", "box=24", "pixel_size=9.5", "name=mine")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs/datasets/mine"
    assert (folder / "particles.star").is_file() and "dataset.star=outputs/datasets/mine/particles.star" in done.stdout
    # what it says next is a whole command
    refine = done.stdout.partition("refine them with")[2].split()
    assert "dataset.particle_diameter=200" in refine
    refined = run_module("torchem.refine", *refine[3:], "max_iterations=1", "device=cpu")
    assert refined.returncode == 0, refined.stderr
    refused = run("box=31", "symmetry=X")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "box=31" in refused.stderr and "symmetry=X" in refused.stderr
    wrong = run("box=many")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr and "'many'" in wrong.stderr
