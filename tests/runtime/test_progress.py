"""What a run tells."""

import io
import logging

import pytest

from torchem.runtime import progress as module
from torchem.runtime.progress import Progress, duration

log = logging.getLogger("torchem.somewhere")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.99, "1 min 00 s"), (245.2, "4 min 05 s"), (7800, "2 h 10 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(stream=stream):
        log.info("iteration %d: [7] 12 Å", 3)
        log.warning("particle 4 is skipped")
    lines = stream.getvalue().splitlines()
    assert [line[9:] for line in lines] == ["iteration 3: [7] 12 Å", "warning: particle 4 is skipped"]
    assert lines[0][2] == lines[0][5] == ":"
    assert "\x1b" not in stream.getvalue()


def test_long_lines_are_not_broken() -> None:
    stream = io.StringIO()
    with Progress(stream=stream):
        log.info("x" * 500)
    assert len(stream.getvalue().splitlines()) == 1


def test_other_processes_only_warn() -> None:
    stream = io.StringIO()
    with Progress(speaking=False, stream=stream) as progress:
        log.info("iteration 1")
        progress.task("reading")(1, 1)
        log.warning("particle 4 is skipped")
    assert stream.getvalue()[9:] == "warning: particle 4 is skipped\n"


def test_task_without_terminal_speaks_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 31.0, 40.0, 99.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        update = progress.task("simulating")
        for done in (1, 2, 3, 4):
            update(done, 4)
    assert [line[9:] for line in stream.getvalue().splitlines()] == ["simulating: 2 of 4"]


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(stream=stream) as progress:
        update = progress.task("simulating")
        update(1, 4)
        log.info("iteration 1: 12 Å")
        update(4, 4)
    assert "simulating" in stream.getvalue()
    assert "iteration 1: 12 Å" in stream.getvalue()


def test_logging_is_as_before_afterwards() -> None:
    root = logging.getLogger("torchem")
    handlers = list(root.handlers)
    with pytest.raises(KeyError), Progress(stream=io.StringIO()):
        raise KeyError
    assert root.handlers == handlers and root.propagate
