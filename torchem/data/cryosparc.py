"""cryoSPARC's .cs files as a RELION table.

Conventions, checked against pyem's csparc2star: ``alignments3D/pose`` is the rotation vector of Aᵀ (A as in RELION's
Euler matrix), ``alignments3D/shift`` times its pixel size is RELION's origin, ``ctf/tilt_A`` is Cs·sin(beam tilt),
``blob/idx`` and ``alignments3D/split`` count from 0, angles are in radians.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from torchem.errors import InputError
from torchem.imaging.symmetry import euler_angles

log = logging.getLogger(__name__)

_NEEDED = ("blob/path", "blob/idx", "blob/psize_A")
_SIMPLE = {
    "ctf/accel_kv": "rlnVoltage",
    "ctf/cs_mm": "rlnSphericalAberration",
    "ctf/amp_contrast": "rlnAmplitudeContrast",
    "ctf/df1_A": "rlnDefocusU",
    "ctf/df2_A": "rlnDefocusV",
    "ctf/bfactor": "rlnCtfBfactor",
    "ctf/scale": "rlnCtfScalefactor",
    "blob/psize_A": "rlnImagePixelSize",
}
_ANGLES = {"ctf/df_angle_rad": "rlnDefocusAngle", "ctf/phase_shift_rad": "rlnPhaseShift"}
# where cryoSPARC and RELION describe the same optics too differently for a conversion to be trusted
_NOT_CONVERTED = ("ctf/trefoil_A", "ctf/tetra_A", "ctf/anisomag")


def read_cs(path: Path) -> pd.DataFrame:
    """Particles of a .cs file and the passthrough files beside it, with RELION's labels.

    A ``*passthrough_particles*.cs`` of the same folder that has all the particles (by uid) gives what the file itself
    lacks. Optics constants are columns, as before RELION 3.1; ``torchemImageSign`` is blob/sign.

    Raises
    ------
    InputError
        for a file that is no .cs file of particles, or lacks where the images are.
    """
    fields = _load(path)
    for other in sorted(path.parent.glob("*passthrough_particles*.cs")):
        if other.resolve() != path.resolve():
            _join(fields, _load(other), other)
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise InputError(
            f"{path} has no {', '.join(missing)}, nor has a *passthrough_particles*.cs beside it; put the job's "
            "passthrough file into the same folder or export the particles"
        )
    return _table(path, fields)


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        records = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is no .cs file, or cut short ({error}); export it from cryoSPARC again") from error
    if not isinstance(records, np.ndarray) or records.dtype.names is None or "uid" not in records.dtype.names:
        raise InputError(f"{path} has no uid column; give a cryoSPARC file of particles")
    return {name: records[name] for name in records.dtype.names}


def _join(fields: dict[str, np.ndarray], other: dict[str, np.ndarray], path: Path) -> None:
    """Add the fields that only ``other`` has, matched by uid, if it has all the particles."""
    order = np.argsort(other["uid"])
    at = np.searchsorted(other["uid"], fields["uid"], sorter=order)
    rows = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(0, np.int64)
    if len(rows) < len(fields["uid"]) or (other["uid"][rows] != fields["uid"]).any():
        log.info("%s does not have all the particles, so it is left out", path)
        return
    for name, values in other.items():
        fields.setdefault(name, values[rows])


def _text(values: np.ndarray) -> list[str]:
    # cryoSPARC marks paths inside a project by ">"
    return [(value.decode() if isinstance(value, bytes) else str(value)).lstrip(">") for value in values.tolist()]


def _table(path: Path, fields: dict[str, np.ndarray]) -> pd.DataFrame:
    names = [
        f"{index + 1:06d}@{file}"
        for index, file in zip(fields["blob/idx"].tolist(), _text(fields["blob/path"]), strict=True)
    ]
    table: dict[str, object] = {"rlnImageName": np.array(names, dtype=object)}
    if "location/micrograph_path" in fields:
        table["rlnMicrographName"] = np.array(_text(fields["location/micrograph_path"]), dtype=object)
    for field, label in _SIMPLE.items():
        if field in fields:
            # float32 as its shortest decimal: 0.07 stays 0.07
            table[label] = fields[field].astype(np.float32).astype(str).astype(np.float64)
    for field, label in _ANGLES.items():
        if field in fields:
            table[label] = np.rad2deg(fields[field].astype(np.float64))
    if "ctf/exp_group_id" in fields:
        table["rlnBeamTiltClass"] = fields["ctf/exp_group_id"].astype(np.int64)
    if "ctf/tilt_A" in fields and np.any(fields["ctf/tilt_A"]):
        sine = fields["ctf/tilt_A"].astype(np.float64) / (fields["ctf/cs_mm"].astype(np.float64)[:, None] * 1e7)
        if not (np.abs(sine) < 1).all():
            raise InputError(f"{path}: ctf/tilt_A without a spherical aberration to match; correct ctf/cs_mm")
        table["rlnBeamTiltX"], table["rlnBeamTiltY"] = 1e3 * np.arcsin(sine).T
    for field in _NOT_CONVERTED:
        if field in fields and np.any(fields[field]):
            log.warning("%s: %s is not carried over to RELION's optics; refine it there", path, field)
    if "blob/shape" in fields:
        table["rlnImageSize"] = fields["blob/shape"][:, 0].astype(np.int64)
        table["rlnImageDimensionality"] = np.full(len(names), 2)
    _alignment(fields, table)
    if "blob/sign" in fields and (fields["blob/sign"] != 1).any():
        table["torchemImageSign"] = np.sign(fields["blob/sign"]).astype(np.int64)
    table["cryosparcUid"] = np.array([str(uid) for uid in fields["uid"].tolist()], dtype=object)
    return pd.DataFrame(table)


def _alignment(fields: dict[str, np.ndarray], table: dict[str, object]) -> None:
    kind = "alignments3D" if "alignments3D/pose" in fields else "alignments2D"
    if f"{kind}/pose" in fields:
        pose = fields[f"{kind}/pose"].astype(np.float64)
        if kind == "alignments3D":
            matrix = torch.linalg.matrix_exp(_cross(torch.from_numpy(pose))).transpose(1, 2)
            angles = euler_angles(matrix)
            for label, values in zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles, strict=True):
                table[label] = np.asarray(values, np.float64)
        else:
            table["rlnAnglePsi"] = np.rad2deg(pose)
    if f"{kind}/shift" in fields:
        pixel = fields.get(f"{kind}/psize_A", fields["blob/psize_A"]).astype(np.float64)
        shift = fields[f"{kind}/shift"].astype(np.float64) * pixel[:, None]
        table["rlnOriginXAngst"], table["rlnOriginYAngst"] = shift.T
    split = fields.get(f"{kind}/split")
    if split is not None and len(np.unique(split)) == 2:  # all alike means not split
        table["rlnRandomSubset"] = split.astype(np.int64) + 1


def _cross(vectors: torch.Tensor) -> torch.Tensor:
    """`(n, 3, 3)` matrices [v]× with [v]× w = v × w."""
    x, y, z = vectors.unbind(1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).reshape(-1, 3, 3)
