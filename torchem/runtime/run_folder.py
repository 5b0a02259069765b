"""The folder of a run: whether it is new, to be gone on with, or finished.

A run is its folder: ``config.yaml`` holds the settings, the file that an iteration writes last marks it as whole
(``run_it*_optimiser.star``, of an alignment ``run_it*_data.star``), its like without a number the end. Nothing is ever
deleted.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchem.errors import InputError

log = logging.getLogger(__name__)

# ends the name of the file that an iteration writes last: of a refinement, and of an alignment
REFINED, ALIGNED = "optimiser.star", "data.star"
# an option that only settings of this command have
_OWN = {REFINED: "sampling", ALIGNED: "mode"}
# what may differ between two commands of one run: the result does not hang on it
_FREE = ("device", "distributed.", "memory.", "resume", "run_name", "dataset.source")


@dataclass(frozen=True)
class RunState:
    """What is in a run folder."""

    folder: Path
    settings: dict[str, Any] | None  # config.yaml, None if there is none
    iteration: int | None  # last one written whole
    finished: bool
    foreign: bool = False  # config.yaml is another command's

    @classmethod
    def new(cls, folder: Path) -> RunState:
        """Of a folder in which nothing is, or what is there is to be moved aside."""
        return cls(folder, None, None, finished=False)

    @property
    def used(self) -> bool:
        return self.iteration is not None or self.finished

    @property
    def stem(self) -> str:
        """How the names of the result's files begin, or of the last iteration's where there is no result."""
        return "run" if self.finished else f"run_it{self.iteration:03d}"


def inspect(folder: Path, mark: str = REFINED) -> RunState:
    """Read the state of a run folder, which need not exist; ``mark`` ends the name of what is written last."""
    names = os.listdir(folder) if folder.is_dir() else []
    iteration = re.compile(rf"run_it(\d{{3,}})_{re.escape(mark)}")
    iterations = [int(match[1]) for name in names if (match := iteration.fullmatch(name))]
    settings = None
    if "config.yaml" in names:
        try:
            settings = yaml.safe_load((folder / "config.yaml").read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            settings = None
        if not isinstance(settings, dict):
            raise InputError(f"{folder / 'config.yaml'}: not a torchem configuration; choose another run_name=NEW")
    foreign = settings is not None and _OWN[mark] not in settings
    return RunState(folder, settings, max(iterations, default=None), f"run_{mark}" in names, foreign)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"sampling.offset_step": 2.0}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def may_change(option: str) -> bool:
    """Whether two commands of one run may differ in `option`."""
    return option.startswith(_FREE)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """Lines ``option: old value -> new value`` for all that differs and matters to the result, `but` some options."""
    old, new = flatten(before), flatten(now)
    return [
        f"{option}: {_shown(old.get(option))} -> {_shown(new.get(option))}"
        for option in sorted(old.keys() | new.keys())
        if old.get(option) != new.get(option) and not may_change(option) and option not in but
    ]


def refuse_other(state: RunState, now: Mapping[str, Any], but: Collection[str] = ()) -> None:
    """Raise `InputError` if what a folder holds was not begun with the settings `now`, `but` some options."""
    folder = state.folder
    if state.foreign:
        raise InputError(f"{folder}: holds what another command of torchem made; choose another with run_name=NEW")
    if not state.used:
        return
    if state.settings is None:
        raise InputError(f"{folder}: holds a run that torchem did not start; choose another with run_name=NEW")
    if changed := changes(state.settings, now, but):
        raise InputError(
            f"{folder}: holds a run with other settings; start a new one with run_name=NEW, "
            "or move this one aside with resume=never. Changed:\n  " + "\n  ".join(changed)
        )


def settings_of(folder: Path, mark: str = REFINED) -> dict[str, Any]:
    """Settings of the run in `folder`.

    Raises
    ------
    InputError
        No run is there.
    """
    state = inspect(folder, mark)
    if state.settings is None:
        raise InputError(f"resume={folder}: no run is there; give the folder that holds its config.yaml")
    if state.foreign:
        raise InputError(f"resume={folder}: what is there is another command's; give the folder of a run of this one")
    return state.settings


def last_checkpoint(folder: Path, mark: str = REFINED) -> Path:
    """Checkpoint of the last iteration that `folder` holds whole.

    Raises
    ------
    InputError
        There is none.
    """
    checkpoints = {path.name[6:-14]: path for path in folder.glob("run_it*_checkpoint.pt")}
    whole = [number for number in checkpoints if (folder / f"run_it{number}_{mark}").is_file()]
    if not whole:
        raise InputError(f"{folder}: holds no whole iteration of torchem; start a new run with run_name=NEW")
    return checkpoints[max(whole, key=int)]


def refuse_other_input(folder: Path, what: str, before: tuple[int, int], source: str, now: tuple[int, int]) -> None:
    """Raise `InputError` unless a run in `folder` was begun with as many of `what`, and as large, as `source` has."""
    if before != now:
        raise InputError(
            f"{folder}: was begun with {before[0]} {what} of {before[1]} px, but {source} has {now[0]} of {now[1]} px; "
            f"give the same {what}, or start a new run with run_name=NEW"
        )


def is_newer(path: Path, than: Path) -> bool:
    """Whether a file is there and was written after another one."""
    return path.is_file() and path.stat().st_mtime_ns >= than.stat().st_mtime_ns


def make_room(folder: Path, mark: str = REFINED) -> None:
    """Move what a run left in `folder` aside, if it did, and say so."""
    state = inspect(folder, mark)
    if state.used or state.settings is not None:
        log.info("%s moved aside to %s", folder, move_aside(folder))


def move_aside(folder: Path) -> Path:
    """Rename `folder` to the first free of ``NAME.1``, ``NAME.2``, …; returns the new name."""
    folder = folder.resolve()
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def prepare(folder: Path, n_bytes: int) -> None:
    """Make `folder` and see that it can be written to and that its disk has `n_bytes` left.

    Raises
    ------
    InputError
        It cannot, or has not.
    """
    remedy = "choose another folder with hydra.run.dir=FOLDER"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror}); {remedy}") from error
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise InputError(
            f"{folder}: the disk has {free / 1e9:.3g} GB left and this needs about {n_bytes / 1e9:.3g} GB; "
            f"make room, or {remedy}"
        )


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep `settings` as the run's ``config.yaml``."""
    temporary = folder / f".config.yaml.{os.getpid()}"
    temporary.write_text(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    os.replace(temporary, folder / "config.yaml")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
