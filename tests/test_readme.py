"""What the README shows works."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()

BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_alignment_in_a_notebook(small_set: Callable, capsys: pytest.CaptureFixture) -> None:
    (lines,) = (block for block in BLOCKS if "Aligner" in block)
    small_set()
    lines = lines.replace("n_classes=50, last_ring=36", "n_classes=2, last_ring=4, max_iterations=2")
    names: dict = {}
    exec(lines, names)
    assert names["averages"].shape == (2, 16, 16) and len(names["table"]) == 12
    assert capsys.readouterr().out.startswith("1 ")


def test_notebook_lines(small_set: Callable, capsys: pytest.CaptureFixture) -> None:
    (lines,) = (block for block in BLOCKS if "Refiner" in block)
    small_set()
    # the small set instead of the reader's, and one iteration of it
    lines = lines.replace('200, "D2"', '50, "C1"').replace(
        "optics =",
        "options.max_iterations, options.reference.ini_high, options.sampling.healpix_order = 1, 30, 0\noptics =",
    )
    names: dict = {}
    exec(lines, names)
    assert names["volume"].shape == (16, 16, 16)
    assert capsys.readouterr().out.startswith("1 ")


def test_files_of_the_tour_are_there() -> None:
    root = Path(__file__).resolve().parents[1]
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) > 15
    for link in links:
        assert (root / link).exists(), link


def test_one_test_command() -> None:
    # .ci/run takes it from here
    assert len(re.findall(r"^pip install .* && python -m pytest$", README, re.MULTILINE)) == 1
