"""The notebooks run, cell by cell, in an empty folder."""

import ast
import json
from pathlib import Path

import pytest

import torchem

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def cells(notebook: str) -> list[str]:
    """Source of every code cell; a notebook is kept without outputs."""
    content = json.loads((EXAMPLES / notebook).read_text())
    assert content["nbformat"] == 4 and len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    return ["".join(cell["source"]) for cell in code]


@pytest.mark.slow
def test_align(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    if not hasattr(torchem, "MultiReferenceAligner"):
        pytest.skip("torchem.mra is not part of this checkout")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, source in enumerate(cells("align.ipynb")):
        exec(compile(source, f"align.ipynb, cell {number}", "exec"), names)
    assert (names["parameters"]["class_id"].value_counts() >= 4).all()
    # most classes hold one view: random seeds may leave two of the four together, chance would be 0.3
    table = names["pd"].crosstab(names["parameters"]["class_id"], names["view"])
    assert table.max(axis=1).sum() > 0.7 * len(names["parameters"])
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 5
    assert (tmp_path / "parameters.csv").is_file() and capsys.readouterr().out.startswith("1 ")


def test_every_cell_is_python() -> None:
    for path in EXAMPLES.glob("*.ipynb"):
        assert all(ast.parse(source) for source in cells(path.name))
