"""Point groups in RELION's axes, their asymmetric unit of HEALPix directions, and Euler angles."""

import math
import re
from functools import lru_cache

import healpix
import numpy as np
import torch
from torch import Tensor

from torchem.errors import InputError
from torchem.runtime import memory

# above this many directions RELION leaves the borders of the asymmetric unit as they are
BORDER_LIMIT = 4000
# sine of the tilt up to which rot and psi turn about the same axis
POLE = 16 * torch.finfo(torch.float32).eps
# pairs of an orientation and an operator that are compared at once
COMPARED = 2**18

_ALLOWED = "C1 … C99, D1 … D99, T, O, I (= I2), I1, I2, I3, I4"
_GOLDEN = (1 + math.sqrt(5)) / 2
# I1, I3 and I4 are I2 turned about y by these angles (degrees, passive)
_TURN = {
    "I1": 90.0,
    "I2": 0.0,
    "I3": math.degrees(math.atan(1 / _GOLDEN)),
    "I4": -math.degrees(math.atan(1 / _GOLDEN)),
}


def canonical(name: str) -> str:
    """Upper-case name of a point group, "I" being I2; :class:`InputError` for one that cannot be used."""
    upper = str(name).strip().upper()
    if upper == "I":
        return "I2"
    if re.fullmatch(r"[CD][1-9]\d?|T|O|I[1-4]", upper):
        return upper
    if re.fullmatch(r"C[SI]|S\d+|[CD]\d+[VH]|T[DH]|OH|I\d?H", upper):
        raise InputError(
            f"symmetry {name!r} contains mirrors or inversion, which proteins do not have; "
            f"use its group of rotations, one of {_ALLOWED}"
        )
    if upper == "I5":
        raise InputError("symmetry I5 is not defined, as in RELION; turn the map to the axes of I1, I2, I3 or I4")
    raise InputError(f"symmetry {name!r} is unknown; use one of {_ALLOWED}")


def operators(name: str) -> np.ndarray:
    """Rotations of a group, `(g, 3, 3)` float64, identity first.

    RELION's settings. C_n: n on z. D_n: n on z, 2 on x. T: 3 on z, 2 on (0, √2, 1). O: 4 on the axes, 3 on
    (1, 1, 1). I2: 2 on z, 5 on (1, 0, φ). I1, I3 and I4 are I2 turned about y: I1 has a 2-fold on x and a 5-fold
    on (φ, 0, −1), I3 a 5-fold on z and a 2-fold on (−1, 0, φ), I4 a 2-fold on (1, 0, φ).
    An orientation A (see :func:`rotation_matrix`) has the mates A @ operators.
    """
    group = canonical(name)
    if group in _TURN:
        turn = _about_y(_TURN[group])
        axes = [(2, (0, 0, 1)), (5, (1, 0, _GOLDEN)), (3, (0, 1, _GOLDEN**2))]
        generators = [turn @ _rotation(axis, order) @ turn.T for order, axis in axes]
    elif group == "T":
        generators = [_rotation((0, 0, 1), 3), _rotation((0, math.sqrt(2), 1), 2)]
    elif group == "O":
        generators = [_rotation((0, 0, 1), 4), _rotation((1, 1, 1), 3)]
    else:
        n = int(group[1:])
        # written out, so that a group of 99 needs no products
        about_z = [_rotation((0, 0, 1), n, k) for k in range(n)]
        flips = [np.eye(3), _rotation((1, 0, 0), 2)] if group[0] == "D" else [np.eye(3)]
        return np.stack([z @ flip for flip in flips for z in about_z])
    return _closure(generators)


def asymmetric_directions(name: str, healpix_order: int) -> np.ndarray:
    """HEALPix directions of one asymmetric unit, `(d,)` int64 NEST pixel numbers, ascending; RELION's choice.

    First the pixels whose centre lies in a geometric unit; then, if they are fewer than 4,000, a pixel is
    dropped when a symmetry mate of an earlier kept one is nearer than half the largest pixel radius. Where RELION
    leaves a border to rounding (it loses the one of T, rot = 90°, altogether), its pixels are kept here.

    Raises
    ------
    InputError
        if no pixel of this order has its centre in the unit (I2 and I3 below order 2, I4 at order 0).
    """
    group = canonical(name)
    nside = 2**healpix_order
    pixels = np.arange(12 * nside * nside, dtype=np.int64)
    directions = _directions(nside, pixels)
    normals = _unit_planes(group)
    # borders run through pixel centres: an allowance, so that rounding does not decide
    allowance = np.full(len(normals), -1e-9)
    if group == "O":
        # RELION keeps rot = 135 of the two borders that a quarter turn maps onto each other
        allowance[2] = 1e-9
    inside = (directions @ normals.T >= allowance).all(1)
    pixels, directions = pixels[inside], directions[inside]
    if len(pixels) == 0:
        raise InputError(
            f"healpix_order {healpix_order} is too coarse for symmetry {group}: no direction falls into its "
            "asymmetric unit; use sampling.healpix_order=2 or more"
        )
    if len(pixels) < BORDER_LIMIT:
        keep = _without_mates(directions, operators(group)[1:], normals, 0.5 * _largest_pixel_radius(nside))
        pixels = pixels[keep]
    return pixels


def direction_angles(healpix_order: int, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Euler angles rot in (−180, 180] and tilt in [0, 180] (degrees) of NEST pixels' centres."""
    tilt, rot = healpix.pix2ang(2**healpix_order, pixels, nest=True)
    rot = np.degrees(rot)
    return np.where(rot > 180 + 1e-9, rot - 360, rot), np.degrees(tilt)


def rotation_matrix(rot: Tensor, tilt: Tensor, psi: Tensor) -> Tensor:
    """Matrices A = Z(psi)·Y(tilt)·Z(rot) of passive factors, as RELION's Euler_angles2matrix.

    Row 3 is the viewing direction; image(x) = ∫ V(Aᵀx) dz.

    Parameters
    ----------
    rot, tilt, psi
        `(...)` degrees, broadcast against each other.

    Returns
    -------
    `(..., 3, 3)`.
    """
    angles = torch.deg2rad(torch.stack(torch.broadcast_tensors(rot, tilt, psi)))
    a, b, c = torch.stack((angles.cos(), angles.sin(), torch.ones_like(angles)), -1)
    # every product of a cosine, sine or 1 of each angle, and which of them an entry is the sum of: few operations
    products = (a[..., None] * b[..., None, :]).flatten(-2)[..., None] * c[..., None, :]
    return (products.flatten(-2) @ _euler_terms(angles.dtype, angles.device)).unflatten(-1, (3, 3))


@lru_cache(maxsize=4)
def _euler_terms(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(27, 9)`: how often each product of (cos, sin, 1) of rot, tilt and psi is in each entry of a matrix."""
    cos, sin, one = range(3)
    entries = [
        [(cos, cos, cos, 1), (sin, one, sin, -1)], [(sin, cos, cos, 1), (cos, one, sin, 1)], [(one, sin, cos, -1)],
        [(cos, cos, sin, -1), (sin, one, cos, -1)], [(sin, cos, sin, -1), (cos, one, cos, 1)], [(one, sin, sin, 1)],
        [(cos, sin, one, 1)], [(sin, sin, one, 1)], [(one, cos, one, 1)],
    ]  # fmt: skip
    terms = torch.zeros(3, 3, 3, 9, dtype=dtype)
    for entry, of_entry in enumerate(entries):
        for rot, tilt, psi, sign in of_entry:
            terms[rot, tilt, psi, entry] = sign
    return memory.keep(terms.flatten(0, 2).to(device), "run")


def euler_angles(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Euler angles rot, tilt, psi (degrees) of `(..., 3, 3)` matrices: :func:`rotation_matrix` inverted.

    Tilt is in [0, 180], the others in (−180, 180]; at tilt 0 and 180, where only one angle counts, rot is 0.
    """
    sine = torch.hypot(matrix[..., 2, 0], matrix[..., 2, 1])
    tilt = torch.atan2(sine, matrix[..., 2, 2])
    pole = sine <= POLE
    zero = torch.zeros_like(sine)
    rot = torch.where(pole, zero, torch.atan2(matrix[..., 2, 1], matrix[..., 2, 0]))
    tilt = torch.where(pole, torch.where(matrix[..., 2, 2] > 0, zero, zero + math.pi), tilt)
    return torch.rad2deg(rot), torch.rad2deg(tilt), psi_angle(matrix)


def psi_angle(matrix: Tensor) -> Tensor:
    """The last of :func:`euler_angles` alone, in degrees."""
    pole = torch.hypot(matrix[..., 2, 0], matrix[..., 2, 1]) <= POLE
    # with rot = 0 the second row is (−sin psi · cos tilt, cos psi, …)
    turned = torch.atan2(-matrix[..., 1, 0] * matrix[..., 2, 2].sign(), matrix[..., 1, 1])
    return torch.rad2deg(torch.where(pole, turned, torch.atan2(matrix[..., 1, 2], -matrix[..., 0, 2])))


def axes_distance(a: Tensor, b: Tensor, operators: Tensor) -> Tensor:
    """Mean angle between the three axes of two orientations, smallest over symmetry mates, as RELION's.

    Parameters
    ----------
    a, b
        `(n, 3, 3)` rotation matrices.
    operators
        `(g, 3, 3)` of the group.

    Returns
    -------
    `(n,)` degrees.
    """
    smallest = torch.full(a.shape[:-2], math.inf, dtype=a.dtype, device=a.device)
    for some in operators.to(a).split(max(1, COMPARED // len(a))):
        mates = torch.einsum("nij,gjk->gnik", b, some)
        distances = (a * mates).sum(-1).clamp_(-1, 1).acos_().mean(-1)
        smallest = torch.minimum(smallest, distances.amin(0))
    return torch.rad2deg(smallest)


def _rotation(axis: tuple[float, float, float], order: int, power: int = 1) -> np.ndarray:
    """Rotation about an axis by ``power`` times the order-th part of a turn (Rodrigues)."""
    x, y, z = np.asarray(axis, dtype=np.float64) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = 2 * math.pi * power / order
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)


def _about_y(degrees: float) -> np.ndarray:
    """The passive rotation Y(t) of :func:`rotation_matrix`."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])


def _closure(generators: list[np.ndarray]) -> np.ndarray:
    """All products of the generators, identity first, in order of their length."""
    group = [np.eye(3)]
    for element in group:  # grows while it is walked
        for generator in generators:
            product = element @ generator
            if all(np.abs(product - known).max() > 1e-6 for known in group):
                group.append(product)
    return np.stack(group)


def _unit_planes(group: str) -> np.ndarray:
    """Inward normals `(m, 3)` of RELION's geometric asymmetric unit, of any length."""
    if group in _TURN:
        long, short = _GOLDEN / 2, 1 / (2 * _GOLDEN)
        if group == "I4":
            planes = np.array([[0, 0, -1], [-short, 0.5, long], [-short, -0.5, long]])
        else:
            planes = np.array([[0, 1, 0], [-0.5, -long, short], [0.5, -long, short]])
        return planes @ _about_y(_TURN[group]).T
    if group == "T":
        return np.array([[-1, 0, 0], [math.sqrt(6), math.sqrt(2), 4], [1, math.sqrt(3), 0]])
    if group == "O":
        return np.array([[0, -1, 1], [1, 1, 0], [-1, 1, 0]], dtype=np.float64)
    n = int(group[1:])
    wedge: list[list[float]] = []
    if n > 1:
        # a wedge of ±180/n degrees about x (C) or y (D)
        middle, half = (90.0 if group[0] == "D" else 0.0), 180 / n
        for side in (middle - half + 90, middle + half - 90):
            wedge.append([math.cos(math.radians(side)), math.sin(math.radians(side)), 0])
    if group[0] == "D":
        wedge.append([0, 0, 1])
    return np.array(wedge, dtype=np.float64).reshape(-1, 3)


def _directions(nside: int, pixels: np.ndarray) -> np.ndarray:
    """Unit vectors `(d, 3)` of NEST pixels' centres."""
    return np.stack(healpix.pix2vec(nside, pixels, nest=True), axis=-1)


def _largest_pixel_radius(nside: int) -> float:
    """Largest angle (radians) from a HEALPix pixel's centre to its corner: the one at z = 2/3, polewards."""
    z = 1 - (1 - 1 / nside) ** 2 / 3
    azimuth = math.pi / (4 * nside)
    cosine = math.sqrt(1 - 4 / 9) * math.sqrt(1 - z * z) * math.cos(azimuth) + 2 / 3 * z
    return math.acos(cosine)


def _without_mates(directions: np.ndarray, rotations: np.ndarray, normals: np.ndarray, limit: float) -> np.ndarray:
    """Which directions `(d,)` bool stay when those nearer than ``limit`` to a mate of an earlier one go."""
    keep = np.ones(len(directions), dtype=bool)
    images = np.einsum("gij,dj->gdi", rotations, directions).reshape(-1, 3)
    source = np.tile(np.arange(len(directions)), len(rotations))
    # only images within the limit of the unit can meet a direction in it
    units = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    near = (images @ units.T >= -math.sin(limit) - 1e-9).all(1)
    image, target = np.nonzero(images[near] @ directions.T > math.cos(limit))
    source = source[near][image]
    for direction, mate in sorted(zip(target.tolist(), source.tolist(), strict=True)):
        if mate < direction and keep[mate]:
            keep[direction] = False
    return keep
