"""Memory in stacks: a range of addresses for each lifetime, empty again at the end of its scope.

Lifetimes in EM are nested: run ⊃ iteration ⊃ batch of particles ⊃ chunk of orientations (Zhang et al. 2018, §3). Where
the arena is installed, ``with scope("batch"):`` ends with all gone that was made in it, and ``with place("run"):`` puts
a result of an inner scope where it belongs; elsewhere both do nothing. The work is done by
``kernels/stack_allocator.c``, compiled when it is first needed and kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from importlib import resources
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import torch

from torchem.errors import InputError

log = logging.getLogger(__name__)

LIFETIMES = ("run", "iteration", "batch", "chunk")
# kinds of events in a trace
EVENTS = ("allocate", "release", "open", "close", "map", "unmap")

_FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-fexceptions", "-pthread")
_DRIVER = "libcuda.so.1"
_EVENT = np.dtype([("seconds", "f8"), ("kind", "i4"), ("range", "i4"), ("size", "i8"), ("top", "i8"), ("live", "i8")])
_SURVIVOR = np.dtype([("size", "i8"), ("where", "u8")])
_NOTHING: AbstractContextManager[None] = nullcontext()
_installed: Arena | None = None


class ScopeError(RuntimeError):
    """A scope opened or used out of order, or one that ended before what was made in it."""


@dataclass(frozen=True)
class RangeStatistics:
    """One range of addresses, in bytes; its holes are ``top - live``."""

    live: int
    top: int
    mapped: int
    blocks: int
    peak_live: int
    peak_top: int
    peak_mapped: int
    peak_holes: int


@dataclass(frozen=True)
class Statistics:
    """All ranges, in bytes.

    Attributes
    ----------
    ranges
        by lifetime.
    allocations, elsewhere
        requests served; of them, those of other streams and threads, which went to the run range.
    survivors
        blocks that outlived their scope.
    moved
        chunks taken from the idle end of another range when there were no more.
    strays
        releases of what was no live block.
    """

    ranges: dict[str, RangeStatistics]
    live: int
    mapped: int
    peak_live: int
    peak_mapped: int
    allocations: int
    elsewhere: int
    survivors: int
    moved: int
    strays: int


_Where = ctypes.CFUNCTYPE(ctypes.c_uint64)


class Arena:
    """Ranges of addresses for the four lifetimes over one pool of equal physical chunks.

    Requests go to the range of the innermost open scope; those of other threads than the one that opened it, and of
    other streams than the default one, go to the run range.

    Parameters
    ----------
    limit
        bytes that may be mapped; 0: all that the device has.
    chunk
        bytes of a chunk, a multiple of 2 MiB.
    strict
        raise for what outlives its scope; else it is kept, counted and logged.
    driver
        file name of CUDA's driver library; None: host memory.
    device
        number of the GPU.
    """

    def __init__(
        self, limit: int, *, chunk: int = 2 << 20, strict: bool = False, driver: str | None = None, device: int = 0
    ) -> None:
        if chunk <= 0 or chunk % (2 << 20):
            raise ValueError(f"chunk={chunk}: must be a multiple of 2 MiB")
        if limit < 0 or (limit < chunk and (limit or driver is None)):
            raise ValueError(f"limit={limit}: must be at least one chunk of {chunk} bytes")
        self.strict, self.device = strict, device
        self._library = _load()
        self._handle = self._library.stack_new(driver.encode() if driver else None, device, limit, chunk)
        if not self._handle:
            raise MemoryError("no host memory is left for the books of an arena")
        # freed only with the last block; at exit the system is quicker, and tensors may still be there
        weakref.finalize(self, self._library.stack_delete, self._handle).atexit = False
        self._told: set[str] = set()
        self._where, self._describe = _traceback_keys()
        if strict:
            self._library.stack_ask_where(self._handle, self._where)

    def allocate(self, n_bytes: int, *, device: int | None = None, stream: int = 0) -> int:
        """Address of a block, aligned to 512 bytes; 0 for no bytes.

        Raises
        ------
        MemoryError
            There is no room, or the device is another one; with the plan, range by range.
        """
        address = self._library.stack_allocate(self._handle, n_bytes, self.device if device is None else device, stream)
        if not address and n_bytes:
            raise MemoryError(self._error())
        return address or 0

    def release(self, address: int) -> None:
        """Give a block back."""
        if self._library.stack_release(self._handle, address) < 0:
            raise ValueError(self._error())

    def record_stream(self, address: int, stream: int) -> None:
        """Note that another stream works on a block: released, it waits for what that stream then has to do."""
        if self._library.stack_record(self._handle, address, stream) < 0:
            raise ValueError(self._error())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor in host memory of the arena, released with its last view."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if not n_bytes:
            return torch.empty(shape, dtype=dtype)
        address = self.allocate(n_bytes)
        buffer = (ctypes.c_char * n_bytes).from_address(address)
        weakref.finalize(buffer, self.release, address).atexit = False
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Take what is made inside from the lifetime's range, which at the end is empty again down to where it was.

        Raises
        ------
        ScopeError
            Opened inside a shorter lifetime; or something outlives it, and the arena is strict.
        """
        if self._library.stack_open(self._handle, _number(name)) < 0:
            raise ScopeError(self._error())
        try:
            yield
        except BaseException:
            # its traceback holds tensors of this scope, and matters more than they
            self._close(name, strict=False)
            raise
        self._close(name, self.strict)

    @contextmanager
    def place(self, name: str) -> Iterator[None]:
        """Take what is made inside from the range of another lifetime that has a scope open.

        Raises
        ------
        ScopeError
            It has none.
        """
        before = self._library.stack_place(self._handle, _number(name))
        if before < 0:
            raise ScopeError(self._error())
        try:
            yield
        finally:
            self._library.stack_place(self._handle, before)

    def statistics(self) -> Statistics:
        """What is live, mapped and empty now, and was at most."""
        width = len(fields(RangeStatistics))
        figures = np.empty(len(LIFETIMES) * width + len(fields(Statistics)) - 1, np.int64)
        self._library.stack_figures(self._handle, figures.ctypes.data)
        values = iter(figures.tolist())
        ranges = {name: RangeStatistics(*islice(values, width)) for name in LIFETIMES}
        return Statistics(ranges, *values)

    def plan(self) -> str:
        """What is where, range by range, for people."""
        return self._library.stack_plan(self._handle).decode()

    def trace(self, on: bool = True) -> None:
        """Record every event from now on, or no more."""
        self._library.stack_trace(self._handle, on)

    def events(self) -> np.ndarray:
        """Recorded events: seconds, kind (number in ``EVENTS``), range, and its size, top and live bytes after it."""
        events = np.empty(self._library.stack_events(self._handle, None, 0), _EVENT)
        self._library.stack_events(self._handle, events.ctypes.data, len(events))
        return events

    def _close(self, name: str, strict: bool) -> None:
        listed = np.empty(8, _SURVIVOR)
        count = self._library.stack_close(self._handle, listed.ctypes.data, len(listed))
        if count < 0:
            raise ScopeError(self._error())
        if not count:
            return
        lines = [f"{size} bytes, made {self._describe(where)}" for size, where in listed[:count].tolist()]
        text = "\n".join([f"{count} block(s) outlive their scope, {name!r}:", *lines])
        if strict:
            raise ScopeError(text)
        # the same scope comes again and again
        log.log(logging.DEBUG if name in self._told else logging.WARNING, "%s", text)
        self._told.add(name)

    def _error(self) -> str:
        return self._library.stack_error().decode()


def install(device: int, *, limit: int = 0, chunk: int = 32 << 20, strict: bool = False) -> Arena:
    """Make an arena PyTorch's allocator on a GPU, for the rest of this process; CUDA starts with the first tensor.

    Parameters
    ----------
    device
        number of the GPU, the only one this process may use.
    limit, chunk, strict
        see :class:`Arena`.

    Raises
    ------
    RuntimeError
        CUDA has started, or another arena is installed.
    InputError
        This PyTorch has no CUDA, or there is no C compiler.
    """
    global _installed
    if _installed is not None:
        raise RuntimeError("an arena is installed in this process, and it stays")
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA has started with PyTorch's allocator; install the arena before the first CUDA call")
    if not torch.backends.cuda.is_built():
        raise InputError("this PyTorch is built without CUDA; use memory.allocator=torch")
    arena = Arena(limit, chunk=chunk, strict=strict, driver=_DRIVER, device=device)
    allocator = torch.cuda.memory.CUDAPluggableAllocator(str(_compiled()), "torch_malloc", "torch_free")
    record = ctypes.cast(arena._library.torch_record_stream, ctypes.c_void_p).value
    allocator.allocator().set_record_stream_fn(record)
    arena._library.stack_serve(arena._handle)
    torch.cuda.memory.change_current_allocator(allocator)
    _installed = arena
    return arena


def scope(name: str) -> AbstractContextManager[None]:
    """:meth:`Arena.scope` of the installed arena; without one, nothing."""
    return _NOTHING if _installed is None else _installed.scope(name)


def place(name: str) -> AbstractContextManager[None]:
    """:meth:`Arena.place` of the installed arena; without one, nothing."""
    return _NOTHING if _installed is None else _installed.place(name)


def _number(name: str) -> int:
    if name not in LIFETIMES:
        raise ValueError(f"no lifetime {name!r}; there are {', '.join(LIFETIMES)}")
    return LIFETIMES.index(name)


def _traceback_keys(depth: int = 6) -> tuple[Callable[[], int], Callable[[int], str]]:
    """A C function that gives the calling lines of Python a number, and one that describes that number."""
    keys: dict[tuple[tuple[CodeType, int], ...], int] = {}

    def where() -> int:
        frame: FrameType | None = sys._getframe(1)
        trail: list[tuple[CodeType, int]] = []
        while frame is not None and len(trail) < depth:
            if frame.f_code.co_filename != __file__:
                trail.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        return keys.setdefault(tuple(trail), len(keys) + 1)

    def describe(key: int) -> str:
        if not key:
            return "somewhere (memory.strict=true tells where)"
        trail = list(keys)[key - 1]
        return ", called ".join(f"at {code.co_filename}:{line} in {code.co_name}" for code, line in trail)

    return _Where(where), describe


@functools.cache
def _compiled() -> Path:
    """The compiled allocator, from the cache folder if it is there.

    Raises
    ------
    InputError
        No C compiler, or it fails; no cache folder.
    """
    source = resources.files("torchem.kernels").joinpath("stack_allocator.c").read_bytes()
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    key = hashlib.sha256(b"\0".join([source, *(flag.encode() for flag in _FLAGS), platform.machine().encode()]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torchem"
    library = folder / f"stack_allocator-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    if compiler is None:
        raise InputError(f"the stack needs a C compiler, and there is no {' or '.join(names)}; install gcc, or set CC")
    # another process may compile it, too: each writes its own file, and the last to be renamed stays
    mine = library.with_suffix(f".{os.getpid()}.so")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        command = [compiler, *_FLAGS, "-x", "c", "-", "-o", str(mine), "-ldl"]
        subprocess.run(command, input=source, check=True, capture_output=True)
        os.replace(mine, library)
    except subprocess.CalledProcessError as error:
        raise InputError(f"{compiler} cannot compile the stack allocator:\n{error.stderr.decode()}") from error
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written") from error
    return library


@functools.cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_compiled()))
    size, pointer, number, text = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, *arguments in (
        ("stack_new", pointer, text, number, size, size),
        ("stack_delete", None, pointer),
        ("stack_allocate", pointer, pointer, size, number, pointer),
        ("stack_release", number, pointer, pointer),
        ("stack_record", number, pointer, pointer, pointer),
        ("stack_open", number, pointer, number),
        ("stack_close", ctypes.c_int64, pointer, pointer, ctypes.c_int64),
        ("stack_place", number, pointer, number),
        ("stack_figures", None, pointer, pointer),
        ("stack_plan", text, pointer),
        ("stack_error", text),
        ("stack_ask_where", None, pointer, _Where),
        ("stack_trace", None, pointer, number),
        ("stack_events", ctypes.c_int64, pointer, pointer, ctypes.c_int64),
        ("stack_serve", None, pointer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
