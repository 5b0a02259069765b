"""MRC maps and image stacks (MRC2014; modes 0, 1, 2, 6 and 12)."""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import mrcfile
import numpy as np

from torchem.data.files import replacing
from torchem.errors import InputError

_TYPES = {0: np.int8, 1: np.int16, 2: np.float32, 6: np.uint16, 12: np.float16}
_OPEN_STACKS = 128  # each memory map holds a file descriptor; systems often allow 1,024
READERS = 8  # threads that copy images out of memory maps
COPIED = 2**23  # bytes that each copies at once


class Header(NamedTuple):
    """What is needed to map an MRC file's values."""

    shape: tuple[int, int, int]  # sections, rows, columns
    dtype: np.dtype
    offset: int  # bytes before the first value
    voxel: tuple[float, float, float]  # Å in z, y, x; 0 where the header does not say
    axes: tuple[int, int, int]  # which of x = 1, y = 2, z = 3 columns, rows and sections are
    volume: bool


def read_header(path: str | Path) -> Header:
    """Header of an MRC file whose data are all there.

    Raises
    ------
    InputError
        for a file that is missing, not MRC, of a mode other than 0, 1, 2, 6, 12, or shorter than its header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mrcfile warns about lax headers; what matters is checked below
            with mrcfile.open(path, header_only=True, permissive=True) as file:
                header = file.header
                byte_order = header.nx.dtype.byteorder
                # a wrong machine stamp: the numbers are sensible in the other byte order
                if max(abs(int(header.mode)), abs(int(header.nx))) > 0xFFFF:
                    header = header.view(header.dtype.newbyteorder())
                    byte_order = {"<": ">", ">": "<"}.get(byte_order, ">")
                mode = int(header.mode)
                shape = (int(header.nz), int(header.ny), int(header.nx))
                sampling = (int(header.mz), int(header.my), int(header.mx))
                cell = (float(header.cella.z), float(header.cella.y), float(header.cella.x))
                axes = (int(header.mapc), int(header.mapr), int(header.maps))
                offset = 1024 + int(header.nsymbt)
                volume = int(header.ispg) != 0
    except FileNotFoundError:
        raise InputError(f"file {path} not found; check the path") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as an MRC file ({error}); give an MRC map or stack") from error
    if mode not in _TYPES or min(shape) < 1 or offset < 1024:
        raise InputError(
            f"{path}: MRC mode {mode} with {shape[2]} x {shape[1]} x {shape[0]} values cannot be read; it is either no "
            f"MRC file or holds none of the modes {', '.join(map(str, _TYPES))}: convert it (relion_image_handler)"
        )
    dtype = np.dtype(_TYPES[mode]).newbyteorder(byte_order)
    section = shape[1] * shape[2] * dtype.itemsize
    if size < offset + shape[0] * section:
        raise InputError(
            f"{path} is truncated: its header says {shape[0]} sections of {shape[2]} x {shape[1]} px in MRC mode "
            f"{mode}, {offset + shape[0] * section} bytes, but it has {size} bytes "
            f"({max(0, size - offset) // section} whole sections); copy or make it again"
        )
    if sorted(axes) != [1, 2, 3]:
        axes = (1, 2, 3)  # old programs leave zeros there
    voxel = tuple(
        length / count if count > 0 and length > 0 else 0.0 for length, count in zip(cell, sampling, strict=True)
    )
    return Header(shape, dtype, offset, voxel, axes, volume)  # type: ignore[arg-type]


def read_map(path: str | Path) -> tuple[np.ndarray, float | None]:
    """Values of a map or stack as float32 `(z, y, x)` and its pixel size in Å, None where the header has none.

    Raises
    ------
    InputError
        as `read_header` does, and for voxels that are not cubes and values that are not finite.
    """
    header = read_header(path)
    values = np.fromfile(path, header.dtype, int(np.prod(header.shape)), offset=header.offset)
    values = values.astype(np.float32).reshape(header.shape)
    # sections, rows, columns -> z, y, x
    order = [3 - axis for axis in reversed(header.axes)]
    values = np.ascontiguousarray(np.moveaxis(values, (0, 1, 2), order))
    sizes = header.voxel if header.volume else header.voxel[1:]
    if min(sizes) > 0 and max(sizes) > 1.001 * min(sizes):
        raise InputError(
            f"{path}: its voxels are not cubes ({', '.join(f'{size:.4f}' for size in sizes)} Å in z, y, x); resample "
            "the map or correct its header"
        )
    if not np.isfinite(values).all():
        raise InputError(f"{path} holds values that are not finite (NaN or infinite); make the map again")
    # the header holds float32 lengths: 7 digits are what it can say
    return values, float(f"{header.voxel[2]:.6g}") if header.voxel[2] > 0 else None


def write_map(path: str | Path, array: np.ndarray, pixel_size: float, label: str = "") -> None:
    """Write `(z, y, x)` values as a volume of mode 2, under a temporary name until whole; ``label`` into the header."""
    _write(path, array, pixel_size, label, volume=True)


def write_stack(path: str | Path, array: np.ndarray, pixel_size: float, label: str = "") -> None:
    """Write images `(n, y, x)` as a stack of mode 2 (float16 as mode 12), under a temporary name until whole."""
    _write(path, array, pixel_size, label, volume=False)


def _write(path: str | Path, array: np.ndarray, pixel_size: float, label: str, volume: bool) -> None:
    if array.ndim != 3:
        raise ValueError(f"{path}: an array of shape {array.shape} is not `(z, y, x)`")
    if array.dtype != np.float16 or volume:
        array = np.asarray(array, np.float32)
    with replacing(path) as temporary, mrcfile.new(temporary) as file:
        file.set_data(np.ascontiguousarray(array))
        if volume:
            file.set_volume()
        else:
            file.set_image_stack()
        file.voxel_size = pixel_size
        # mrcfile's own label has the time in it: the same numbers shall give the same bytes
        file.header.label = b""
        file.header.label[0] = (label or "torchem").encode("ascii", "replace")[:80]
        file.header.nlabl = 1


def _run(places: np.ndarray) -> np.ndarray | slice:
    """Places one after the other as a slice, by which they are copied once and not twice."""
    return slice(int(places[0]), int(places[-1]) + 1) if (np.diff(places) == 1).all() else places


class ImageStacks:
    """Images that names like ``000001@Extract/a.mrcs`` point to, in any number of memory-mapped stacks.

    Parameters
    ----------
    names
        one name an image, counted from 1 within its stack; a name without ``@`` is a file of one image.
    resolve
        gives the path of a stack file named so, or raises `InputError`.
    where
        the file that the names stand in, for error messages.

    Attributes
    ----------
    files
        stack names in order of first appearance.
    file
        `(n,)` int64, which of ``files`` each image is in.
    position
        `(n,)` int64, its place there, from 0.
    """

    def __init__(self, names: Sequence[str], resolve: Callable[[str], Path], where: str | Path = "") -> None:
        self._where = f"{where}, " if where else ""
        numbers: dict[str, int] = {}
        self.file = np.empty(len(names), np.int64)
        self.position = np.empty(len(names), np.int64)
        for row, name in enumerate(names):
            index, at, file = str(name).partition("@")
            if not at:
                index, file = "1", str(name)
            if not index.isdecimal() or int(index) < 1 or not file:
                raise InputError(
                    f"{self._where}row {row + 1}: image name {name!r} is not NUMBER@STACK with a number from 1; "
                    "correct rlnImageName"
                )
            self.file[row] = numbers.setdefault(file, len(numbers))
            self.position[row] = int(index) - 1
        self.files = list(numbers)
        self._names = names
        self._resolve = resolve
        self._headers: dict[int, tuple[Path, Header]] = {}
        self._open = lru_cache(maxsize=_OPEN_STACKS)(self._map)

    def __len__(self) -> int:
        return len(self.file)

    def header(self, file: int) -> Header:
        """Header of stack ``file``, read once."""
        return self._located(file)[1]

    def path(self, file: int) -> Path:
        """Where stack ``file`` was found."""
        return self._located(file)[0]

    def check(self) -> None:
        """Raise `InputError` unless every stack is there, whole, of square images, and holds all that is named."""
        order = np.lexsort((self.position, self.file))
        ends = np.cumsum(np.bincount(self.file, minlength=len(self.files)))
        for file, last in enumerate(order[ends - 1].tolist()):
            path, header = self._located(file)
            if self.position[last] >= header.shape[0]:
                raise self._past_the_end(last, path, header.shape[0])
            if header.shape[1] != header.shape[2]:
                raise InputError(
                    f"{path}: images of {header.shape[2]} x {header.shape[1]} px are not square; extract square "
                    "particles"
                )

    def read(self, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Images `(n, L, L)` float32 of the rows ``indices``, all of one size; in ``out``, if there is one.

        Raises
        ------
        InputError
            for stacks as `check`, and images of different sizes together.
        """
        indices = np.asarray(indices, np.int64).reshape(-1)
        shapes = {self.header(file).shape[1:] for file in np.unique(self.file[indices])}
        if len(shapes) != 1:
            raise InputError(
                f"images of different sizes read together: {sorted(shapes)}; read one optics group at a time"
            )
        images = np.empty((len(indices), *shapes.pop()), np.float32) if out is None else out
        files, positions = self.file[indices], self.position[indices]
        stacks = {file: self._open(file) for file in np.unique(files).tolist()}
        counts = np.array([len(stacks[file]) for file in files.tolist()])
        if (positions >= counts).any():
            row = int(np.argmax(positions >= counts))
            raise self._past_the_end(indices[row], self.path(files[row]), counts[row])

        def copy(rows: np.ndarray) -> None:
            for run in np.split(rows, np.flatnonzero(np.diff(files[rows])) + 1):
                # few steps: between them a thread waits for the interpreter
                for some in np.split(run, range(at_once, len(run), at_once)):
                    images[_run(some)] = stacks[int(files[some[0]])][_run(positions[some])]

        at_once = max(1, COPIED * len(images) // max(1, images.nbytes))
        # disks like to read forwards, and one thread cannot keep up with a fast one, or with memory
        parts = np.array_split(np.lexsort((positions, files)), READERS)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(copy, [part for part in parts if len(part)]))
        return images

    def _past_the_end(self, row: int, path: Path, count: int) -> InputError:
        return InputError(
            f"{self._where}row {row + 1}: image {self._names[row]} is past the end of {path}, which has {count} "
            "images; correct rlnImageName or copy the whole stack"
        )

    def _located(self, file: int) -> tuple[Path, Header]:
        file = int(file)
        if file not in self._headers:
            path = self._resolve(self.files[file])
            self._headers[file] = path, read_header(path)
        return self._headers[file]

    def _map(self, file: int) -> np.ndarray:
        path, header = self._located(file)
        return np.memmap(path, header.dtype, mode="r", offset=header.offset, shape=header.shape)
