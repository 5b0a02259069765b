"""A second Python process, for what takes Python long: a thread would hold up all others of this one."""

import atexit
import importlib
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

_START = (
    "import pickle, sys; sys.path[:], modules = pickle.load(sys.stdin.buffer); "
    "from torchem.runtime.beside import serve; serve(sys.stdin.buffer, modules)"
)
_lock = threading.RLock()
_process: subprocess.Popen[bytes] | None = None


def start(*modules: str) -> None:
    """Start the process, if it is not there, and let it import what will be called; it ends with this one."""
    global _process
    with _lock:
        if _process is None:
            _process = subprocess.Popen([sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            atexit.register(_end, _process)
            _send(_process, (sys.path, modules))


def call(function: Callable[..., object], *arguments: Any) -> None:
    """Call a module's function with copies of the arguments in the second process, and wait until it is through.

    The process is started if it is not there; an interrupt from the keyboard passes it by.

    Raises
    ------
    Exception
        What the function raised.
    RuntimeError
        The process was ended from outside.
    """
    global _process
    with _lock:
        start()
        process = _process
        assert process is not None
        try:
            _send(process, (function, arguments))
            assert process.stdout is not None
            error = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as ended:
            _process = None
            raise RuntimeError(f"the process that writes files ended with status {process.wait()}") from ended
    if error is not None:
        raise error


def serve(requests: BinaryIO, modules: Iterable[str]) -> None:
    """What the second process does: import, then call what it is told to, until the first one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # what is printed is for people
    while True:
        try:
            function, arguments = pickle.load(requests)
        except (EOFError, pickle.UnpicklingError):
            return
        error: BaseException | None = None
        try:
            function(*arguments)
        except Exception as raised:
            raised.add_note(traceback.format_exc())
            error = raised
        pickle.dump(error, answers)
        answers.flush()


def _send(process: subprocess.Popen[bytes], message: object) -> None:
    assert process.stdin is not None
    pickle.dump(message, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
    process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass
    process.wait()
