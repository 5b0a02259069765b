"""Finding input files where RELION users expect them, and writing output files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchem.errors import InputError


def find(name: str | Path, *, root: Path | None = None, beside: Path | None = None, where: str = "") -> Path:
    """Path of a file that metadata name.

    An absolute name is taken as it is. A relative one is looked for under ``root`` only, if there is one; else
    in the current folder (RELION's rule), then in the folder ``beside`` and all its parents upwards.

    Raises
    ------
    InputError
        where there is no such file: says where the name stands (``where``) and lists the places tried.
    """
    name = Path(name).expanduser()
    if name.is_absolute():
        places = [name.parent]
    elif root is not None:
        places = [Path(root)]
    else:
        places = [Path.cwd()]
        if beside is not None:
            beside = Path(beside).resolve()
            places += [place for place in (beside, *beside.parents) if place != places[0]]
    relative = name.name if name.is_absolute() else name
    for place in places:
        if (path := place / relative).is_file():
            return path
    tried = "\n".join(f"  {place / relative}" for place in places)
    remedy = (
        "check the path"
        if name.is_absolute()
        else f"put the file under {root} or correct dataset.root"
        if root is not None
        else "start in RELION's project folder or set dataset.root to it"
    )
    raise InputError(f"{where + ': ' if where else ''}file {name} not found; {remedy}. Tried:\n{tried}")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Temporary path in the folder of ``path`` that takes its name when the block ends without an exception."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written and has room"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
