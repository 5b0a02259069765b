"""New, to be gone on with, or finished; and never deleted."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchem.errors import InputError
from torchem.runtime.run_folder import changes, flatten, inspect, move_aside, prepare, write_settings


def test_no_folder(tmp_path: Path) -> None:
    state = inspect(tmp_path / "none")
    assert (state.settings, state.iteration, state.finished, state.used) == (None, None, False, False)


def test_last_whole_iteration(tmp_path: Path) -> None:
    for name in ("run_it000_optimiser.star", "run_it009_optimiser.star", "run_it010_optimiser.star"):
        (tmp_path / name).touch()
    # begun, not whole
    (tmp_path / "run_it011_data.star").touch()
    (tmp_path / ".run_it011_optimiser.star.1.part").touch()
    state = inspect(tmp_path)
    assert state.iteration == 10 and state.used and not state.finished
    (tmp_path / "run_optimiser.star").touch()
    assert inspect(tmp_path).finished


def test_settings_are_kept(tmp_path: Path) -> None:
    settings = {"seed": 1, "dataset": {"star": "a b.star", "root": None}, "sampling": {"perturb": 0.5}}
    write_settings(tmp_path, settings)
    assert inspect(tmp_path).settings == settings
    before = (tmp_path / "config.yaml").read_bytes()
    write_settings(tmp_path, settings)
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("content", ["just text", "[1, 2", "\x00\x01"])
def test_garbled_settings(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"config.yaml: not a torchem configuration; .*run_name=NEW"):
        inspect(tmp_path)


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}


def test_changes_that_matter() -> None:
    before = {"seed": 1, "ctf": True, "device": "cpu", "distributed": {"backend": "gloo"}, "dataset": {"root": None}}
    now = {"seed": 2, "ctf": False, "device": "cuda", "distributed": {"backend": "nccl"}, "dataset": {"root": "x"}}
    assert changes(before, now) == ["ctf: true -> false", "dataset.root: none -> x", "seed: 1 -> 2"]
    assert changes(before, before | {"device": "cuda", "resume": "auto"}) == []


def test_move_aside_keeps_everything(tmp_path: Path) -> None:
    for content in ("first", "second"):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "a").write_text(content)
        move_aside(folder)
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "run.1" / "a").read_text() == "first"
    assert (tmp_path / "run.2" / "a").read_text() == "second"


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/run: cannot write there \(.*\); .*hydra.run.dir"):
        prepare(tmp_path / "file" / "run", 0)


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(InputError, match=r"Permission denied\); .*hydra.run.dir"):
        prepare(tmp_path, 0)


def test_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    prepare(tmp_path, 1_999_999)
    with pytest.raises(InputError, match=r"0.002 GB left and this needs about 5 GB; .*hydra.run.dir"):
        prepare(tmp_path, 5_000_000_000)
