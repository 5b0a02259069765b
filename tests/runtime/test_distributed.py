"""Who the launcher says that we are, and what processes do together."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from torchem.errors import InputError
from torchem.runtime.distributed import World, start
from torchem.runtime.launch import launched

LAUNCHERS = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID",
}  # fmt: skip


def test_alone() -> None:
    launch = launched({})
    assert (launch.rank, launch.size) == (0, 1)


def test_torchrun() -> None:
    variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "123"}
    # inside of a Slurm job too
    launch = launched(variables | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"})
    assert (launch.rank, launch.size, launch.local_rank, launch.address, launch.port) == (3, 8, 1, "a", 123)


def test_open_mpi() -> None:
    variables = {
        "OMPI_COMM_WORLD_RANK": "2",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    }
    launch = launched(variables)
    assert (launch.rank, launch.size, launch.local_rank, launch.address) == (2, 4, 2, "127.0.0.1")
    # several hosts: mpirun does not say where the first is
    several = launched(variables | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert several.address is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu07", "gpu07"), ("gpu[03-05,9]", "gpu03"), ("a,b", "a"), ("n[1,2]-ib,x", "n1-ib"), ("r.c[12-13],z", "r.c12")],
)
def test_slurm(nodes: str, first: str) -> None:
    variables = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": nodes}
    launch = launched(variables | {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"})
    assert (launch.rank, launch.size, launch.local_rank, launch.address) == (5, 6, 1, first)
    other = launched(variables | {"SLURM_JOB_ID": "78", "SLURM_STEP_ID": "0"})
    assert 20000 <= launch.port < 40000 and launch.port != other.port


def test_a_batch_script_is_one_process() -> None:
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}).size == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_whole_and_even(size: int) -> None:
    shares = [list(World(rank, size).share(20)) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(20))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_every_collective_is_the_identity() -> None:
    world, tensor = World(), torch.arange(3.0)
    assert world.sum_(tensor) is tensor and world.broadcast_(tensor) is tensor
    assert world.first(lambda: 5) == 5
    world.barrier()
    assert tensor.tolist() == [0, 1, 2]


def test_what_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in LAUNCHERS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"device=cuda: .* use device=cpu"):
        start(device="cuda")
    with pytest.raises(InputError, match=r"backend=nccl: .* use gloo"):
        start("nccl", "cpu")
    monkeypatch.setattr(torch.distributed, "is_mpi_available", lambda: False)
    with pytest.raises(InputError, match=r"backend=mpi: .* built without MPI; use gloo"):
        start("mpi", "cpu")
    assert start("gloo", "cpu") == World()


def test_nccl_takes_one_process_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match=r"1 GPU\(s\).* start 1 a host, or use gloo"):
        start("nccl", "cuda")


def test_several_hosts_need_a_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in LAUNCHERS:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"RANK": "1", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{variable}", value)
    with pytest.raises(InputError, match="mpirun -x MASTER_ADDR"):
        start("gloo", "cpu")


def test_two_processes(tmp_path: Path) -> None:
    # as mpirun would start them, without MPI
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from torchem.errors import InputError
            from torchem.runtime.distributed import start, stop

            world = start("auto", "cpu")
            assert start("auto", "cpu") == world  # the next job of a sweep
            mine = torch.tensor([1.0 + world.rank, 2.0j])
            assert world.sum_(mine).tolist() == [3, 4j]
            assert world.broadcast_(torch.tensor([world.rank]), 1).item() == 1
            assert world.first(lambda: {"rank": world.rank}) == {"rank": 0}

            def refuse():
                raise InputError("no such file")

            try:
                world.first(refuse)
            except InputError as error:
                assert str(error) == "no such file" and error.elsewhere == (world.rank == 1)
            else:
                raise AssertionError
            world.barrier()
            stop()
            """
        )
    )
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    processes = [
        subprocess.Popen(
            [sys.executable, script],
            env=clean | {
                "OMP_NUM_THREADS": "1",
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "PMIX_NAMESPACE": str(tmp_path),
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
