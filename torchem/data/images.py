"""Images of any file that holds them: MRC stacks, RELION's and cryoSPARC's tables, EMAN2's HDF5 and BDB stacks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from torchem.data.bdb import BdbStack
from torchem.data.eman import EmanStack
from torchem.data.mrc import ImageStacks
from torchem.data.particles import Particles
from torchem.errors import InputError

_MRC = (".mrcs", ".mrc", ".st", ".map")
_HDF5 = (".hdf", ".hdf5", ".h5")
_TABLES = (".star", ".cs")


class Reader(Protocol):
    """What gives images at indices, in an array of the caller's if there is one."""

    def __call__(self, indices: np.ndarray | list[int], out: np.ndarray | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Images:
    """Square images of one size, on disk until they are read.

    Attributes
    ----------
    source
        what was opened.
    names
        one an image, ``000001@FILE`` as RELION has it, counted from 1 in every kind of file.
    box
        L, pixels.
    pixel_size
        Å; None where the file does not say.
    read
        gives `(n, L, L)` float32 images at any indices from 0; in ``out``, if there is one.
    check
        raises `InputError` unless all images are there, whole and of one size.
    particles
        the table that was opened, for STAR and .cs files.
    """

    source: str
    names: Sequence[str]
    box: int
    pixel_size: float | None
    read: Reader
    check: Callable[[], None]
    particles: Particles | None = None

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def open(cls, path: str | Path, root: str | Path | None = None, pixel_size: float | None = None) -> "Images":
        """Images of a stack or table, by its name.

        Parameters
        ----------
        path
            ``.mrcs`` (``.mrc``, ``.st``), ``.hdf``, ``bdb:FOLDER#NAME`` or ``EMAN2DB/NAME.bdb``, ``.star`` or ``.cs``.
        root, pixel_size
            as in `Particles.read`; ``root`` is for tables only.

        Raises
        ------
        InputError
            for a file that is missing, of another kind, or holds volumes or images that are not square.
        """
        name = str(path)
        suffix = Path(name).suffix.lower()
        if suffix in _TABLES:
            return _of_particles(name, Particles.read(path, root, pixel_size))
        if suffix in _MRC:
            return _of_mrc(name, pixel_size)
        if suffix in _HDF5:
            return _of_eman(name, EmanStack(name), pixel_size)
        if name.lower().startswith("bdb:") or suffix == ".bdb":
            return _of_eman(name, BdbStack(name), pixel_size)
        raise InputError(
            f"{name or 'an empty name'} is no file of images by its name; give one that ends in .mrcs, .hdf, .star, "
            ".cs or .bdb, or bdb:FOLDER#NAME"
        )


def _of_particles(name: str, particles: Particles) -> Images:
    sizes = sorted({(optics.box, optics.pixel_size) for optics in particles.optics})
    if len(sizes) > 1:
        listed = ", ".join(f"{box} px of {size:g} Å" for box, size in sizes)
        raise InputError(f"{name} has images of different sizes ({listed}); bring them to one, or split the file")
    names = particles.table["rlnImageName"].tolist()
    box, pixel_size = sizes[0]

    def check() -> None:
        stacks = particles.stacks
        stacks.check()
        for file in range(len(stacks.files)):
            width = stacks.header(file).shape[2]
            if width != box:
                raise InputError(
                    f"{stacks.path(file)}: images of {width} px, others of {name} have {box} px; scale or clip them to "
                    "one size, or split the file"
                )

    return Images(name, names, box, pixel_size, particles.images, check, particles)


def _of_mrc(name: str, pixel_size: float | None) -> Images:
    header = ImageStacks([f"1@{name}"], Path).header(0)
    names = [f"{number:06d}@{name}" for number in range(1, header.shape[0] + 1)]
    stack = ImageStacks(names, Path)
    stack.check()  # one file: reads its header only
    if pixel_size is None and header.voxel[2] > 0:
        pixel_size = float(f"{header.voxel[2]:.6g}")
    return Images(name, names, header.shape[2], pixel_size, stack.read, stack.check)


def _of_eman(name: str, stack: EmanStack | BdbStack, pixel_size: float | None) -> Images:
    if len(stack.shape) != 2:
        raise InputError(f"{name} holds volumes of {' x '.join(map(str, reversed(stack.shape)))}; give images")
    height, width = stack.shape
    if height != width:
        raise InputError(f"{name}: images of {width} x {height} px are not square; clip them (e2proc2d.py --clip)")
    names = [f"{number:06d}@{name}" for number in range(1, len(stack) + 1)]
    return Images(name, names, width, stack.pixel_size if pixel_size is None else pixel_size, stack.read, stack.check)
