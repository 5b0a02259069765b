"""Who this process is among those that a launcher started; known before PyTorch is there.

Ranks come from torchrun's variables (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), else from Open MPI's
(``OMPI_COMM_WORLD_*``), else from those of a Slurm job step (``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS``).
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process."""

    rank: int
    size: int
    local_rank: int
    address: str | None  # of rank 0; None: the launcher does not say
    port: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read rank, number of ranks and the meeting point from the launcher's variables.

    Two runs on one host must not meet at one port, so without ``MASTER_PORT`` it follows from the job's name.
    """

    def port(job: str) -> int:
        return int(environment.get("MASTER_PORT") or 20000 + zlib.crc32(job.encode()) % 20000)

    address = environment.get("MASTER_ADDR")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank = int(environment["RANK"])
        local = int(environment.get("LOCAL_RANK", rank))
        return Launch(rank, int(environment["WORLD_SIZE"]), local, address, port("torchrun"))
    if "OMPI_COMM_WORLD_RANK" in environment:
        size = int(environment["OMPI_COMM_WORLD_SIZE"])
        if address is None and int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0)) == size:
            address = "127.0.0.1"
        job = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid", "mpirun"))
        local = int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
        return Launch(int(environment["OMPI_COMM_WORLD_RANK"]), size, local, address, port(job))
    # a batch script has SLURM_PROCID=0 and SLURM_NTASKS too, but is one process: only srun makes a step
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
        job = environment.get("SLURM_JOB_ID", "") + "." + environment.get("SLURM_STEP_ID", "")
        return Launch(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]),
            address or _first_host(nodes),
            port(job),
        )
    return Launch(0, 1, 0, address, port("alone"))


def _first_host(nodes: str) -> str | None:
    """First name in Slurm's list: ``a[03-05,9],b`` -> ``a03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else None
