"""Files are written while the next iteration is computed, and as if they were not."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchem.data.mrc import read_map
from torchem.data.particles import Particles
from torchem.em import output
from torchem.em.options import DatasetOptions, ReferenceOptions, RefineOptions
from torchem.em.refiner import Refiner
from torchem.errors import InputError


def refiner(star: Path, folder: Path) -> Refiner:
    options = RefineOptions(
        dataset=DatasetOptions(particle_diameter=50.0), reference=ReferenceOptions(ini_high=30.0), device="cpu"
    )
    return Refiner(options, Particles.read(star), read_map("reference.mrc")[0], folder=folder)


def test_what_is_written_is_a_copy(small_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    changed, save = threading.Event(), output.save_checkpoint

    def late(path: Path, state: output.State) -> None:
        assert changed.wait(60)
        save(path, state)

    monkeypatch.setattr(output, "save_checkpoint", late)
    run = refiner(small_set(), Path())
    assert run.output is not None
    state = run.state
    first, pose, drawn = state.halves[0].references.clone(), state.poses.euler.clone(), state.generator.get_state()
    assert not Path("run_it000_optimiser.star").exists()
    state.halves[0].references.zero_()
    state.poses.euler += 1
    state.sampling.perturb_again(state.generator)
    changed.set()
    run.output.finish()
    assert Path("run_it000_optimiser.star").exists()
    written = output.load_checkpoint(Path("run_it000_checkpoint.pt"), torch.device("cpu"))
    assert torch.equal(written.halves[0].references, first) and torch.equal(written.poses.euler, pose)
    assert torch.equal(written.generator.get_state(), drawn) and written.sampling.perturbation == 0


def test_what_could_not_be_written_is_said_in_the_next_iteration(small_set: Callable[..., Path]) -> None:
    run = refiner(small_set(), Path("gone"))
    with pytest.raises(InputError, match=r"cannot write gone/run_it000_half1_class001\.mrc"):
        run.step()
