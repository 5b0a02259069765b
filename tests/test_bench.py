"""Every benchmark once, tiny; the command's keys, its CSV file and what it refuses."""

from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from torchem.bench import BENCHES, Settings, run
from torchem.benchmarks.weights import weight_bytes
from torchem.commands import to_options
from torchem.errors import InputError

# fixed: other programs call the command with them
KEYS = "bench n_particles box n_orientations n_shifts n_references x_range precision backend repeats csv plot".split()
GRID = {"n_particles": 2, "n_orientations": 3, "n_shifts": 2, "box": 8, "repeats": 1}
SMALL = {bench: GRID for bench in BENCHES[:4]} | {bench: {"n_particles": 8, "box": 24} for bench in BENCHES[4:]}
SMALL["mra"] = {"n_particles": 8, "box": 24, "x_range": 1, "n_references": 2}
ITERATIONS = {"iteration": 2, "refine": 1, "weights": 2}


def settings(*overrides: str) -> Settings:
    with initialize_config_module("torchem.configs", version_base="1.3"):
        config = compose("bench", overrides=list(overrides))
    return to_options(Settings, OmegaConf.to_container(config, resolve=True))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_keys() -> None:
    assert [field.name for field in fields(Settings)] == KEYS
    assert settings() == replace(Settings(), csv="outputs/bench/squared_difference.csv")
    assert settings("bench=fine").csv == "outputs/bench/fine.csv"


@pytest.mark.parametrize("bench", [bench for bench in BENCHES if bench != "memory"])
def test_benchmark(bench: str, capsys: pytest.CaptureFixture) -> None:
    sizes = {"repeats": ITERATIONS.get(bench, 1)} | SMALL[bench]
    run(Settings(bench=bench, csv="a/b.csv", plot=True, **sizes))
    table = pd.read_csv("a/b.csv")
    assert capsys.readouterr().out.count("\n") == 2 + len(table)
    for name in ("ms", "seconds"):
        assert (table.get(name, pd.Series([1.0])) > 0).all()
    assert Path("a/b.png").stat().st_size > 1000


def test_weights_by_layout() -> None:
    run(Settings(bench="weights", csv="w.csv", n_particles=8, box=24, repeats=2))
    first, second = pd.read_csv("w.csv").to_dict("records")
    # the first iteration keeps one sample a particle; both score the whole grid
    assert (first["significant"], first["scored"]) == (8, second["scored"])
    assert second["significant"] > 8
    for row in (first, second):
        blocks = weight_bytes(row["scored"], row["significant"], row["children"])["blocks"]
        # a row start for each particle, and one more a half
        assert blocks + 4 * 8 < 1e6 * row["held_mb"] <= blocks + 4 * 8 + 4 * 8
    assert weight_bytes(10, 2, 32) == {"dense": 1280, "samples": 512, "relion": 2304, "blocks": 264}


def test_stack_and_list_on_a_recorded_refinement() -> None:
    run(Settings(bench="memory", csv="m.csv", plot=True, n_particles=8, box=24, repeats=2))
    assert Path("m.png").stat().st_size > 1000
    table = pd.read_csv("m.csv").set_index("allocator")
    assert {"stack", "list"} <= set(table.index) and (table["requests"] > 5000).all()
    stack = table.loc["stack"]
    assert stack["live_mb"] <= stack["smallest_limit_mb"] <= stack["reserved_mb"] + 4 * 2.1
    assert stack["reserved_mb"] <= 1.1 * stack["live_mb"] + 4 * 2.1
    assert (table["limit_of_live"] >= 1).all() and 0 < stack["torch_empty_us"] < 100
    # the time is the C code's, of which other work on the machine may take some
    assert (table.loc[["stack", "list"], ["request_us", "release_us"]] < 20).all(axis=None)


def test_csv_is_appended_to() -> None:
    small = Settings(bench="significant", csv="s.csv", **GRID)
    run(small)
    run(replace(small, n_shifts=5))
    assert pd.read_csv("s.csv")["n_shifts"].tolist() == [2, 2, 5, 5]
    with pytest.raises(InputError, match="other columns"):
        run(replace(small, bench="fine"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bench": "speed"}, "must be one of squared_difference"),
        ({"box": 0}, "box=0: must be at least 1"),
        ({"bench": "fine", "precision": "fp16"}, "must be single or double"),
        ({"bench": "fine", "backend": "triton"}, "only bench=squared_difference"),
        ({"precision": "fp8"}, "precision=fp8: must be one of"),
        ({"bench": "refine", "n_shifts": 9}, "chooses its own"),
        ({"bench": "mra", "n_shifts": 9}, "give n_references and x_range"),
        ({"bench": "mra", "x_range": 3}, "have no room for that"),
        ({"bench": "fine", "n_references": 9}, "are for bench=mra"),
    ],
)
def test_refusal(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(replace(Settings(n_particles=2, box=8, repeats=1), **options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is a kernel")
def test_kernels_need_a_gpu() -> None:
    with pytest.raises(InputError, match="backend=triton"):
        run(Settings(backend="triton", **GRID))
