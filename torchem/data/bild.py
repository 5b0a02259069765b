"""Pictures for ChimeraX: its BILD files."""

from pathlib import Path

import numpy as np

from torchem.data.files import replacing

# bands of directions in azimuth; half as many in height
SECTORS = 36


def write_angular_distribution(path: str | Path, angles: np.ndarray, radius: float, comment: str = "") -> None:
    """How many particles look along each direction, as cylinders around a map.

    Parameters
    ----------
    angles
        `(n, 2)` degrees: rot and tilt of each particle.
    radius
        Å: half the box.
    """
    rot, tilt = angles.T
    bands = SECTORS // 2
    # equal areas: bands of equal height in cos(tilt)
    band = np.clip((1 - np.cos(np.deg2rad(tilt))) / 2 * bands, 0, bands - 1).astype(int)
    sector = np.clip(rot % 360.0 / 360.0 * SECTORS, 0, SECTORS - 1).astype(int)
    counts = np.bincount(band * SECTORS + sector, minlength=bands * SECTORS)
    (present,) = np.nonzero(counts)
    share = counts[present] / counts.max()
    cosine, azimuth = 1 - (2 * (present // SECTORS) + 1) / bands, (present % SECTORS + 0.5) * 2 * np.pi / SECTORS
    sine = np.sqrt(1 - cosine**2)
    direction = np.stack((sine * np.cos(azimuth), sine * np.sin(azimuth), cosine), 1)
    ends = np.hstack((direction * radius + radius, direction * radius * (1 + 0.4 * share[:, None]) + radius))
    lines = [f".comment {comment}"]
    for part, end in zip(share.tolist(), ends.tolist(), strict=True):
        lines.append(f".color {part:.3f} 0 {1 - part:.3f}")
        lines.append(".cylinder " + " ".join(f"{v:.3f}" for v in (*end, radius / 40)))
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
