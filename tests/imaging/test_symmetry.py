"""Point groups as facts: order, closure, axes, asymmetric units; Euler angles and distances."""

import math
import re

import healpix
import numpy as np
import pytest
import torch

from torchem.errors import InputError
from torchem.imaging.symmetry import (
    asymmetric_directions,
    axes_distance,
    canonical,
    direction_angles,
    euler_angles,
    operators,
    rotation_matrix,
)

ORDERS = {
    "C1": 1,
    "C4": 4,
    "D1": 2,
    "D2": 4,
    "D7": 14,
    "T": 12,
    "O": 24,
    "I1": 60,
    "I2": 60,
    "I3": 60,
    "I4": 60,
}
PHI = (1 + math.sqrt(5)) / 2

# fold, axis: RELION's settings
AXES = {
    "C4": [(4, (0, 0, 1))],
    "D1": [(2, (1, 0, 0))],
    "D2": [(2, (0, 0, 1)), (2, (1, 0, 0)), (2, (0, 1, 0))],
    "D7": [(7, (0, 0, 1)), (2, (1, 0, 0))],
    "T": [(3, (0, 0, 1)), (2, (0, 0.816496, 0.577350))],
    "O": [(4, (0, 0, 1)), (4, (1, 0, 0)), (3, (1, 1, 1)), (2, (1, 1, 0))],
    "I1": [(2, (1, 0, 0)), (5, (0.85065081, 0, -0.52573111))],
    "I2": [(2, (0, 0, 1)), (5, (0.52573111, 0, 0.85065081)), (3, (0, 0.35682209, 0.93417236))],
    "I3": [(5, (0, 0, 1)), (2, (-0.52573111, 0, 0.85065081))],
    "I4": [(2, (0.52573111, 0, 0.85065081)), (5, (0.89442719, 0, 0.44721360))],
}


def turn(axis, degrees: float) -> np.ndarray:
    """Rotation from the definition: the axis stays, the plane across it turns."""
    w = np.array(axis, dtype=float) / np.linalg.norm(axis)
    u = np.linalg.svd(w[None])[2][1]
    v = np.cross(w, u)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    frame = np.stack([u, v, w], 1)
    return frame @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ frame.T


def belongs(matrix: np.ndarray, group: np.ndarray) -> bool:
    return bool((np.abs(group - matrix).max((1, 2)) < 1e-5).any())


@pytest.mark.parametrize("name, order", ORDERS.items())
def test_group_of_rotations(name, order):
    group = operators(name)
    assert group.shape == (order, 3, 3) and group.dtype == np.float64
    np.testing.assert_array_equal(group[0], np.eye(3))
    np.testing.assert_allclose(group @ group.transpose(0, 2, 1), np.broadcast_to(np.eye(3), group.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(group), 1, atol=1e-12)
    products = (group[:, None] @ group[None]).reshape(-1, 9)
    difference = np.abs(products[:, None] - group.reshape(1, -1, 9)).max(-1)
    # closed, and no element twice: every product is near exactly one
    assert ((difference < 1e-9).sum(1) == 1).all()


@pytest.mark.parametrize("name", AXES)
def test_axes_are_relions(name):
    for fold, axis in AXES[name]:
        assert belongs(turn(axis, 360 / fold), operators(name)), (fold, axis)


def test_high_orders_need_no_search():
    assert operators("D99").shape == (198, 3, 3)


@pytest.mark.parametrize(
    "name, wanted",
    [("c1", "C1"), (" d2 ", "D2"), ("I", "I2"), ("i3", "I3"), ("o", "O"), ("T", "T"), ("C12", "C12")],
)
def test_names(name, wanted):
    assert canonical(name) == wanted


@pytest.mark.parametrize("name", ["Cs", "Ci", "S4", "C2v", "C3h", "D2v", "D2h", "Th", "Td", "Oh", "Ih", "I1h", "I5H"])
def test_mirror_groups_are_refused_with_the_reason(name):
    with pytest.raises(InputError, match="mirror"):
        canonical(name)


@pytest.mark.parametrize("name", ["", "C0", "C", "D", "X2", "C100", "I6", "I5", "C-2", "2"])
def test_unknown_groups_are_refused_with_the_choice(name):
    with pytest.raises(InputError, match="I1, I2, I3"):
        canonical(name)


@pytest.mark.parametrize(
    "name, order, count", [("D2", 2, 48), ("D2", 3, 192), ("O", 2, 7), ("C1", 2, 192), ("I1", 2, 3)]
)
def test_known_numbers_of_directions(name, order, count):
    pixels = asymmetric_directions(name, order)
    assert pixels.dtype == np.int64 and len(pixels) == count
    assert (np.diff(pixels) > 0).all()


@pytest.mark.parametrize("name", ORDERS)
def test_asymmetric_unit_covers_the_sphere_once(name):
    order, nside = 4, 16
    group = operators(name)
    pixels = asymmetric_directions(name, order)
    everything = np.stack(healpix.pix2vec(nside, np.arange(12 * nside**2), nest=True), -1)
    kept = everything[pixels]
    assert len(pixels) * len(group) == pytest.approx(12 * nside**2, rel=0.07)
    mates = np.einsum("gij,dj->gdi", group, kept).reshape(-1, 3)
    nearest = np.concatenate([(part @ mates.T).max(1) for part in np.array_split(everything, 8)])
    # the root of a pixel's area: its sharpest corner is as far from its centre
    radius = math.degrees(math.sqrt(4 * math.pi / len(everything)))
    distance = np.degrees(np.arccos(np.clip(nearest, -1, 1)))
    # RELION's unit leaves small gaps at corners of I2 and I4, where three borders meet
    assert distance.max() < radius * {"I2": 1.4, "I4": 1.75}.get(name, 1.0)
    assert np.mean(distance < radius) > 0.98
    # no two kept directions are nearly mates
    others = np.einsum("gij,dj->gdi", group[1:], kept)
    for i, direction in enumerate(kept):
        near = np.degrees(np.arccos(np.clip(others @ direction, -1, 1)))
        near[:, i] = 180
        assert near.size == 0 or near.min() > 0.45 * radius


@pytest.mark.parametrize("name", ["D2", "C4", "O"])
def test_grid_that_shares_the_symmetry_is_divided_exactly(name):
    """HEALPix itself has D4 symmetry about z: for its subgroups each pixel has one mate in the unit."""
    if name == "O":
        name = "C2"
    nside = 8
    pixels = asymmetric_directions(name, 3)
    group = operators(name)
    assert len(pixels) * len(group) == 12 * nside**2
    kept = np.stack(healpix.pix2vec(nside, pixels, nest=True), -1)
    mates = np.einsum("gij,dj->gdi", group, kept).reshape(-1, 3)
    found = healpix.vec2pix(nside, *mates.T, nest=True)
    assert len(np.unique(found)) == 12 * nside**2


def test_too_coarse_a_grid_for_icosahedra_is_an_error():
    with pytest.raises(InputError, match="healpix_order"):
        asymmetric_directions("I2", 1)


def test_directions_of_relions_sampling_files(shared):
    files = sorted(shared.glob("data/relion_parity/*/run_it00[14]_sampling.star"))
    files += sorted(shared.glob("data/metadata/*/*_sampling.star"))
    seen = set()
    for path in files:
        general, _, table = path.read_text().partition("data_sampling_directions")
        if "_rlnHealpixOrder " not in general:
            continue  # 2D
        symmetry = re.search(r"_rlnSymmetryGroup\s+(\S+)", general)[1]
        rows = [line.split() for line in table.splitlines() if re.match(r"\s*-?\d", line)]
        order = int(re.search(r"_rlnHealpixOrder\s+(\d+)", general)[1])
        angles = np.stack(direction_angles(order, asymmetric_directions(symmetry, order)), -1)
        np.testing.assert_allclose(angles, np.array(rows, dtype=float), atol=1e-6)
        seen.add((symmetry, order))
    assert {("D2", 2), ("C1", 1), ("D2", 7)} <= seen


def test_euler_matrix_has_the_view_direction_in_its_last_row():
    rot, tilt, psi = (torch.tensor([a], dtype=torch.float64) for a in (30.0, 60.0, 20.0))
    matrix = rotation_matrix(rot, tilt, psi)[0]
    want = [math.sin(math.radians(60)) * c for c in (math.cos(math.radians(30)), math.sin(math.radians(30)))]
    torch.testing.assert_close(matrix[2], torch.tensor([*want, 0.5], dtype=torch.float64))

    def about_z(degrees):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]], dtype=torch.float64)

    c, s = 0.5, math.sin(math.radians(60))
    about_y = torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]], dtype=torch.float64)
    torch.testing.assert_close(matrix, about_z(20) @ about_y @ about_z(30))


def test_euler_angles_come_back():
    generator = torch.Generator().manual_seed(2)
    rot, psi = (torch.rand(500, generator=generator, dtype=torch.float64) * 358 - 179 for _ in range(2))
    tilt = torch.rand(500, generator=generator, dtype=torch.float64) * 178 + 1
    for got, want in zip(euler_angles(rotation_matrix(rot, tilt, psi)), (rot, tilt, psi), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("tilt", [0.0, 180.0, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_poles_only_one_angle_counts(tilt, dtype):
    rot, psi = torch.tensor([25.0, -100.0, 0.0], dtype=dtype), torch.tensor([40.0, 170.0, -60.0], dtype=dtype)
    matrix = rotation_matrix(rot, torch.full((3,), tilt, dtype=dtype), psi)
    angles = euler_angles(matrix)
    assert (angles[0] == 0).all()
    torch.testing.assert_close(rotation_matrix(*angles), matrix, atol=1e-5 if dtype == torch.float32 else 1e-9, rtol=0)


def test_negative_tilt_is_the_same_orientation():
    angles = euler_angles(rotation_matrix(*(torch.tensor([a], dtype=torch.float64) for a in (10.0, -30.0, 50.0))))
    for got, want in zip(angles, (-170.0, 30.0, -130.0), strict=True):
        assert got.item() == pytest.approx(want)


def test_distance_of_orientations():
    zero = torch.zeros(4, dtype=torch.float64)
    a = rotation_matrix(zero, zero, zero)
    b = rotation_matrix(zero, zero, torch.tensor([0.0, 3.0, 90.0, 180.0], dtype=torch.float64))
    one = torch.from_numpy(operators("C1"))
    # a turn by t about z moves two axes by t and leaves the third
    torch.testing.assert_close(axes_distance(a, b, one), torch.tensor([0, 2, 60, 120.0], dtype=torch.float64))
    four = torch.from_numpy(operators("C4"))
    torch.testing.assert_close(
        axes_distance(a, b, four), torch.tensor([0, 2, 0, 0.0], dtype=torch.float64), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["C4", "D7", "T", "O", "I1"])
def test_distance_does_not_see_symmetry(name):
    generator = torch.Generator().manual_seed(3)
    angles = torch.rand(3, 20, generator=generator, dtype=torch.float64) * 180
    group = torch.from_numpy(operators(name))
    a = rotation_matrix(*angles)
    b = rotation_matrix(angles[0] + 5, angles[1], angles[2])
    plain = axes_distance(a, b, group)
    for operator in group[:: max(1, len(group) // 5)]:
        torch.testing.assert_close(axes_distance(a @ operator, b, group), plain, atol=1e-6, rtol=0)
        torch.testing.assert_close(axes_distance(a, b @ operator, group), plain, atol=1e-6, rtol=0)
