"""One or several processes, one device each: the few things they do together.

A single process makes no process group, and every collective is then the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from torchem.errors import InputError
from torchem.runtime.launch import Launch, launched

T = TypeVar("T")

# others wait this long, e.g. while the first process simulates a data set
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """This process among all that work on the run; ``World()`` is a single process on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def share(self, count: int) -> range:
        """Which of `count` things are this rank's: contiguous, sizes differ by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` (contiguous) by its sum over all ranks, the same bits on each; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Replace `tensor` (contiguous) by that of rank `source`; returns it."""
        if self.size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def first(self, function: Callable[[], T]) -> T:
        """Let rank 0 alone call `function`; every rank gets its result (picklable), or its InputError.

        On the other ranks the error is marked as met ``elsewhere``.
        """
        if self.size == 1:
            return function()
        answer: list = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except InputError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, 0, device=self.device if dist.get_backend() == "nccl" else None)
        if answer[1] is not None:
            answer[1].elsewhere = self.rank != 0
            raise answer[1]
        return answer[0]


def device_named(name: str) -> torch.device:
    """``cpu``, ``cuda``, or ``auto``: the GPU if there is one; for a process that works alone.

    Raises
    ------
    InputError
        A GPU that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: no CUDA device is here; use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def start(
    backend: str = "auto", device: str = "auto", before: Callable[[torch.device], None] | None = None
) -> World:
    """Choose this process's device and, if there are others, join them.

    A process joins once: further calls (the jobs of a sweep) use the same group.

    Parameters
    ----------
    backend
        ``nccl``, ``gloo``, ``mpi``, or ``auto``: NCCL on GPUs, gloo on CPUs.
    device
        ``cpu``, ``cuda``, or ``auto``: the GPU if there is one.
    before
        called with the device before it starts.

    Raises
    ------
    InputError
        A GPU, a backend or a meeting point that is not there.
    """
    launch = launched()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if device == "cuda" and gpus == 0:
        raise InputError("device=cuda: PyTorch finds no CUDA device here; use device=cpu or auto, or check nvidia-smi")
    if backend == "auto":
        backend = "nccl" if device == "cuda" else "gloo"
    _check_backend(backend, device, gpus, launch)
    here = torch.device("cuda", launch.local_rank % gpus) if device == "cuda" else torch.device("cpu")
    if before is not None:
        before(here)
    # setting a device starts it, which takes a while: the first is set, and starts with the first tensor
    if here.type == "cuda" and here.index != torch.cuda.current_device():
        torch.cuda.set_device(here)
    if launch.size > 1 and not dist.is_initialized():
        if backend == "mpi":
            dist.init_process_group("mpi", timeout=_PATIENCE)
        elif launch.address is None:
            raise InputError(
                f"{launch.size} processes on several hosts, and the launcher does not say where they meet: "
                "give the first host's name, e.g. mpirun -x MASTER_ADDR=HOST …"
            )
        else:
            dist.init_process_group(
                backend,
                init_method=f"tcp://{launch.address}:{launch.port}" if "RANK" not in os.environ else "env://",
                rank=launch.rank,
                world_size=launch.size,
                timeout=_PATIENCE,
            )
    return World(launch.rank, launch.size, here)


def be_deterministic(on: bool) -> None:
    """Let every operation give the same bits every time, or no longer; to be called before :func:`start`."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be so
    # where nothing changes it would still import the compiler, which takes seconds
    if on != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(on)


def stop() -> None:
    """Leave the process group, if there is one, together: rank 0 serves the others until they are through."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _check_backend(backend: str, device: str, gpus: int, launch: Launch) -> None:
    option = f"distributed.backend={backend}"
    if backend == "mpi" and not dist.is_mpi_available():
        raise InputError(
            f"{option}: this PyTorch was built without MPI; use gloo or nccl, "
            "which read their ranks from mpirun's variables as well"
        )
    if backend == "nccl":
        if device != "cuda" or not dist.is_nccl_available():
            raise InputError(f"{option}: NCCL joins GPUs, and this run uses the CPU; use gloo or leave it out")
        # a launcher may show each process its own GPU alone; otherwise all processes of a host see the same
        own = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        if launch.local_rank >= gpus and not own:
            raise InputError(
                f"{option}: process {launch.local_rank + 1} on a host with {gpus} GPU(s), and NCCL takes one process "
                f"a GPU; start {gpus} a host, or use gloo to share GPUs"
            )
