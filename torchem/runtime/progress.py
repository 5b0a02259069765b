"""What a run tells: bars and tidy lines on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

log = logging.getLogger("torchem")

# seconds between two lines of one task where there is no bar
_QUIET = 30.0


def duration(seconds: float) -> str:
    """Seconds for people: ``9.1 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Where a command writes while it works; the others among several processes say nothing.

    Sends the ``torchem`` logger to `stream` while it is open.

    Parameters
    ----------
    speaking
        False: only warnings and errors.
    stream
        Text stream; bars are drawn if it is a terminal.
    """

    def __init__(self, speaking: bool = True, stream: TextIO | None = None) -> None:
        stream = sys.stdout if stream is None else stream
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._bars: Bars | None = None
        if speaking and self._console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
        self._speaking = speaking
        self._handler = _Lines(self._console)

    def __enter__(self) -> Progress:
        log.setLevel(logging.INFO if self._speaking else logging.WARNING)
        log.addHandler(self._handler)
        log.propagate = False
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()
        log.removeHandler(self._handler)
        log.propagate = True

    def task(self, label: str) -> Callable[[int, int], None]:
        """A function to call with (done, total) as something long goes on; at done = total it is over."""
        bars, shown = self._bars, time.monotonic()
        bar: TaskID | None = None

        def lines(done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if done < total and now - shown > _QUIET:
                shown = now
                log.info("%s: %d of %d", label, done, total)

        def drawn(done: int, total: int) -> None:
            nonlocal bar
            assert bars is not None
            if bar is None:
                bar = bars.add_task(label, total=total)
            bars.update(bar, completed=done, total=total)
            if done >= total:
                bars.remove_task(bar)
                bar = None

        return lines if bars is None else drawn


class _Lines(logging.Handler):
    """One line a message: with the time of day in a plain log, without on a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if not self._console.is_terminal:
            text = f"{time.strftime('%H:%M:%S')} {text}"
        self._console.print(text, markup=False)
