"""How PyTorch uses a CPU."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from torchem.runtime import memory

Part = TypeVar("Part")
Result = TypeVar("Result")

# Python starts operations one at a time: more threads than this would wait for one another
MOST_WORKERS = 8


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
    """Let oneDNN do float32 matrix products, in this process, where it does them as exactly as MKL.

    MKL, PyTorch's default, keeps off AVX-512 on AMD's processors and takes twice the time there. oneDNN is asked only
    if it may round to bfloat16. Without AMX it then still computes in float32; a CPU on which it does round keeps MKL.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not torch.backends.mkldnn.is_available() or not hasattr(matmul, "fp32_precision"):
        return  # PyTorch before 2.9 offers no choice
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    # 1 + 2^-12 is lost in bfloat16
    value = torch.full((64, 64), 1 + 2.0**-12)
    if not torch.equal(value @ torch.eye(64), value):
        matmul.fp32_precision = before
