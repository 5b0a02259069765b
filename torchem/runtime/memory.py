"""Memory in stacks: a range of addresses for each lifetime, empty again at the end of its scope.

Lifetimes in EM are nested: run ⊃ iteration ⊃ batch of particles ⊃ chunk of orientations (Zhang et al. 2018, §3). Where
the arena is installed, ``with scope("batch"):`` ends with all gone that was made in it. ``with place("run"):`` puts a
result of an inner scope where it belongs, and ``keep(result, "run")`` copies one there that came with temporaries.
Elsewhere all three do nothing. What is made outside all scopes lives as long as the process. The work is done by
``kernels/stack_allocator.c``, compiled when it is first needed and kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from importlib import resources
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from torchem.errors import InputError

log = logging.getLogger(__name__)
T = TypeVar("T")

LIFETIMES = ("run", "iteration", "batch", "chunk")
SMALLEST_CHUNK = 2 << 20
# kinds of events in a trace
EVENTS = ("allocate", "release", "open", "close", "map", "unmap")

_FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-fexceptions", "-pthread")
_DRIVER = "libcuda.so.1"
EVENT = np.dtype(
    [("seconds", "f8"), ("kind", "i4"), ("range", "i4"), *((name, "i8") for name in ("size", "top", "live", "block"))]
)
_SURVIVOR = np.dtype([("size", "i8"), ("where", "u8")])
_NOTHING: AbstractContextManager[None] = nullcontext()
# a GPU's memory that its libraries take beside PyTorch's after the start: FFT tables, kernels
_LIBRARIES = 256 << 20
# of plans of Fourier transforms, whose tables lie outside the arena
_FFT_PLANS = 32
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
    """All ranges, in bytes; tops, and holes between them, at one time.

    Attributes
    ----------
    ranges
        by lifetime.
    holes_at_peak
        when the tops together were highest.
    waste
        most bytes that a scope left behind at its end, holes and survivors.
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
    top: int
    mapped: int
    peak_live: int
    peak_top: int
    peak_mapped: int
    peak_holes: int
    holes_at_peak: int
    waste: int
    allocations: int
    elsewhere: int
    survivors: int
    moved: int
    strays: int

    def __str__(self) -> str:
        peaks = ", ".join(f"{name} {_shown(is_.peak_top)}" for name, is_ in self.ranges.items())
        return (
            f"at most {_shown(self.peak_live)} held in {_shown(self.peak_mapped)} mapped; tops: {peaks}; holes: "
            f"{_shown(self.holes_at_peak)} at the highest top, never more than {_shown(self.peak_holes)}; "
            f"{self.survivors} blocks outlived their scopes, which left {_shown(self.waste)} behind"
        )


_Where = ctypes.CFUNCTYPE(ctypes.c_uint64)


class Arena:
    """Ranges of addresses for the four lifetimes over one pool of equal physical chunks.

    Requests go to the range of the innermost open scope; those of other threads than the one that opened it, and of
    other streams than the default one, go to the run range.

    Parameters
    ----------
    limit
        bytes that may be mapped; 0: all that a GPU has.
    chunk
        bytes of a chunk, a multiple of 2 MiB; 0: what suits the limit.
    strict
        raise for what outlives its scope; else it is kept, counted and logged.
    driver
        file name of CUDA's driver library; None: host memory.
    device
        number of the GPU.
    """

    def __init__(
        self, limit: int, *, chunk: int = 0, strict: bool = False, driver: str | None = None, device: int = 0
    ) -> None:
        if chunk < 0 or chunk % SMALLEST_CHUNK:
            raise ValueError(f"chunk={chunk}: must be a multiple of 2 MiB")
        smallest = chunk or SMALLEST_CHUNK
        if limit < 0 or (limit < smallest and (limit or driver is None)):
            raise ValueError(f"limit={limit}: must be at least one chunk of {smallest} bytes")
        self.limit, self.device = limit, device
        self.kind = "cpu" if driver is None else "cuda"
        self._library = _library()
        self._handle = self._library.stack_new(driver.encode() if driver else None, device, limit, chunk)
        if not self._handle:
            raise MemoryError("no host memory is left for the books of an arena")
        # freed only with the last block; at exit the system is quicker, and tensors may still be there
        weakref.finalize(self, self._library.stack_delete, self._handle).atexit = False
        self._told: set[str] = set()
        self._where, self._describe = _traceback_keys()
        self.be_strict(strict)

    def be_strict(self, strict: bool) -> None:
        """Raise for what outlives its scope from now on, and say where it was made; or no more."""
        self.strict = strict
        self._library.stack_ask_where(self._handle, self._where if strict else _Where())

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
            self._close(name, strict=False, level=logging.DEBUG)
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

    def keep(self, value: T, name: str) -> T:
        """`value` with every tensor in it that a shorter lifetime holds copied to this one.

        Looks into lists, tuples, dicts and dataclasses; of these, the ones that can change are changed themselves.
        """
        with self.place(name):
            return self._kept(value, _number(name), {})

    def _kept(self, value: Any, lifetime: int, done: dict[int, torch.Tensor]) -> Any:
        """`done`: copies of tensors already met, by identity."""
        if isinstance(value, torch.Tensor):
            if self._library.stack_range(self._handle, value.untyped_storage().data_ptr()) <= lifetime:
                return value
            if id(value) not in done:
                done[id(value)] = value.clone()
            return done[id(value)]
        if isinstance(value, list | tuple):
            parts = [self._kept(part, lifetime, done) for part in value]
            if isinstance(value, tuple):
                return value if all(a is b for a, b in zip(parts, value, strict=True)) else tuple(parts)
            value[:] = parts
        elif isinstance(value, dict):
            value |= {key: self._kept(part, lifetime, done) for key, part in value.items()}
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            old = {field.name: getattr(value, field.name) for field in fields(value)}
            new = {name: part for name in old if (part := self._kept(old[name], lifetime, done)) is not old[name]}
            try:
                for name, part in new.items():
                    setattr(value, name, part)
            except dataclasses.FrozenInstanceError:
                return dataclasses.replace(value, **new)
        return value

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
        """Recorded events: seconds, kind (number in ``EVENTS``), range, size, the range's top and live bytes after it,
        and the number of the block (0: none)."""
        events = np.empty(self._library.stack_events(self._handle, None, 0), EVENT)
        self._library.stack_events(self._handle, events.ctypes.data, len(events))
        return events

    def _close(self, name: str, strict: bool, level: int = logging.WARNING) -> None:
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
        log.log(logging.DEBUG if name in self._told else level, "%s", text)
        if level >= logging.WARNING:
            self._told.add(name)

    def _error(self) -> str:
        return self._library.stack_error().decode()


def install(
    device: torch.device, allocator: str, *, limit: int = 0, strict: bool = False, trace: bool = False,
    processes: int = 1,
) -> None:  # fmt: skip
    """Choose what gives this process its tensors' memory, on the one device that it uses; for commands only.

    Parameters
    ----------
    device
        a GPU, on which CUDA has not started and starts with the first tensor; or the CPU.
    allocator
        ``stack``: an :class:`Arena`, for the rest of this process; ``torch``: PyTorch's own; ``auto``: the stack for
        one process on a GPU of NVIDIA's under Linux, and where `strict` or `trace` ask for it.
    limit
        bytes that tensors may take; 0: all that there are. On a CPU it binds the stack only.
    strict, trace
        of the arena: raise for survivors, record every event.
    processes
        that share the work.

    Raises
    ------
    InputError
        It is too late; the allocator cannot be had here; or another one is installed.
    """
    global _installed
    if allocator == "auto":
        allocator = "stack" if strict or trace or _suits(device, processes) else "torch"
    if _installed is not None:
        if allocator != "stack" or (limit and limit != _installed.limit) or device.type != _installed.kind:
            raise InputError(
                "memory.allocator=stack: this process has one with other settings, and keeps it; give the jobs of a "
                "sweep the same memory options, or a command each"
            )
        _installed.be_strict(strict)
        _installed.trace(trace)
        return
    if allocator == "torch":
        if limit and device.type == "cuda":
            share = limit / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        return
    _installed = _on_gpu(device, limit, strict) if device.type == "cuda" else _on_host(limit, strict)
    _installed.trace(trace)


def _suits(device: torch.device, processes: int) -> bool:
    """Whether the stack is what is measured best here: several GPUs have not been."""
    if device.type != "cuda" or torch.version.cuda is None or sys.platform != "linux" or processes > 1:
        return False
    if _installed is None and torch.cuda.is_initialized():
        log.info("CUDA has started with PyTorch's allocator, and keeps it")
        return False
    return True


def _on_gpu(device: torch.device, limit: int, strict: bool) -> Arena:
    if torch.version.cuda is None:
        raise InputError("memory.allocator=stack: this PyTorch is built without CUDA; use device=cpu")
    if torch.cuda.is_initialized():
        raise InputError(
            "memory.allocator=stack: CUDA has started with PyTorch's allocator, and a process keeps its first; "
            "give it to the first job of a sweep, or a command of its own"
        )
    arena = Arena(limit, strict=strict, driver=_DRIVER, device=device.index or 0)
    allocator = torch.cuda.memory.CUDAPluggableAllocator(str(compiled("stack_allocator")), "torch_malloc", "torch_free")
    record = ctypes.cast(arena._library.torch_record_stream, ctypes.c_void_p).value
    allocator.allocator().set_record_stream_fn(record)
    arena._library.stack_serve(arena._handle)
    torch.cuda.memory.change_current_allocator(allocator)
    return arena


def _on_host(limit: int, strict: bool) -> Arena:
    arena = Arena(limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), strict=strict)
    if arena._library.stack_serve_host(arena._handle) < 0:
        raise InputError(
            "memory.allocator=stack: this PyTorch asks for host memory in a way that torchem does not know; use "
            "memory.allocator=torch"
        )
    return arena


def warm_up(device: torch.device) -> None:
    """Have a GPU's libraries make what they keep, such as the workspaces of products, before the first scope."""
    if device.type != "cuda" or _installed is None:
        return
    torch.backends.cuda.cufft_plan_cache[device.index or 0].max_size = _FFT_PLANS
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float16):
        square = torch.ones((64, 64), dtype=dtype, device=device)
        square @ square
        torch.addmm(square[0], square, square)
    torch.mm(square, square, out_dtype=torch.float32)
    torch.fft.rfftn(torch.ones((8, 8, 8), device=device))


def available(device: torch.device, limit: int = 0) -> int:
    """Bytes that tensors may still take on a device, of `limit` in all (0: none is set)."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = _free_host_memory()
    taken = 0
    if _installed is not None:
        statistics_ = _installed.statistics()
        # what is mapped and empty serves again
        free, taken = free + statistics_.mapped - statistics_.live, statistics_.live
        limit = limit or _installed.limit
    elif device.type == "cuda":
        taken = torch.cuda.memory_allocated(device)
        free += torch.cuda.memory_reserved(device) - taken
    if device.type == "cuda":
        free = max(0, free - _LIBRARIES)
    return min(free, limit - taken) if limit else free


def _free_host_memory() -> int:
    """Bytes, with what the system keeps of files and would give up."""
    try:
        fields_ = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields_["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def scope(name: str) -> AbstractContextManager[None]:
    """:meth:`Arena.scope` of the installed arena; without one, and beside the main thread, nothing."""
    arena = _scoped()
    return _NOTHING if arena is None else arena.scope(name)


def place(name: str) -> AbstractContextManager[None]:
    """:meth:`Arena.place` of the installed arena; without one, and beside the main thread, nothing."""
    arena = _scoped()
    return _NOTHING if arena is None else arena.place(name)


def keep(value: T, name: str) -> T:
    """:meth:`Arena.keep` of the installed arena; without one, and beside the main thread, `value`."""
    arena = _scoped()
    return value if arena is None else arena.keep(value, name)


def _scoped() -> Arena | None:
    """The installed arena in the main thread; what others ask for is in the run range, and stays there."""
    return _installed if threading.current_thread() is threading.main_thread() else None


def installed() -> Arena | None:
    """The arena that serves this process, if one does."""
    return _installed


def in_use(device: torch.device) -> str:
    """What the driver says of a GPU, for people; of a CPU nothing."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"; the GPU has {_shown(total - free)} of {_shown(total)} in use, libraries and other programs included"


def _shown(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes / 2**20:.1f} MiB"


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
def compiled(name: str) -> Path:
    """The shared library of a C file of ``torchem.kernels``, from the cache folder if it is there.

    Raises
    ------
    InputError
        No C compiler, or it fails; no cache folder.
    """
    folder_ = resources.files("torchem.kernels")
    sources = {path.name: path.read_bytes() for path in folder_.iterdir() if path.name.endswith(".c")}
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    # one file may include another; one home folder may serve machines with different C libraries
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    parts = [part.encode() for part in (name, platform.machine(), str(libc), *_FLAGS)]
    key = hashlib.sha256(b"\0".join([*parts, *(sources[file] for file in sorted(sources))])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torchem"
    library = folder / f"{name}-{key}.so"
    if library.is_file():
        return library
    if compiler is None:
        raise InputError(
            f"memory.allocator=stack needs a C compiler, and there is no {' or '.join(names)}: install gcc, set CC, or "
            "give memory.allocator=torch"
        )
    # another process may compile it, too: each writes its own file, and the last to be renamed stays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            for file, text in sources.items():
                Path(own, file).write_bytes(text)
            command = [compiler, *_FLAGS, f"{name}.c", "-o", library.name, "-ldl"]
            subprocess.run(command, cwd=own, check=True, capture_output=True)
            os.replace(Path(own, library.name), library)
    except subprocess.CalledProcessError as error:
        raise InputError(
            f"{compiler} cannot compile the stack allocator (memory.allocator=torch does without it):\n"
            f"{error.stderr.decode()}"
        ) from error
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written, or give "
            "memory.allocator=torch"
        ) from error
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    return load("stack_allocator")


def load(name: str) -> ctypes.CDLL:
    """A compiled C file that holds the allocator's functions, with their types."""
    library = ctypes.CDLL(str(compiled(name)))
    size, pointer, number, text = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for function_name, result, *arguments in (
        ("stack_new", pointer, text, number, size, size),
        ("stack_delete", None, pointer),
        ("stack_allocate", pointer, pointer, size, number, pointer),
        ("stack_release", number, pointer, pointer),
        ("stack_record", number, pointer, pointer, pointer),
        ("stack_open", number, pointer, number),
        ("stack_close", ctypes.c_int64, pointer, pointer, ctypes.c_int64),
        ("stack_place", number, pointer, number),
        ("stack_range", number, pointer, pointer),
        ("stack_figures", None, pointer, pointer),
        ("stack_plan", text, pointer),
        ("stack_error", text),
        ("stack_ask_where", None, pointer, _Where),
        ("stack_trace", None, pointer, number),
        ("stack_events", ctypes.c_int64, pointer, pointer, ctypes.c_int64),
        ("stack_serve", None, pointer),
        ("stack_serve_host", number, pointer),
    ):
        function = getattr(library, function_name)
        function.restype, function.argtypes = result, arguments
    return library
