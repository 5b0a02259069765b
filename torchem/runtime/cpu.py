"""How PyTorch uses a CPU."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from torchem.runtime import memory

Part = TypeVar("Part")
Result = TypeVar("Result")

# Python starts operations one at a time: more threads than this would wait for one another
MOST_WORKERS = 8
# (m, k, n): oneDNN may round in large products only
PRODUCTS_LOOKED_AT = ((64, 64, 64), (256, 1000, 16), (1000, 84, 600))


def side_by_side(work: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """`[work(part) for part in parts]`, several parts at a time on PyTorch's threads.

    For parts that stay in a core's caches: their operations are too short to be divided among threads, which takes
    some 6 µs each time. On the stack they take turns: what other threads ask for would live as long as the run.
    """
    parts, threads = list(parts), torch.get_num_threads()
    workers = min(threads, MOST_WORKERS, len(parts))
    if workers < 2 or memory.installed() is not None:
        return [work(part) for part in parts]
    return list(_pool(workers, threads // workers).map(work, parts))


@functools.cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    # PyTorch's number of threads is one a thread
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))


def allow_fast_products() -> None:
    """Let oneDNN do float32 matrix products, in this process, where it does them as exactly as MKL, and faster.

    MKL, PyTorch's default, keeps off AVX-512 on AMD's processors and takes twice the time there. oneDNN is asked only
    if it may round to bfloat16. Without AMX it then still computes in float32; a CPU on which it does round keeps MKL.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not torch.backends.mkldnn.is_available() or not hasattr(matmul, "fp32_precision") or not _made_by_amd():
        return  # PyTorch before 2.9 offers no choice
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    if not all(map(_exact, PRODUCTS_LOOKED_AT)):
        matmul.fp32_precision = before


def _made_by_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _exact(shape: tuple[int, int, int]) -> bool:
    """Whether a product (m, k) × (k, n) keeps 1 + 2^-12, which is lost in bfloat16."""
    m, k, n = shape
    values = torch.full((m, k), 1 + 2.0**-12)
    return torch.equal(values @ torch.eye(k, n), values.new_full((m, n), 1 + 2.0**-12) * (torch.arange(n) < k))
