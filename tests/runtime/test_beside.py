"""The second process: it does what it is told with copies, says what went wrong, and ends with the first."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchem.data.star import read_star, write_star
from torchem.errors import InputError
from torchem.runtime import beside


def test_a_function_runs_in_the_other_process(tmp_path: Path) -> None:
    beside.call(write_star, tmp_path / "a.star", {"one": {"pid": 1}}, "somebody")
    assert read_star(tmp_path / "a.star") == {"one": {"pid": 1}}
    beside.call(_note_process, tmp_path / "first")
    beside.call(_note_process, tmp_path / "second")
    first, second = ((tmp_path / name).read_text() for name in ("first", "second"))
    assert first == second != str(os.getpid())


def test_what_went_wrong_is_raised(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*nowhere/a.star: No such file"):
        beside.call(write_star, tmp_path / "nowhere" / "a.star", {})
    with pytest.raises(ZeroDivisionError) as raised:
        beside.call(divmod, 1, 0)
    assert "function(*arguments)" in raised.value.__notes__[0]


def test_an_ended_process_is_named_and_the_next_call_starts_another(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with status -9"):
        beside.call(signal.raise_signal, signal.SIGKILL)
    beside.call(_note_process, tmp_path / "again")
    assert (tmp_path / "again").exists()


def test_it_ends_with_the_first(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from torchem.runtime import beside; "
        "from tests.runtime.test_beside import _note_process; beside.call(_note_process, Path(sys.argv[1])); "
        "print('ready', flush=True); time.sleep(60)"
    )
    for how in (signal.SIGKILL, signal.SIGTERM):
        note = tmp_path / how.name
        first = subprocess.Popen([sys.executable, "-c", program, note], stdout=subprocess.PIPE, text=True)
        assert first.stdout is not None and first.stdout.readline() == "ready\n"
        second = int(note.read_text())
        os.kill(second, signal.SIGINT)  # which is not for it
        first.send_signal(how)
        first.wait()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{second}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{second}/cmdline").exists() or not Path(f"/proc/{second}/cmdline").read_bytes()


def _note_process(path: Path) -> None:
    path.write_text(str(os.getpid()))
