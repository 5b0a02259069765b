"""EMAN2's BDB stacks, read only: headers in a Berkeley DB B-tree, EMAN2DB/NAME.bdb, pixels in raw files beside it.

The B-tree is read by dissect.database (pure Python, so that no Berkeley DB library is needed). Keys and headers are
Python pickles, protocol 2 in all but the latest files. The record under an image's key is its header; the one under
its size (``90x90x1``) followed by its key says which of the images in the file ``NAME_90x90x1`` it is. A header with
``data_path`` (``FILE*OFFSET``) instead says where its pixels lie: so are virtual stacks made.
"""

import io
import pickle
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from torchem.data.eman import Header
from torchem.errors import InputError

_OPEN_FILES = 128
_SIZE = re.compile(rb"\d+x\d+x\d+")


class BdbStack:
    """Images of an EMAN2 BDB stack, read from disk when they are asked for.

    Parameters
    ----------
    name
        ``bdb:FOLDER#NAME``, ``bdb:NAME``, either with ``?KEY,KEY``, or the path of ``EMAN2DB/NAME.bdb``.

    Attributes
    ----------
    path
        the ``.bdb`` file.
    keys
        `(n,)` int64, EMAN2's number of each image.
    shape
        `(y, x)` of the first image, `(z, y, x)` of the first volume.
    """

    def __init__(self, name: str | Path) -> None:
        self.path, wanted = _parse(str(name))
        if not self.path.is_file():
            raise InputError(f"{name}: file {self.path} not found; give bdb:FOLDER#NAME of FOLDER/EMAN2DB/NAME.bdb")
        self._headers, self._places = _images(self.path)
        self.keys = np.array(sorted(self._headers) if wanted is None else wanted, np.int64)
        missing = [key for key in self.keys.tolist() if key not in self._headers]
        if missing:
            raise InputError(f"{name}: image {missing[0]} is not in {self.path}; correct the keys after ?")
        if not len(self.keys):
            raise InputError(f"{self.path} holds no images; give a stack with images")
        self.shape = _shape(self._headers[int(self.keys[0])])
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._map)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pixel_size(self) -> float | None:
        """Å, from the first image's apix_x; None where it is not there or not positive."""
        size = float(self.header(0).get("apix_x", 0.0))
        return float(f"{size:.7g}") if size > 0 else None  # a float32 once

    def header(self, index: int) -> Header:
        """Header of the image at ``index`` from 0; a transform is its `(3, 4)` float32 matrix."""
        return dict(self._headers[int(self.keys[index])])

    def check(self) -> None:
        """Raise `InputError` unless all images are of one size and the files with their pixels are there and whole."""
        for key in self.keys.tolist():
            file, offset = self._place(key)
            if offset + 4 * int(np.prod(self.shape)) > len(self._open(file)):
                raise self._truncated(key, file)

    def read(self, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Images `(n, y, x)` or volumes `(n, z, y, x)`, float32, at ``indices`` from 0; in ``out``, if there is one.

        Raises
        ------
        InputError
            for pixels that are not there and an image of another size than the first.
        """
        keys = self.keys[np.asarray(indices, np.int64).reshape(-1)].tolist()
        images = np.empty((len(keys), *self.shape), np.float32) if out is None else out
        for image, key in zip(images, keys, strict=True):
            file, offset = self._place(key)
            pixels = self._open(file)[offset : offset + image.nbytes]
            if len(pixels) < image.nbytes:
                raise self._truncated(key, file)
            image[...] = pixels.view("<f4").reshape(self.shape)
        return images

    def _place(self, key: int) -> tuple[Path, int]:
        """File and byte where the pixels of an image begin."""
        header = self._headers[key]
        shape = _shape(header)
        if shape != self.shape:
            sizes = [" x ".join(map(str, reversed(size))) for size in (shape, self.shape)]
            raise InputError(
                f"{self.path}: image {key} is of {sizes[0]} px, image {self.keys[0]} of {sizes[1]}; give a stack of "
                "one size (e2proc2d.py --clip)"
            )
        if "data_path" in header:
            file, star, start = str(header["data_path"]).rpartition("*")
            if not star or not start.isdecimal():
                raise InputError(
                    f"{self.path}: image {key} has data_path {header['data_path']!r}, not FILE*OFFSET; make the "
                    "virtual stack again"
                )
            return self.path.parent / file, int(start)
        size = "{nx}x{ny}x{nz}".format(**header)
        if (size, key) not in self._places:
            raise InputError(
                f"{self.path}: nothing says where image {key} lies in {self.path.stem}_{size}; copy it again"
            )
        offset = self._places[size, key] * 4 * int(np.prod(shape))
        return self.path.with_name(f"{self.path.stem}_{size}"), offset

    def _map(self, file: Path) -> np.ndarray:
        try:
            return np.memmap(file, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path}: its images lie in {file}, which cannot be read ({error}); copy the whole folder"
            ) from error

    def _truncated(self, key: int, file: Path) -> InputError:
        return InputError(f"{file} ends before image {key} of {self.path}; copy the file again")


def _parse(name: str) -> tuple[Path, list[int] | None]:
    """Path of the ``.bdb`` file, and the keys asked for."""
    if not name.lower().startswith("bdb:"):
        return Path(name).expanduser(), None
    place, _, keys = name[4:].partition("?")
    folder, _, stack = place.rpartition("#") if "#" in place else place.rpartition("/")
    if keys and not all(key.strip().isdecimal() for key in keys.split(",")):
        raise InputError(f"{name}: the keys after ? must be numbers of images, like ?0,5,7")
    path = Path(folder or ".").expanduser() / "EMAN2DB" / f"{stack}.bdb"
    return path, [int(key) for key in keys.split(",")] if keys else None


def _images(path: Path) -> tuple[dict[int, Header], dict[tuple[str, int], int]]:
    """Headers by key, and by size and key the place in the file of that size."""
    headers: dict[int, Header] = {}
    places: dict[tuple[str, int], int] = {}
    for key, value in _records(path):
        try:
            if key[:1] == b"\x80":
                number, header = _unpickle(key), _unpickle(value)
                if isinstance(number, int) and isinstance(header, dict) and {"nx", "ny", "nz"} <= header.keys():
                    headers[number] = header
            elif match := _SIZE.match(key):
                number = _unpickle(key[match.end() :])
                if isinstance(number, int):
                    places[match[0].decode(), number] = int(_unpickle(value))
        except (pickle.UnpicklingError, ValueError, TypeError, EOFError, IndexError, AttributeError) as error:
            raise InputError(
                f"{path}: the record {key[:40]!r} cannot be read ({error}); convert the stack in EMAN2 "
                "(e2proc2d.py bdb:… stack.hdf)"
            ) from error
    return headers, places


def _records(path: Path) -> list[tuple[bytes, bytes]]:
    """Keys and values of the one database in a file, whether it stands at its root or under its name."""
    try:
        from dissect.database.bsd import DB
    except ImportError as error:
        raise InputError(
            f"{path}: reading EMAN2 BDB stacks needs dissect.database; pip install dissect.database, or convert the "
            "stack in EMAN2 (e2proc2d.py bdb:… stack.hdf)"
        ) from error
    with path.open("rb") as file:
        try:
            database = DB(file)
            records = _pairs(database)
            # EMAN2 makes one named database a file; its root page's number stands under its name, big-endian
            if len(records) == 1 and records[0][0] == path.stem.encode() and len(records[0][1]) == 4:
                page = int.from_bytes(records[0][1], "big")
                database.meta = type(database.meta)(database.page(page).raw)
                records = _pairs(database)
        except (NotImplementedError, EOFError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"{path} is no Berkeley DB B-tree of a little-endian machine, or cut short ({error}); copy it again"
            ) from error
    return records


def _pairs(database: Any) -> list[tuple[bytes, bytes]]:
    if not database.is_btree or database.is_recno:
        raise ValueError("another kind of Berkeley DB")
    # a tree without records is one empty leaf, which dissect.database takes for an error
    root = database.page(database.meta.root)
    return list(database.records()) if root.header.entries else []


class _Vector:
    """Stands in for EMAN2's classes that are pickled as a list of numbers."""

    def __init__(self, values: list[float]) -> None:
        self.values = [float(value) for value in values]


class _Transform(_Vector):
    pass


class _Unpickler(pickle.Unpickler):
    """Numbers, text and collections of them; of classes none but stand-ins for EMAN2's own."""

    def find_class(self, module: str, name: str) -> type:
        if module.startswith(("libpy", "EMAN2")) and name in ("Transform", "EMAN1Ctf", "EMAN2Ctf"):
            return _Transform if name == "Transform" else _Vector
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _unpickle(data: bytes) -> Any:
    value = _Unpickler(io.BytesIO(data), encoding="utf-8", errors="surrogateescape").load()
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, _Transform):
        return np.array(value.values, np.float32).reshape(3, 4)
    return value.values if isinstance(value, _Vector) else value


def _shape(header: Header) -> tuple[int, ...]:
    nx, ny, nz = (int(header[name]) for name in ("nx", "ny", "nz"))
    return (ny, nx) if nz == 1 else (nz, ny, nx)
