"""The command: which images it takes, what it leaves in a run folder, and several processes."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from tests.mra.blobs import blobs
from torchem.align import known_options, plan, prepare, run
from torchem.commands import check_option_names, to_options
from torchem.data.mrc import read_map, write_stack
from torchem.data.star import read_star, write_star
from torchem.em.options import RefineOptions
from torchem.errors import InputError
from torchem.mra.options import AlignDataset, AlignOptions
from torchem.runtime.distributed import World
from torchem.runtime.progress import Progress
from torchem.runtime.run_folder import write_settings

OUT = Path("out")
OPTIONS = AlignOptions(
    images="particles.mrcs", references="refs.mrcs", last_ring=9, x_range=2, y_range=2, max_iterations=2, device="cpu"
)

# fixed: other programs call the command with them
KEYS = """
mode dataset.star dataset.root dataset.pixel_size images references n_classes first_ring last_ring x_range y_range step
mirror max_iterations seed device resume run_name
""".split()


@pytest.fixture(autouse=True)
def truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """40 images × 24 px of 2 Å in the current folder, as a stack and a table, and their references."""
    monkeypatch.chdir(tmp_path)
    made = blobs(40, 3)
    write_stack("particles.mrcs", made.images, 2.0)
    write_stack("refs.mrcs", made.references, 2.0)
    optics = pd.DataFrame({"rlnOpticsGroup": [1], "rlnImagePixelSize": [2.0], "rlnImageSize": [24]})
    names = [f"{i + 1:06d}@particles.mrcs" for i in range(40)]
    particles = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": 1, "rlnDefocusU": 1e4})
    write_star("particles.star", {"optics": optics, "particles": particles})
    return made.class_id


def align(options: AlignOptions) -> pd.DataFrame:
    with Progress() as progress:
        run(options, OUT, World(), progress)
    return pd.read_csv(OUT / "run_params.csv")


def test_keys_and_defaults() -> None:
    with initialize_config_module("torchem.configs", version_base="1.3"):
        config = compose("align")
    assert to_options(AlignOptions, OmegaConf.to_container(config, resolve=True)) == AlignOptions()
    check_option_names([f"{key}=1" for key in KEYS], known_options())


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        (["images=a/mine.mrcs"], "outputs/mine/align"),
        (["dataset.star=b/table.star", "run_name=second"], "outputs/table/second"),
        (["images='bdb:folder#stack'"], "outputs/stack/align"),
        (["dataset.name=x", "images=y.hdf"], "outputs/x/align"),
    ],
)
def test_run_folder_is_named_after_the_images(overrides: list[str], folder: str) -> None:
    with initialize_config_module("torchem.configs", version_base="1.3"):
        config = compose("align", overrides=overrides, return_hydra_config=True)
    assert config.hydra.run.dir == folder


def test_files_of_a_run(truth: np.ndarray) -> None:
    table = align(OPTIONS)
    assert list(table)[:7] == ["image", "class_id", "mirror", "alpha", "sx", "sy", "peak"]
    assert table["class_id"].tolist() == truth.tolist()
    averages, pixel_size = read_map(OUT / "run_classes.mrcs")
    assert averages.shape == (3, 24, 24) and pixel_size == 2
    relion = read_star(OUT / "run_data.star")["particles"]
    assert (relion["rlnClassNumber"] == table["class_id"] + 1).all()
    assert {"rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnIsFlip"} <= set(relion)
    page = (OUT / "run_report.html").read_text()
    assert "Class averages" in page and (OUT / "run.png").stat().st_size > 5_000
    assert len(list(OUT.glob("run_it00[12]_checkpoint.pt"))) == 2


def test_table_keeps_its_columns() -> None:
    align(replace(OPTIONS, images=None, dataset=AlignDataset(star="particles.star")))
    written = read_star(OUT / "run_data.star")
    assert (written["particles"]["rlnDefocusU"] == 1e4).all() and "optics" in written


def test_table_of_a_stack_is_aligned_again() -> None:
    found = align(OPTIONS)
    written = read_star(OUT / "run_data.star")
    assert written["optics"]["rlnImagePixelSize"].tolist() == [2.0]
    shutil.move(OUT, "stack")
    again = align(replace(OPTIONS, images=None, dataset=AlignDataset(star="stack/run_data.star")))
    pd.testing.assert_frame_equal(again, found)


def test_reference_free() -> None:
    table = align(replace(OPTIONS, mode="rfa", references=None))
    assert (table["class_id"] == 0).all() and read_map(OUT / "run_classes.mrcs")[0].shape == (1, 24, 24)


def test_goes_on_where_it_stopped(truth: np.ndarray) -> None:
    seeds = replace(OPTIONS, references=None, n_classes=3, max_iterations=3)
    whole = align(seeds)
    for path in [*OUT.glob("run_it00[23]*"), *OUT.glob("run_[cdpr]*"), OUT / "run.png"]:
        path.unlink()
    pd.testing.assert_frame_equal(align(seeds), whole)
    # finished: the same command only says so again
    before = {path: path.stat().st_mtime_ns for path in OUT.iterdir()}
    align(seeds)
    assert before == {path: path.stat().st_mtime_ns for path in OUT.iterdir()}
    with pytest.raises(InputError, match="seed: 1 -> 2"):
        align(replace(seeds, seed=2))
    align(replace(seeds, seed=2, resume="never"))
    assert (OUT.parent / "out.1" / "run_params.csv").is_file()
    with pytest.raises(InputError, match="no run is there"):
        plan(replace(seeds, resume="nix"), OUT)
    assert plan(AlignOptions(resume="out.1", device="cpu"), OUT).options.seed == 1


def test_goes_on_with_more_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    # the first halves of both runs have the same iterations: seats are taken alike
    two, three = (replace(OPTIONS, references=None, n_classes=3, max_iterations=n) for n in (2, 3))
    whole = align(three)
    shutil.move(OUT, "whole")
    align(two)
    assert "not settled (a larger one goes on), after iteration 2" in capsys.readouterr().out
    report = (OUT / "run_report.html").read_bytes()
    assert not plan(three, OUT).finished
    pd.testing.assert_frame_equal(align(three), whole)
    assert (OUT / "run_report.html").read_bytes() != report
    assert "going on after iteration 2" in capsys.readouterr().out
    assert plan(three, OUT).finished
    with pytest.raises(InputError, match="max_iterations: 3 -> 2"):
        align(two)


def test_report_of_what_went_on_is_drawn_again() -> None:
    align(OPTIONS)
    page = OUT / "run_report.html"
    # a run that went on and died before it drew
    page.write_text("old")
    os.utime(page, ns=(0, 0))
    align(OPTIONS)
    assert "Class averages" in page.read_text()


def test_finished_run_needs_neither_images_nor_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    align(OPTIONS)
    Path("particles.mrcs").unlink()
    capsys.readouterr()
    align(OPTIONS)
    assert "after iteration 2; class averages: out/run_classes.mrcs" in capsys.readouterr().out
    for path in OUT.glob("run_it*_checkpoint.pt"):
        path.unlink()
    align(OPTIONS)
    assert "done after iteration 2; class averages: out/run_classes.mrcs" in capsys.readouterr().out
    for path in OUT.glob("run_it*"):
        path.unlink()
    align(OPTIONS)
    assert "done; class averages: out/run_classes.mrcs" in capsys.readouterr().out


@pytest.mark.parametrize(("n", "box"), [(30, 24), (50, 24), (40, 30)])
def test_going_on_with_other_images_is_refused(n: int, box: int) -> None:
    begun = replace(OPTIONS, references=None, n_classes=3)
    align(begun)
    write_stack("particles.mrcs", blobs(n, 3, box).images, 2.0)
    with pytest.raises(InputError, match=rf"begun with 40 images of 24 px, but particles.mrcs has {n} of {box} px"):
        align(replace(begun, max_iterations=3))


def test_broken_checkpoint() -> None:
    align(OPTIONS)
    checkpoint = OUT / "run_it002_checkpoint.pt"
    whole = checkpoint.read_bytes()
    for broken in (b"", whole[:1000]):
        checkpoint.write_bytes(broken)
        with pytest.raises(InputError, match=r"run_it002_checkpoint.pt cannot be read .* move run_it002_\* out"):
            align(replace(OPTIONS, max_iterations=3))


def test_settled(capsys: pytest.CaptureFixture[str]) -> None:
    align(replace(OPTIONS, max_iterations=20))
    told = capsys.readouterr().out
    assert " settled after iteration" in told and "not settled" not in told
    assert plan(replace(OPTIONS, max_iterations=30), OUT).finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mrb"}, "mode=mrb: must be one of mra, rfa"),
        ({"references": None}, "give references=STACK, or n_classes=NUMBER"),
        ({"n_classes": 3}, "n_classes=3: the references in refs.mrcs say how many"),
        ({"mode": "rfa"}, "mode=rfa makes its one reference itself"),
        ({"references": None, "n_classes": 41}, "n_classes=41: there are only 40 images"),
        ({"references": "nix.mrcs"}, "nix.mrcs"),
        ({"images": None}, "no images: give images=STACK or dataset.star=TABLE"),
        ({"dataset": AlignDataset(star="particles.star")}, "leave out one of both"),
        ({"images": "nix.mrcs"}, "nix.mrcs"),
        ({"last_ring": 10}, "last_ring=10: 24 px images with shifts of 2 px have room for 9 px"),
        ({"last_ring": None, "x_range": 11}, "leave no ring"),
        ({"first_ring": 9}, "last_ring=9: must be larger than first_ring=9"),
        ({"first_ring": 0}, "first_ring=0: must be at least 1"),
        ({"step": 0}, "step=0: must be a positive"),
        ({"step": 1e-3}, "take a larger step"),
        ({"x_range": -1}, "x_range=-1: must be 0 or more"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"device": "tpu"}, "device=tpu"),
        ({"run_name": "a/b"}, "run_name=a/b"),
    ],
)
def test_bad_input_is_refused_before_any_work(change: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        prepare(plan(replace(OPTIONS, **change), OUT))
    assert message in str(error.value)
    assert not OUT.exists()


def test_references_that_are_no_numbers() -> None:
    references = read_map("refs.mrcs")[0].copy()
    references[1, 5, 5] = np.nan
    write_stack("refs.mrcs", references, 2.0)
    with pytest.raises(InputError, match=r"references=refs.mrcs: image 2 holds values that are not finite"):
        prepare(plan(OPTIONS, OUT))
    assert not OUT.exists()


def test_folder_of_a_refinement() -> None:
    OUT.mkdir()
    write_settings(OUT, asdict(RefineOptions()))
    for options in (OPTIONS, replace(OPTIONS, resume="out")):
        with pytest.raises(InputError, match="another command"):
            plan(options, OUT)


def test_references_of_another_size() -> None:
    write_stack("refs.mrcs", np.zeros((2, 20, 20), np.float32), 2.0)
    with pytest.raises(InputError, match="20 x 20 px, but the images have 24 px"):
        prepare(plan(OPTIONS, OUT))


def test_images_of_several_sizes() -> None:
    write_stack("small.mrcs", np.zeros((1, 20, 20), np.float32), 2.0)
    table = pd.DataFrame({"rlnImageName": ["000001@particles.mrcs", "000001@small.mrcs"]})
    table["rlnOpticsGroup"] = 1
    optics = pd.DataFrame({"rlnOpticsGroup": [1], "rlnImagePixelSize": [2.0]})
    write_star("mixed.star", {"optics": optics, "particles": table})
    options = replace(OPTIONS, images=None, dataset=AlignDataset(star="mixed.star"))
    with pytest.raises(InputError, match=r"small.mrcs: images of 20 px, others of mixed.star have 24 px"):
        prepare(plan(options, OUT))


def test_folder_of_another_program() -> None:
    OUT.mkdir()
    (OUT / "run_it001_data.star").touch()
    with pytest.raises(InputError, match="torchem did not start"):
        plan(OPTIONS, OUT)


def test_two_processes_find_the_same() -> None:
    options = replace(OPTIONS, references=None, n_classes=3)
    alone = align(options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        f"{key}={value}" for key, value in asdict(options).items()
        if key in ("images", "n_classes", "last_ring", "x_range", "y_range", "max_iterations", "device")
    ]  # fmt: skip
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "torchem.align", *arguments, "hydra.run.dir=two"],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in ranks] == [0, 0]
    together = pd.read_csv("two/run_params.csv")
    for name in ("class_id", "mirror"):
        assert (together[name] == alone[name]).all()
    # single precision leaves some 1e-6 radians open, more or less with the number of threads
    for name, error in {"alpha": 1e-3, "sx": 1e-4, "sy": 1e-4, "peak": 1e-4}.items():
        np.testing.assert_allclose(together[name], alone[name], atol=error)
