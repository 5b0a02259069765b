"""Every kind of bad input is refused before any work, in one message that names what is wrong and what helps."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from torchem.data.mrc import write_map
from torchem.em.options import DatasetOptions, ReferenceOptions, RefineOptions
from torchem.errors import InputError
from torchem.refine import plan, prepare
from torchem.runtime.progress import Progress

RUN = Path("out")


def options(**dataset: object) -> RefineOptions:
    described = DatasetOptions(star="particles.star", particle_diameter=50.0, symmetry="C1")
    return RefineOptions(
        dataset=replace(described, **dataset),  # type: ignore[arg-type]
        reference=ReferenceOptions(map="reference.mrc", ini_high=30.0),
    )


def refused(options: RefineOptions) -> str:
    """The message with which the command's checks refuse these options; nothing of the run is there yet."""
    with pytest.raises(InputError) as error:
        prepare(plan(options, RUN), Progress())
    assert not list(RUN.glob("run*")) and not (RUN / "config.yaml").exists()
    message = str(error.value)
    assert len(message.splitlines()) < 25
    return message


def test_good_input_is_not_refused(small_set: Callable) -> None:
    small_set()
    inputs = prepare(plan(options(), RUN), Progress())
    assert len(inputs.particles) == 12 and inputs.reference.shape == (16, 16, 16)
    assert (RUN / "config.yaml").is_file()


def test_missing_star(small_set: Callable) -> None:
    small_set()
    assert "dataset.star=nix.star: no such file" in refused(options(star="nix.star"))


def test_described_data_set_that_is_not_here(small_set: Callable) -> None:
    small_set()
    assert "get the data from EMPIAR-1" in refused(options(star="nix.star", source="EMPIAR-1"))


def test_name_without_star() -> None:
    assert "give dataset.star=FILE.star" in refused(RefineOptions(dataset=DatasetOptions(name="mine")))


def test_missing_stack(small_set: Callable, tmp_path: Path) -> None:
    # a name that no parent folder of the test holds, since they are searched too
    nowhere = f"{tmp_path.name}.mrcs"
    names = [f"{i + 1:06d}@{nowhere}" for i in range(12)]
    small_set(lambda optics, particles, images: particles.__setitem__("rlnImageName", names))
    message = refused(options())
    assert nowhere in message and "dataset.root" in message and str(tmp_path) in message


def test_stack_that_is_not_under_root(small_set: Callable, tmp_path: Path) -> None:
    small_set()
    (tmp_path / "elsewhere").mkdir()
    message = refused(options(root="elsewhere"))
    assert "elsewhere" in message and "particles.mrcs" in message


def test_truncated_stack(small_set: Callable, tmp_path: Path) -> None:
    small_set()
    os.truncate(tmp_path / "particles.mrcs", 5000)
    message = refused(options())
    assert "particles.mrcs" in message and "truncated" in message


@pytest.mark.parametrize("content", [b"", b"no MRC file at all" * 200])
def test_misread_stack(small_set: Callable, tmp_path: Path, content: bytes) -> None:
    small_set()
    (tmp_path / "particles.mrcs").write_bytes(content)
    assert "particles.mrcs" in refused(options())


def test_stack_of_another_box_than_the_star_says(small_set: Callable) -> None:
    small_set(lambda optics, particles, images: optics.__setitem__("rlnImageSize", 20))
    message = refused(options())
    assert "16 px" in message and "rlnImageSize 20" in message


def test_index_past_the_end(small_set: Callable) -> None:
    small_set(lambda optics, particles, images: images[:10])
    message = refused(options())
    assert "row 12" in message and "000012@particles.mrcs" in message and "past the end" in message


def test_index_zero(small_set: Callable) -> None:
    small_set(lambda optics, particles, images: particles.__setitem__("rlnImageName", ["0@particles.mrcs"] * 12))
    assert "row 1" in refused(options())


@pytest.mark.parametrize("column", ["rlnImageName", "rlnDefocusU", "rlnDefocusAngle"])
def test_star_short_of_a_column(small_set: Callable, column: str) -> None:
    small_set(lambda optics, particles, images: particles.__delitem__(column))
    message = refused(options())
    assert "particles.star" in message and column in message


@pytest.mark.parametrize("column", ["rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"])
def test_star_short_of_the_microscope(small_set: Callable, column: str) -> None:
    small_set(lambda optics, particles, images: optics.__delitem__(column))
    message = refused(options())
    assert "no CTF" in message and column in message and "ctf=false" in message


def test_star_without_pixel_size(small_set: Callable) -> None:
    small_set(lambda optics, particles, images: optics.__delitem__("rlnImagePixelSize"))
    assert "dataset.pixel_size" in refused(options())
    assert len(prepare(plan(options(pixel_size=4.0), RUN), Progress()).particles) == 12


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "just some text\n",
        lambda text: text[: len(text) * 3 // 4].rstrip()[:-20] + "\n",  # ends within a row
        lambda text: text.replace("000004@particles.mrcs", "000004@particles.mrcs 7"),
        lambda text: text[: text.index("000001@")],
        lambda text: "\x00\x01\x02" * 500,
    ],
    ids=["empty", "no star", "cut", "long row", "no particles", "binary"],
)
def test_garbled_star(small_set: Callable, tmp_path: Path, damage: Callable[[str], str]) -> None:
    star = small_set()
    star.write_text(damage(star.read_text()))
    assert "particles.star" in refused(options())


def test_value_that_is_not_a_number(small_set: Callable) -> None:
    def garble(optics: pd.DataFrame, particles: pd.DataFrame, images: np.ndarray) -> None:
        particles["rlnDefocusU"] = particles["rlnDefocusU"].astype(str)
        particles.loc[4, "rlnDefocusU"] = "1.2e"

    small_set(garble)
    message = refused(options())
    assert "row 5" in message and "rlnDefocusU" in message


def test_one_particle(small_set: Callable) -> None:
    small_set(n=1)
    assert "at least two" in refused(options())


def test_images_that_are_not_normalised(small_set: Callable) -> None:
    small_set(lambda optics, particles, images: images * 30 + 100)
    message = refused(options())
    assert "not normalised" in message and "relion_preprocess" in message


@pytest.mark.filterwarnings("ignore:Data array contains NaN:RuntimeWarning")
def test_images_without_values(small_set: Callable) -> None:
    small_set(lambda optics, particles, images: images * np.nan)
    assert "constant or not finite" in refused(options())


@pytest.mark.parametrize("diameter", [0.0, -3.0])
def test_diameter_that_is_not_positive(small_set: Callable, diameter: float) -> None:
    small_set()
    assert f"dataset.particle_diameter={diameter}" in refused(options(particle_diameter=diameter))


def test_diameter_larger_than_the_box(small_set: Callable) -> None:
    small_set()
    message = refused(options(particle_diameter=65.0))
    assert "dataset.particle_diameter=65" in message and "64" in message


def test_no_diameter(small_set: Callable) -> None:
    small_set()
    assert "dataset.particle_diameter" in refused(options(particle_diameter=None))


@pytest.mark.parametrize("symmetry", ["D", "X7", "Cs", "C3v", "D2h", "Td", "Ih", "S6", "I5"])
def test_symmetry(small_set: Callable, symmetry: str) -> None:
    small_set()
    assert f"dataset.symmetry={symmetry}" in refused(options(symmetry=symmetry))


def test_offsets_that_reach_the_edge(small_set: Callable) -> None:
    small_set()
    given = options()
    given.sampling.offset_range = 8.0
    assert "sampling.offset_range=8" in refused(given)


def test_poses_that_are_not_there(small_set: Callable) -> None:
    small_set()
    given = options()
    given.sampling.start_from_poses = True
    assert "rlnAngleRot" in refused(given)


def test_no_reference(small_set: Callable) -> None:
    small_set()
    assert "reference.map is not given" in refused(replace(options(), reference=ReferenceOptions(ini_high=30.0)))


@pytest.mark.parametrize("name", ["nix.mrc", "nix.pdb"])
def test_missing_reference(small_set: Callable, name: str) -> None:
    small_set()
    reference = ReferenceOptions(map=name, ini_high=30.0)
    assert f"reference.map={name}: no such file" in refused(replace(options(), reference=reference))


def test_reference_that_is_no_map(small_set: Callable, tmp_path: Path) -> None:
    small_set()
    (tmp_path / "reference.mrc").write_text("no map")
    assert "reference.mrc" in refused(options())


def test_reference_that_is_no_cube(small_set: Callable, tmp_path: Path) -> None:
    small_set()
    write_map(tmp_path / "reference.mrc", np.random.default_rng(1).random((16, 16, 20)), 4.0)
    message = refused(options())
    assert "20 × 16 × 16" in message and "cubic" in message


def test_reference_without_atoms(small_set: Callable, tmp_path: Path) -> None:
    small_set()
    (tmp_path / "model.pdb").write_text("REMARK nothing here\nEND\n")
    reference = ReferenceOptions(map="model.pdb", ini_high=30.0)
    assert "model.pdb" in refused(replace(options(), reference=reference))


def test_missing_mask(small_set: Callable) -> None:
    small_set()
    reference = ReferenceOptions(map="reference.mrc", ini_high=30.0, mask="nix.mrc")
    assert "reference.mask=nix.mrc: no such file" in refused(replace(options(), reference=reference))


def test_folder_that_cannot_be_written(small_set: Callable, tmp_path: Path) -> None:
    small_set()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"hydra\.run\.dir"):
        prepare(plan(options(), tmp_path / "file" / "run"), Progress())


def test_folder_that_is_too_small(small_set: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    small_set()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    message = refused(options())
    assert "0.0001 GB left" in message and "hydra.run.dir" in message


def command(*arguments: str) -> tuple[int, list[str]]:
    """Run the command as a user does; status and lines of the screen."""
    done = subprocess.run(
        [sys.executable, "-m", "torchem.refine", *arguments],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampling.healpix_ordr=3"], "did you mean sampling.healpix_order?"),
        (["sampling.healpix_order=two"], "sampling.healpix_order=two: Value 'two'"),
        (["device=cuda"], "device=cuda: PyTorch finds no CUDA device here"),
        (["dataset.symmetry=Oh", "seed=-1"], "dataset.symmetry=Oh"),
        (["hydra.run.dir=particles.star/run"], "particles.star/run: Not a directory"),
        (["dataset.stand_in.snr=1"], "name the described data set that it changes"),
        (["+dataset=nothing"], "Available options in 'dataset'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_screen_without_traceback(small_set: Callable, arguments: list[str], message: str) -> None:
    small_set()
    given = ["dataset.star=particles.star", "dataset.particle_diameter=50", "reference.map=reference.mrc"]
    status, lines = command(*given, *arguments)
    assert status == 1
    assert message in "\n".join(lines)
    assert len(lines) < 24 and not any("Traceback" in line for line in lines)
    assert not Path("outputs/particles").exists()  # Hydra's empty folder
