"""The layers of the design, held by reading every import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "torchem"

# what each package may import beside itself; commands, the files directly in torchem/, may import everything
ALLOWED = {
    "benchmarks": {"em", "mra", "imaging", "data", "ops", "runtime", "errors"},
    "report": {"em", "imaging", "data", "ops", "runtime", "errors"},
    "explore": {"imaging", "data", "ops", "runtime", "errors"},
    "mra": {"imaging", "data", "ops", "runtime", "errors"},
    "em": {"imaging", "data", "ops", "runtime", "errors"},
    "imaging": {"data", "ops", "runtime", "errors"},
    "data": {"runtime", "errors"},
    "ops": {"kernels", "runtime", "errors"},
    "runtime": {"errors"},
    "errors": set(),
}
# what a file's optics table and poses mean is said there
EXCEPTIONS = {("data", "torchem.imaging.ctf"), ("data", "torchem.imaging.symmetry")}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, `from torchem.a import b` as torchem.a.b if that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if source(module) else str(node.module))
    return found


def source(module: str) -> Path | None:
    """File of a torchem module, None if there is no such module."""
    if module.partition(".")[0] != "torchem":
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer not in ALLOWED:  # a command or torchem/__init__.py
        return
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "torchem" and len(parts) > 1 and (layer, module) not in EXCEPTIONS:
            assert parts[1] == layer or parts[1] in ALLOWED[layer], f"{layer} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_commands_see_hydra(path: Path) -> None:
    if path.parent != PACKAGE:
        assert not {module.partition(".")[0] for module in imports(path)} & {"hydra", "omegaconf"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_ops_sees_kernels(path: Path) -> None:
    if path.parent != PACKAGE / "ops":
        assert not [module for module in imports(path) if module.startswith("torchem.kernels")]


def test_no_import_cycle() -> None:
    graph = {path: {source(module) for module in imports(path)} - {None, path} for path in FILES}
    # the package file loads its public names when they are asked for
    graph[PACKAGE / "__init__.py"] = set()
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(p.name for p in (*trail, path))
        if path not in done:
            for other in graph.get(path, set()):
                visit(other, (*trail, path))
            done.add(path)

    for path in FILES:
        visit(path, ())


def test_every_package_is_installed() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    packages = {"torchem"} | {f"torchem.{path.name}" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    packages |= {"torchem.configs", "torchem.kernels"} | {
        f"torchem.configs.{path.name}" for path in (ROOT / "configs").iterdir() if list(path.glob("*.yaml"))
    }
    assert listed == packages
