"""Batch and chunk sizes from the memory there is."""

import pytest
import torch

from torchem.em.plan import Plan, make_plan
from torchem.errors import InputError
from torchem.runtime import memory

GIB = 1 << 30


def planned(monkeypatch: pytest.MonkeyPatch, free: int, **options: int) -> Plan:
    monkeypatch.setattr(memory, "available", lambda device, limit: free)
    numbers = {"n_particles": 100_000, "box": 128, "samples": 4608 * 29, "table": 36864 * 690} | options
    return make_plan(**numbers, device=torch.device("cuda"), dtype=torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize(("box", "free"), [(64, 3), (64, 80), (128, 4), (128, 80), (256, 16), (256, 80)])
def test_what_is_planned_fits(monkeypatch: pytest.MonkeyPatch, box: int, free: int) -> None:
    plan = planned(monkeypatch, free * GIB, box=box)
    assert sum(plan.needs.values()) <= free * GIB
    images = 100_000 if plan.keep_images else 3 * plan.batch_particles
    assert plan.needs["run"] >= 4 * box * box * images
    assert plan.batch_particles >= 32


def test_many_samples_make_no_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (planned(monkeypatch, 80 * GIB, samples=n) for n in (1000, 36864 * 29))
    assert few.batch_particles == many.batch_particles >= 4096
    # but those of one chunk, and of a particle at least, are planned for
    assert many.needs["batch"] > few.needs["batch"]
    assert planned(monkeypatch, 80 * GIB, samples=2**28).needs["batch"] > many.needs["batch"]


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"are needed and 0\.50 are there.*memory\.limit"):
        planned(monkeypatch, GIB // 2)


@pytest.mark.parametrize(("box", "n_particles"), [(64, 100_000), (128, 50_000), (128, 200_000), (192, 100_000)])
def test_more_memory_is_never_too_little(monkeypatch: pytest.MonkeyPatch, box: int, n_particles: int) -> None:
    refused = []
    for free in range(1, 400):
        try:
            planned(monkeypatch, free * GIB // 5, box=box, n_particles=n_particles)
        except InputError:
            refused.append(free)
    assert refused == list(range(1, len(refused) + 1))
