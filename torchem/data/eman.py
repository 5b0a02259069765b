"""EMAN2's HDF5 stacks: image i is the dataset /MDF/images/i/image, its header the attributes EMAN.* of /MDF/images/i.

What is written is what EMAN2 itself would write: 32-bit integers and floats in spaces of one value, text as C strings,
truth as the letters T and F, and transforms (``xform.align2d``) as compounds of twelve floats, a 3 × 4 matrix.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5p, h5s, h5t

from torchem.data.files import replacing
from torchem.errors import InputError

Header: TypeAlias = dict[str, Any]

_TRANSFORM = np.dtype([(f"{row}{column}", np.float32) for row in range(3) for column in range(4)])
_PIXELS = (np.float32, np.uint8, np.int8, np.uint16, np.int16)
_LARGE = 60_000  # bytes; the first version of HDF5's object headers holds no attribute beyond 64 kB


class EmanStack:
    """Images or volumes of an EMAN2 HDF5 file, read from disk when they are asked for.

    Attributes
    ----------
    path
        the file.
    shape
        `(y, x)` of the first image, `(z, y, x)` of the first volume.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"file {path} not found; check the path")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise InputError(f"{path} cannot be read as HDF5 ({error}); copy or make it again") from error
        if not isinstance(self._file.get("MDF/images"), h5py.Group):
            raise InputError(f"{path} has no /MDF/images, so it is no EMAN2 stack; give one, or an MRC stack")
        self._images = self._file["MDF/images"].id
        if h5a.exists(self._images, b"imageid_max"):
            self._count = int(_read_attribute(h5a.open(self._images, b"imageid_max"))) + 1
        else:
            self._count = self._images.get_num_objs()
        if self._count < 1:
            raise InputError(f"{path} holds no images; give a stack with images")
        self.shape = _squeezed(self._dataset(0).shape)

    def __len__(self) -> int:
        return self._count

    @property
    def pixel_size(self) -> float | None:
        """Å, from the first image's apix_x; None where it is not there or not positive."""
        size = self.header(0).get("apix_x", 0.0)
        return float(str(size)) if size > 0 else None  # a float32's shortest digits

    def check(self) -> None:
        """Raise `InputError` unless all images are there and of one size."""
        for index in range(len(self)):
            self._check_shape(index, self._dataset(index).shape)

    def read(self, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Images `(n, y, x)` or volumes `(n, z, y, x)`, float32, at ``indices`` from 0; in ``out``, if there is one.

        Integers that EMAN2 stored in place of floats to save room are brought back to their range.

        Raises
        ------
        InputError
            for an image that is not there or of another size than the first.
        """
        indices = np.asarray(indices, np.int64).reshape(-1)
        images = np.empty((len(indices), *self.shape), np.float32) if out is None else out
        for row in np.argsort(indices, kind="stable").tolist():  # disks like to read forwards
            index = int(indices[row])
            dataset = self._dataset(index)
            self._check_shape(index, dataset.shape)
            self._read(dataset, index, images[row].reshape(dataset.shape))
            if dataset.get_type().get_class() == h5t.INTEGER:
                _restore_range(images[row], self.header(index))
        return images

    def stored(self, index: int) -> np.ndarray:
        """One image as it lies in the file, in its own type: for a copy that is true to the byte."""
        dataset = self._dataset(index)
        pixels = np.empty(dataset.shape, dataset.dtype)
        self._read(dataset, index, pixels)
        return pixels

    def header(self, index: int) -> Header:
        """Header of an image: names without ``EMAN.``, values as they are stored.

        Numbers of 32 bits are int, ``np.uint32`` and ``np.float32``, doubles are float; arrays are int32 or float32;
        a transform is its `(3, 4)` float32 matrix. An array of one value cannot be told from a number.
        """
        group = self._group(index)
        header: Header = {}
        for number in range(h5a.get_num_attrs(group)):
            attribute = h5a.open(group, index=number)
            if attribute.name.startswith(b"EMAN."):
                header[attribute.name[5:].decode()] = _read_attribute(attribute)
        return header

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _group(self, index: int) -> h5g.GroupID:
        try:
            return h5g.open(self._images, b"%d" % index)
        except (KeyError, ValueError):
            raise self._missing(index) from None

    def _dataset(self, index: int) -> h5d.DatasetID:
        try:
            return h5d.open(self._images, b"%d/image" % index)
        except KeyError:
            raise self._missing(index) from None

    def _read(self, dataset: h5d.DatasetID, index: int, pixels: np.ndarray) -> None:
        try:
            dataset.read(h5s.ALL, h5s.ALL, pixels)
        except OSError as error:
            raise InputError(f"{self.path}: image {index} cannot be read ({error}); copy the file again") from error

    def _missing(self, index: int) -> InputError:
        return InputError(
            f"{self.path}: image {index} is not there, of {self._count} that the file is said to hold (counted from "
            "0); copy it again, or write the stack anew with e2proc2d.py"
        )

    def _check_shape(self, index: int, shape: tuple[int, ...]) -> None:
        if _squeezed(shape) != self.shape:
            raise InputError(
                f"{self.path}: image {index} is of {_size(shape)} px, image 0 of {_size(self.shape)}; give a stack of "
                "one size (e2proc2d.py --clip)"
            )


def write_eman(
    path: str | Path,
    images: Iterable[np.ndarray],
    headers: Iterable[Mapping[str, Any]] | None = None,
    pixel_size: float | None = None,
) -> None:
    """Write a stack as EMAN2 does, under a temporary name until whole.

    Parameters
    ----------
    images
        `(n, y, x)` images or `(n, z, y, x)` volumes; 8 and 16-bit integers stay so, all else becomes float32.
    headers
        for each image what `EmanStack.header` gives; nx, ny and nz are set. int, and integers and floats in arrays,
        become 32 bits, and a `(3, 4)` array a transform. What says how integers stand for floats is left out where
        the pixels are floats.
    pixel_size
        Å, as apix_x, apix_y, apix_z of every image; without it what ``headers`` say.

    Raises
    ------
    ValueError
        for a header value that EMAN2 has no type for.
    """
    listed = None if headers is None else [dict(header) for header in headers]
    large = any(np.size(value) * 4 > _LARGE for header in listed or () for value in header.values())
    version = ("v108", "latest") if large else ("earliest", "latest")
    # the oldest version of the format that holds the headers: any EMAN2 reads it
    with replacing(path) as temporary, h5py.File(temporary, "w", libver=version) as file:
        group = file.create_group("MDF/images").id
        count = 0
        for count, image in enumerate(images, 1):
            if listed is not None and count > len(listed):
                raise ValueError(f"{path}: more images than the {len(listed)} headers")
            header = {} if listed is None else listed[count - 1]
            if pixel_size is not None:
                header |= {f"apix_{axis}": np.float32(pixel_size) for axis in "xyz"}
            _write_image(group, count - 1, np.asarray(image), header)
        if listed is not None and count < len(listed):
            raise ValueError(f"{path}: {count} images for {len(listed)} headers")
        _write_attribute(group, "imageid_max", count - 1)


def _write_image(images: h5g.GroupID, index: int, image: np.ndarray, header: Header) -> None:
    if image.ndim not in (2, 3):
        raise ValueError(f"image {index} of shape {image.shape} is neither `(y, x)` nor `(z, y, x)`")
    if image.dtype not in _PIXELS:
        image = image.astype(np.float32)
    image = np.ascontiguousarray(image).reshape(_squeezed(image.shape))
    if image.dtype == np.float32:
        header = {name: value for name, value in header.items() if not name.startswith("stored_")}
    header |= {"nx": image.shape[-1], "ny": image.shape[-2], "nz": image.shape[0] if image.ndim == 3 else 1}
    group = h5g.create(images, b"%d" % index)
    for name in sorted(header):  # EMAN2's order
        _write_attribute(group, f"EMAN.{name}", header[name])
    kind = h5t.py_create(image.dtype)
    timeless = h5p.create(h5p.DATASET_CREATE)
    timeless.set_obj_track_times(False)  # the same images make the same file, whenever they are written
    dataset = h5d.create(group, b"image", kind, h5s.create_simple(image.shape), timeless)
    dataset.write(h5s.ALL, h5s.ALL, image)


def _write_attribute(group: h5g.GroupID, name: str, value: Any) -> None:
    if isinstance(value, bool | np.bool_):
        value = np.int8(ord("T" if value else "F"))
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogateescape")
        kind = h5t.C_S1.copy()
        kind.set_size(len(data) + 1)
        h5a.create(group, name.encode(), kind, h5s.create(h5s.SCALAR)).write(np.array(data, f"S{len(data) + 1}"))
        return
    array = np.asarray(value)
    single = array.ndim == 0
    if array.shape == (3, 4):
        array = np.ascontiguousarray(array, np.float32).reshape(-1).view(_TRANSFORM)
    elif array.dtype.kind == "f":
        array = array if single and array.dtype == np.float64 else array.astype(np.float32)
    elif array.dtype.kind in "iu":
        narrow = array.dtype in (np.int8, np.uint32) and single
        if not narrow and array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
            raise ValueError(f"header {name}: {value!r} does not fit into 32 bits")
        array = array if narrow else array.astype(np.int32)
    if array.dtype.kind not in "fiuV" or array.ndim > 1:
        raise ValueError(f"header {name}: EMAN2 has no type for {value!r}")
    array = np.atleast_1d(array)
    attribute = h5a.create(group, name.encode(), h5t.py_create(array.dtype), h5s.create_simple(array.shape))
    if array.size:
        attribute.write(array)


def _read_attribute(attribute: h5a.AttrID) -> Any:
    values = np.empty(attribute.shape, attribute.dtype)
    if values.size:
        attribute.read(values)
    if values.dtype == _TRANSFORM:
        return values.reshape(-1)[:1].view(np.float32).reshape(3, 4)
    if values.size != 1:
        return values
    value = values.reshape(-1)[0]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.int8) and value in (ord("T"), ord("F")):
        return bool(value == ord("T"))
    return value.item() if isinstance(value, np.int32 | np.float64) else value


def _restore_range(image: np.ndarray, header: Header) -> None:
    """Undo EMAN2's rounding to few bits: 0 … 2^bits − 1 stand for stored_rendermin … stored_rendermax."""
    bits = int(header.get("stored_renderbits", 0))
    low, high = float(header.get("stored_rendermin", 0)), float(header.get("stored_rendermax", 0))
    if bits > 0 and high > low:
        image *= (high - low) / (2**bits - 1)
        image += low


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`(1, y, x)` is an image, not a volume."""
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, reversed(_squeezed(shape))))
