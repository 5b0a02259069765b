"""The initial reference and the solvent mask, from any map or atomic model to the particles' box and pixel size."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np

from torchem.errors import InputError

log = logging.getLogger(__name__)

_ATOMIC_MODELS = (".pdb", ".ent", ".cif", ".mmcif")


def read_reference(path: str | Path, box: int, pixel_size: float) -> np.ndarray:
    """Read a map (.mrc) or make one from an atomic model (.pdb, .cif), `box` px of `pixel_size` Å.

    Maps keep the greyscale of their projections (sums along z). Atomic models are centred on their mass and
    carry one arbitrary unit of density an electron.

    Parameters
    ----------
    path
        Map of any box and pixel size, or atomic model.

    Returns
    -------
    `(box, box, box)` float32 (z, y, x), origin at box // 2.

    Raises
    ------
    InputError
        Not a cubic map, no pixel size, a map without contrast, an atomic model larger than the box.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"reference.map={path}: no such file; give a map (.mrc) or an atomic model (.pdb, .cif)")
    if path.suffix.lower() in _ATOMIC_MODELS:
        return _density(path, box, pixel_size)
    volume, own_pixel_size = _read_cubic(path, "reference.map")
    if (width := len(volume) * own_pixel_size) < box * pixel_size / 2:
        log.warning(
            "reference.map=%s is %.0f Å wide, the images %.0f Å: is %g Å, the pixel size in its header, right?",
            path, width, box * pixel_size, own_pixel_size,
        )  # fmt: skip
    return rescale(volume, own_pixel_size, box, pixel_size)


def read_mask(path: str | Path, box: int, pixel_size: float) -> np.ndarray:
    """Read a solvent mask, values in [0, 1], of any box and pixel size.

    Returns
    -------
    `(box, box, box)` float32 (z, y, x).

    Raises
    ------
    InputError
        Not a cubic map, values beyond [0, 1], nothing inside.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"reference.mask={path}: no such file; give a map (.mrc) with values between 0 and 1")
    mask, own_pixel_size = _read_cubic(path, "reference.mask")
    if mask.min() < -1e-3 or mask.max() > 1 + 1e-3:
        raise InputError(
            f"reference.mask={path}: values from {mask.min():g} to {mask.max():g}; a mask has values between 0 and 1"
        )
    # band-limited interpolation overshoots at the edge, and projections' greyscale means nothing here
    return np.clip(rescale(mask, own_pixel_size, box, pixel_size) * (own_pixel_size / pixel_size), 0, 1)


def rescale(volume: np.ndarray, pixel_size: float, new_box: int, new_pixel_size: float) -> np.ndarray:
    r"""Resample a cubic map by its Fourier series, exactly at the new points and cut at the new Nyquist frequency.

    :math:`V'(x) = \frac{a'}{a} \sum_k F_k\, e^{2\pi i k x a' / (L a)}` along each axis, with
    :math:`|k| < L a / 2a'`, so that any pair of pixel sizes is matched without rounding. Beyond the old box it
    is the mean of the old faces.

    Parameters
    ----------
    volume
        `(L, L, L)` (z, y, x), origin at L // 2.
    pixel_size, new_pixel_size
        a and a', Å.

    Returns
    -------
    `(new_box, new_box, new_box)` float32; multiplied by a'/a, so that sums along a line keep their value.
    """
    box = volume.shape[0]
    if box == new_box and math.isclose(pixel_size, new_pixel_size, rel_tol=1e-4):
        return np.ascontiguousarray(volume, dtype=np.float32)
    faces = [volume.take(side, axis) for axis in range(3) for side in (0, -1)]
    background = float(np.mean(faces))
    # positions of the new samples in old pixels, and the Dirichlet kernel that the Fourier series amounts to
    position = (np.arange(new_box) - new_box // 2) * (new_pixel_size / pixel_size)
    terms = 2 * math.ceil(min(box / 2, box * pixel_size / (2 * new_pixel_size))) - 1
    angle = np.pi / box * (position[:, None] - (np.arange(box) - box // 2)[None, :])
    at_sample = np.abs(np.sin(angle)) < 1e-12
    kernel = np.sin(terms * angle) / np.where(at_sample, 1, box * np.sin(angle))
    kernel[at_sample] = terms / box
    kernel[(position < -(box // 2)) | (position > (box - 1) // 2)] = 0
    inside = np.einsum("zk,yj,xi,kji->zyx", kernel, kernel, kernel, volume - background, optimize=True)
    return ((inside + background) * (new_pixel_size / pixel_size)).astype(np.float32)


def _read_cubic(path: Path, option: str) -> tuple[np.ndarray, float]:
    from torchem.data.mrc import read_map

    volume, pixel_size = read_map(path)
    if len(set(volume.shape)) != 1:
        shape = " × ".join(str(n) for n in volume.shape[::-1])
        raise InputError(f"{option}={path}: {shape} voxels; give a cubic map, centred in its box")
    if pixel_size is None:
        raise InputError(f"{option}={path}: its header has no pixel size; set the cell dimensions in the header")
    if volume.max() == volume.min():
        raise InputError(f"{option}={path}: every voxel is {volume.max():g}; give a map of the particle")
    return volume, pixel_size


def _density(path: Path, box: int, pixel_size: float) -> np.ndarray:
    from torchem.data.atoms import read_atoms
    from torchem.imaging.density import density

    xyz, weights = read_atoms(path)
    centred = xyz - (weights[:, None] * xyz).sum(0) / weights.sum()
    reach = float(np.abs(centred).max())
    if reach > (box // 2 - 1) * pixel_size:
        raise InputError(
            f"reference.map={path}: atoms up to {reach:.0f} Å from the centre, and the particles' box ends at "
            f"{box // 2 * pixel_size:.0f} Å; give the model of the particle alone, or particles in a larger box"
        )
    return density(centred, weights, box, pixel_size, resolution=3 * pixel_size, centre="keep").numpy()
