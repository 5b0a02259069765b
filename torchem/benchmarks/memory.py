"""Fragmentation: the requests of a real refinement, recorded and made again of other allocators.

A refinement of the phantom runs on the stack, in a process of its own, with a trace. The same requests, in the same
order, then go to

=========== ============================================================================================
stack       ranges by lifetime (:mod:`torchem.runtime.memory`)
list        one slab, a linked list, first fit, merging, as RELION keeps it
caching     PyTorch's caching allocator (on a GPU only)
expandable  the same with ``expandable_segments:True`` (on a GPU only)
=========== ============================================================================================

``reserved`` is the most that each took of the device, ``waste`` what of it exceeds the most that was live at once,
``smallest_limit`` the smallest memory in which the sequence completes. In memory of 1.25 times the live bytes,
``largest`` is the largest request that still succeeds, at the worst end of a batch or iteration, and ``largest_box``
the box at which the sequence still completes, all sizes growing as its square. Requests and releases are timed in C
and as those of ``torch.empty``.
"""

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from torchem.benchmarks.measure import DEVICE, Case, require_parity
from torchem.benchmarks.refine import DATASETS, SIZES, make_refiner, particles_of
from torchem.runtime import memory
from torchem.runtime.memory import EVENTS

__all__ = ["PLOTTED", "REPEATS", "SIZES", "check_parity", "rows"]

REPEATS, PLOTTED = 8, ("live_mb", "reserved_mb", "smallest_limit_mb")
# of the live bytes, where the largest request and the largest box are looked for
ROOM = 1.25
# smallest limits and largest boxes are found to this share
PRECISION = 0.002
# requests that are timed through PyTorch
TIMED = 20000
ALLOCATE, RELEASE, OPEN, CLOSE = (EVENTS.index(name) for name in ("allocate", "release", "open", "close"))


@dataclass(frozen=True)
class Outcome:
    """What became of a sequence: whether it completed, the most bytes reserved, the largest request then served."""

    completed: bool
    reserved: int
    largest: int | None


Replay = Callable[..., Outcome]


def rows(case: Case) -> Iterator[dict]:
    """A row for each allocator; ``repeats`` bounds the iterations that are recorded."""
    DATASETS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATASETS) as folder:
        path = str(Path(folder, "events.npy"))
        for task in ((particles_of, case), (record, case, path)):
            with _process() as process:
                process.submit(*task).result()
        events = np.load(path)
        live = live_bytes(events)
        shared = {"n_particles": case.n_particles, "box": case.box, "requests": int((events["kind"] == ALLOCATE).sum())}
        for name in ("stack", "list", *(("caching", "expandable") if DEVICE.type == "cuda" else ())):
            yield shared | {"allocator": name} | _measured(name, events, path, live, case.box)


def _measured(name: str, events: np.ndarray, path: str, live: int, box: int) -> dict:
    """What one allocator makes of the sequence."""
    segments = f"expandable_segments:{name == 'expandable'}"
    in_c, empty = {}, {}
    if name != "list":
        with _process(segments) as process:
            request, release = process.submit(time_torch, path, name).result()
        empty = {"torch_empty_us": request, "torch_release_us": release}
    with _process(segments) as process:
        if name in ("stack", "list"):
            replay: Replay = partial(replay_in_c, events, name)
            request, release = _times_in_c(events, name)
            in_c = {"request_us": request, "release_us": release}
        else:

            def replay(*given: Any) -> Outcome:
                return process.submit(replay_torch, path, *given).result()

        plenty = replay(1.0, 4 * live)
        limit = smallest_limit(replay, live)
        room = int(ROOM * live)
        probed = replay(1.0, room, True)
        reached = largest_box(replay, room, box)
    return {
        "live_mb": live / 1e6, "reserved_mb": plenty.reserved / 1e6, "waste_mb": (plenty.reserved - live) / 1e6,
        "smallest_limit_mb": None if limit is None else limit / 1e6,
        "limit_of_live": None if limit is None else limit / live,
        "largest_mb": probed.largest / 1e6 if probed.completed and probed.largest is not None else None,
        "largest_box": reached, **dict.fromkeys(("request_us", "release_us", "torch_empty_us", "torch_release_us")),
    } | in_c | empty  # fmt: skip


def check_parity() -> None:
    """Raise AssertionError unless both allocators of C complete in memory that just suffices, and not in less."""
    chunk = 2 << 20
    kinds = [OPEN, ALLOCATE, ALLOCATE, RELEASE, ALLOCATE, RELEASE, RELEASE, CLOSE]
    events = np.zeros(len(kinds), memory.EVENT)
    events["kind"], events["range"] = kinds, 1
    events["block"], events["size"] = [0, 1, 2, 1, 3, 2, 3, 0], [0, chunk, chunk, chunk, chunk, chunk, chunk, 0]
    require_parity("live bytes", abs(live_bytes(events) - 2 * chunk), 0)
    # the list passes over the hole that fits the third block exactly
    for name, smallest in (("stack", 2 * chunk), ("list", 3 * chunk + 512)):
        found = [replay_in_c(events, name, 1.0, limit) for limit in (smallest, smallest - 512)]
        require_parity(name, 0 if [outcome.completed for outcome in found] == [True, False] else 1, 0)


def record(case: Case, path: str) -> None:
    """Refine on the stack and save the trace; for a process in which CUDA has not started."""
    memory.install(DEVICE if DEVICE.index is not None else torch.device(DEVICE.type, 0), "stack", trace=True)
    arena = memory.installed()
    assert arena is not None
    run = make_refiner(case)
    for _ in range(case.repeats):
        if run.step().converged:
            break
    events = arena.events()
    # what CUDA's start and other streams asked for comes with it, in the run's range
    np.save(path, events[np.isin(events["kind"], (ALLOCATE, RELEASE, OPEN, CLOSE))])


def live_bytes(events: np.ndarray) -> int:
    """The most that a sequence holds at once."""
    size = np.where(events["kind"] == ALLOCATE, events["size"], 0)
    return int(np.cumsum(size - np.where(events["kind"] == RELEASE, events["size"], 0)).max())


def replay_in_c(
    events: np.ndarray, name: str, scale: float, limit: int, probing: bool = False, times: np.ndarray | None = None
) -> Outcome:
    """The sequence against ``stack`` or ``list``, over host memory that nothing touches."""
    outcome = np.zeros(3, np.int64)
    function = memory.load("replay").replay
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = (
        pointer, integer, ctypes.c_double, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, pointer, pointer,
    )  # fmt: skip
    function(
        np.ascontiguousarray(events).ctypes.data, len(events), scale, limit, name == "list", probing,
        None if times is None else times.ctypes.data, outcome.ctypes.data,
    )  # fmt: skip
    failed, reserved, largest = outcome.tolist()
    return Outcome(failed < 0, reserved, largest if probing else None)


def replay_torch(path: str, scale: float, limit: int, probing: bool = False) -> Outcome:
    """The sequence against the caching allocator of this process."""
    events = np.load(path)
    torch.cuda.init()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    torch.cuda.reset_peak_memory_stats()
    held: dict[int, int] = {}
    largest, completed = limit, True
    stream = torch.cuda.current_stream()
    sizes = (scale * events["size"]).astype(np.int64)
    try:
        for kind, range_, block, size in zip(
            *(column.tolist() for column in (events["kind"], events["range"], events["block"], sizes)), strict=True
        ):
            if kind == ALLOCATE:
                held[block] = torch.cuda.caching_allocator_alloc(size, 0, stream)
            elif kind == RELEASE and block in held:
                torch.cuda.caching_allocator_delete(held.pop(block))
            elif kind == CLOSE and probing and range_ <= 2:
                largest = min(largest, _largest_of_torch(limit, stream))
    except torch.cuda.OutOfMemoryError:
        completed = False
    reserved = torch.cuda.max_memory_reserved()
    for address in held.values():
        torch.cuda.caching_allocator_delete(address)
    return Outcome(completed, reserved, largest if probing else None)


def _largest_of_torch(limit: int, stream: Any) -> int:
    most, step = 0, 1 << (limit.bit_length() - 1)
    for _ in range(10):
        try:
            torch.cuda.caching_allocator_delete(torch.cuda.caching_allocator_alloc(most + step, 0, stream))
            most += step
        except torch.cuda.OutOfMemoryError:
            pass
        step //= 2
    return most


def smallest_limit(replay: Replay, live: int) -> int | None:
    """Bytes; None: more than four times the live ones."""
    low, high = live, 4 * live
    if not replay(1.0, high).completed:
        return None
    while high - low > PRECISION * live:
        middle = (low + high) // 2
        low, high = (low, middle) if replay(1.0, middle).completed else (middle, high)
    return high


def largest_box(replay: Replay, limit: int, box: int) -> float:
    """Pixels, of images whose sequence completes; sizes grow as their square."""
    low, high = 0.0, ROOM
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if replay(middle, limit).completed else (low, middle)
    return box * low**0.5


def time_torch(path: str, name: str) -> tuple[float, float]:
    """Median µs of ``torch.empty`` and of the release of its tensor, over the sequence."""
    device = DEVICE if DEVICE.index is not None else torch.device(DEVICE.type, 0)
    if name == "stack":
        memory.install(device, "stack")
    events = np.load(path)[:TIMED]
    held: dict[int, torch.Tensor] = {}
    spent: dict[int, list[int]] = {ALLOCATE: [], RELEASE: []}
    clock = time.perf_counter_ns
    for kind, block, size in zip(*(events[field].tolist() for field in ("kind", "block", "size")), strict=True):
        start = clock()
        if kind == ALLOCATE:
            held[block] = torch.empty(size, dtype=torch.uint8, device=device)
        elif kind == RELEASE and block in held:
            del held[block]
        else:
            continue
        spent[kind].append(clock() - start)
    return float(np.median(spent[ALLOCATE])) / 1e3, float(np.median(spent[RELEASE])) / 1e3


def _times_in_c(events: np.ndarray, name: str) -> tuple[float, float]:
    """Median µs of a request and a release."""
    times = np.zeros(len(events), np.float32)
    replay_in_c(events, name, 1.0, 4 * live_bytes(events), times=times)
    request, release = (float(np.median(times[events["kind"] == kind])) / 1e3 for kind in (ALLOCATE, RELEASE))
    return request, release


def _process(segments: str = "expandable_segments:False") -> ProcessPoolExecutor:
    """One other process, started anew, with its own allocator."""
    settings = {"PYTORCH_ALLOC_CONF": segments, "PYTORCH_CUDA_ALLOC_CONF": segments}

    class Process(ProcessPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            with patch.dict(os.environ, settings):
                return super().submit(*arguments, **options)

    return Process(1, mp_context=get_context("spawn"))
