"""Parameters of 2D alignment, one row an image, and the two ways in which EMAN2 and RELION say the same transform.

Both move a point p of the image, seen from its centre (pixel L // 2), to a point y of the aligned image:

* EMAN2: y = M (R(alpha) p + (sx, sy)), rotate, then shift, then mirror; R(a) = [[cos a, sin a], [−sin a, cos a]] and
  M turns x to −x where ``mirror`` is 1. ``xform.align2d`` is the 3 × 4 matrix of this.
* RELION: y = M (R(−psi) (p + origin)), shift, then rotate; and mirror where ``rlnIsFlip`` is 1. RELION's programs
  define that label ("an image should be mirrored") without using it: that it comes last is torchem's reading.

So psi = −alpha and origin = R(−alpha) (sx, sy): pixels there, Å in ``rlnOriginXAngst``.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from torchem.data.files import replacing
from torchem.data.star import read_star, write_star
from torchem.errors import InputError

# EMAN2's names; degrees and pixels; class_id from 0; peak and pixel_error as the aligner gives them
COLUMNS = ("image", "class_id", "mirror", "alpha", "sx", "sy", "peak", "pixel_error")
_NEEDED = ("class_id", "mirror", "alpha", "sx", "sy")
_WHOLE = ("class_id", "mirror")
# RELION has no label for these
_PEAK, _PIXEL_ERROR = "torchemPeak", "torchemPixelError"


def to_matrix(parameters: pd.DataFrame) -> np.ndarray:
    """`(n, 3, 4)` float64 matrices, EMAN2's ``xform.align2d`` of each row, for points (x, y, z) in pixels."""
    angle = np.deg2rad(parameters["alpha"].to_numpy(np.float64))
    sign = 1.0 - 2.0 * parameters["mirror"].to_numpy(np.float64)
    matrix = np.zeros((len(parameters), 3, 4))
    matrix[:, 0, 0], matrix[:, 0, 1] = sign * np.cos(angle), sign * np.sin(angle)
    matrix[:, 1, 0], matrix[:, 1, 1] = -np.sin(angle), np.cos(angle)
    matrix[:, 0, 3] = sign * parameters["sx"].to_numpy(np.float64)
    matrix[:, 1, 3] = parameters["sy"]
    matrix[:, 2, 2] = 1
    return matrix


def from_matrix(matrix: np.ndarray) -> pd.DataFrame:
    """Columns mirror, alpha (0 to 360), sx, sy of `(n, 3, 4)` matrices; the inverse of `to_matrix`.

    Raises
    ------
    ValueError
        for a matrix that also scales, or turns out of the plane.
    """
    matrix = np.asarray(matrix, np.float64).reshape(-1, 3, 4)
    plane = matrix[:, :2, :2]
    flat = np.abs(plane @ plane.transpose(0, 2, 1) - np.eye(2)).max(initial=0) < 1e-3
    if not flat or np.abs(matrix[:, 2] - [0, 0, 1, 0]).max(initial=0) > 1e-3:
        raise ValueError("a transform that scales or leaves the plane is none of 2D alignment")
    mirror = np.linalg.det(plane) < 0
    sign = np.where(mirror, -1.0, 1.0)
    alpha = np.rad2deg(np.arctan2(sign * matrix[:, 0, 1], sign * matrix[:, 0, 0]))
    return pd.DataFrame(
        {"mirror": mirror.astype(np.int64), "alpha": _turn(alpha), "sx": sign * matrix[:, 0, 3], "sy": matrix[:, 1, 3]}
    )


def to_relion(parameters: pd.DataFrame, pixel_size: float) -> pd.DataFrame:
    """The same rows with RELION's labels; the class counts from 1, the origin is in Å, psi is in (−180, 180].

    Parameters
    ----------
    parameters
        columns `COLUMNS`, of which image, peak and pixel_error may be missing.
    pixel_size
        Å.
    """
    alpha = parameters["alpha"].to_numpy(np.float64)
    x, y = _rotated(-alpha, parameters["sx"].to_numpy(np.float64), parameters["sy"].to_numpy(np.float64))
    table = {
        "rlnClassNumber": parameters["class_id"].to_numpy(np.int64) + 1,
        "rlnAnglePsi": 180.0 - _turn(alpha + 180.0),
        "rlnOriginXAngst": x * pixel_size,
        "rlnOriginYAngst": y * pixel_size,
        "rlnIsFlip": parameters["mirror"].to_numpy(np.int64),
    }
    if "image" in parameters:
        table = {"rlnImageName": parameters["image"].to_numpy(object)} | table
    for column, label in (("peak", _PEAK), ("pixel_error", _PIXEL_ERROR)):
        if column in parameters:
            table[label] = parameters[column].to_numpy()
    return pd.DataFrame(table)


def from_relion(table: pd.DataFrame, pixel_size: float) -> pd.DataFrame:
    """The inverse of `to_relion`, of any table with RELION's labels; what is missing is 0, the class the first."""

    def column(label: str, default: float) -> np.ndarray:
        return table[label].to_numpy(np.float64) if label in table else np.full(len(table), default)

    alpha = _turn(-column("rlnAnglePsi", 0))
    x, y = column("rlnOriginXAngst", 0) / pixel_size, column("rlnOriginYAngst", 0) / pixel_size
    sx, sy = _rotated(alpha, x, y)
    parameters: dict[str, np.ndarray] = {}
    if "rlnImageName" in table:
        parameters["image"] = table["rlnImageName"].to_numpy(object)
    parameters |= {
        "class_id": column("rlnClassNumber", 1).astype(np.int64) - 1,
        "mirror": column("rlnIsFlip", 0).astype(np.int64),
        "alpha": alpha,
        "sx": sx,
        "sy": sy,
    }
    for name, label in (("peak", _PEAK), ("pixel_error", _PIXEL_ERROR)):
        if label in table:
            parameters[name] = table[label].to_numpy(np.float64)
    return pd.DataFrame(parameters)


def write_parameters(path: str | Path, parameters: pd.DataFrame, pixel_size: float | None = None) -> None:
    """Write the table under a temporary name until whole; digits are the shortest that read back exactly.

    Parameters
    ----------
    path
        ``.csv``: EMAN2's convention. ``.star``: RELION's labels and convention, in one block data_particles.
    pixel_size
        Å, for ``.star``.
    """
    if Path(path).suffix == ".star":
        if pixel_size is None:
            raise ValueError(f"{path}: a STAR file has origins in Å, so a pixel size is needed")
        write_star(path, {"particles": to_relion(parameters, pixel_size)})
        return
    with replacing(path) as temporary:
        parameters[[name for name in COLUMNS if name in parameters]].to_csv(temporary, index=False)


def read_parameters(path: str | Path, pixel_size: float | None = None) -> pd.DataFrame:
    """Table of a ``.csv`` or ``.star`` file in EMAN2's convention; further columns of a ``.csv`` are kept.

    Raises
    ------
    InputError
        for a file that is missing, garbled, without a column that is needed, or with values that are not numbers.
    """
    path = Path(path)
    if path.suffix == ".star":
        if pixel_size is None:
            raise ValueError(f"{path}: a STAR file has origins in Å, so a pixel size is needed")
        table = read_star(path).get("particles")
        if not isinstance(table, pd.DataFrame) or "rlnAnglePsi" not in table:
            raise InputError(f"{path} has no loop data_particles with rlnAnglePsi; give a table of alignments")
        return from_relion(table, pixel_size)
    try:
        table = pd.read_csv(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a table ({error}); give a CSV file with {_NEEDED}") from error
    missing = [name for name in _NEEDED if name not in table]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}; give a table of alignments")
    for name in COLUMNS[1:]:
        if name not in table:
            continue
        values = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64)
        bad = ~np.isfinite(values) | ((name in _WHOLE) & (values != np.floor(values)))
        if bad.any() and (name in _NEEDED):
            row = int(np.flatnonzero(bad)[0])
            kind = "whole number" if name in _WHOLE else "number"
            raise InputError(f"{path}, row {row + 1}: {name} is {table[name].iloc[row]!r}, not a {kind}; correct it")
        table[name] = values.astype(np.int64) if name in _WHOLE else values
    return table


def _rotated(degrees: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R(degrees) (x, y)."""
    angle = np.deg2rad(degrees)
    return np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y


def _turn(degrees: np.ndarray) -> np.ndarray:
    """Angles in [0, 360); a tiny negative one, whose remainder is 360, is 0."""
    turned = np.mod(degrees, 360.0)
    return np.where(turned == 360.0, 0.0, turned)
