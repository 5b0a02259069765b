"""Parameters of 2D alignment: EMAN2's and RELION's transform, applied to images step by step, do the same."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchem.data.alignment import from_matrix, from_relion, read_parameters, to_matrix, to_relion, write_parameters
from torchem.data.mrc import ImageStacks, read_map
from torchem.data.star import read_star
from torchem.errors import InputError

BLOBS = np.array([[3.0, 1.0, 1.5, 1.0], [-4.0, 2.5, 2.0, 0.7], [0.5, -5.0, 1.2, 1.3], [5.5, -2.0, 1.8, -0.4]])


def draw(points):
    """The object at points (x, y) from the centre: no symmetry, no mirror."""
    x, y, width, height = (BLOBS.T[i][:, None, None] for i in range(4))
    square = (points[..., 0] - x) ** 2 + (points[..., 1] - y) ** 2
    return (height * np.exp(-square / (2 * width**2))).sum(0)


def grid(box):
    """`(L, L, 2)` x, y of every pixel from the centre L // 2."""
    axis = np.arange(box) - box // 2
    return np.stack(np.meshgrid(axis, axis), axis=-1).astype(float)


def interpolate(image, points):
    """Trigonometric interpolation at points from the centre: exact for what the box resolves."""
    box = len(image)
    frequency = np.fft.fftfreq(box)
    transform = np.fft.fft2(np.fft.ifftshift(image)) / box**2
    along_x = np.exp(2j * np.pi * points[..., :1] * frequency)  # (..., kx)
    along_y = np.exp(2j * np.pi * points[..., 1:] * frequency)
    return np.einsum("...y,yx,...x->...", along_y, transform, along_x).real


def rotate(image, degrees):
    """What lies at p goes to R p, R = [[cos, sin], [-sin, cos]]: EMAN2's rotation."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return interpolate(image, grid(len(image)) @ np.array([[c, s], [-s, c]]))  # rows: (R⁻¹ y)ᵀ = yᵀ R


def shift(image, x, y):
    return interpolate(image, grid(len(image)) - [x, y])


def mirror(image):
    return interpolate(image, grid(len(image)) * [-1, 1])


def assert_like(aligned, expected):
    """The same within the box's circle; what was turned into the corners came from beyond the border."""
    inside = np.hypot(*grid(len(aligned)).transpose(2, 0, 1)) < len(aligned) // 2 - 2
    np.testing.assert_allclose(aligned[inside], expected[inside], atol=1e-3)


def parameters_of(**columns):
    return pd.DataFrame({name: np.atleast_1d(value) for name, value in columns.items()})


CASES = [(0, 0.0, 0.0, 0.0), (0, 33.0, 0.0, 0.0), (0, 0.0, 1.5, -0.75), (1, 0.0, 0.6, 0.0), (1, 217.0, -1.3, 2.4)]


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize(("flip", "alpha", "sx", "sy"), CASES)
def test_both_conventions_on_an_image(box, flip, alpha, sx, sy):
    row = parameters_of(class_id=0, mirror=flip, alpha=alpha, sx=sx, sy=sy)
    # an image that is the object once aligned: image(p) = object(T p)
    matrix = to_matrix(row)[0]
    image = draw(grid(box) @ matrix[:2, :2].T + matrix[:2, 3])
    expected = draw(grid(box))

    # EMAN2: rotate, shift, mirror
    aligned = shift(rotate(image, alpha), sx, sy)
    assert_like(mirror(aligned) if flip else aligned, expected)

    # RELION: shift by the origin, turn so that the image by psi of the reference comes back; mirror
    relion = to_relion(row, pixel_size=1.7).iloc[0]
    aligned = shift(image, relion["rlnOriginXAngst"] / 1.7, relion["rlnOriginYAngst"] / 1.7)
    aligned = rotate(aligned, -relion["rlnAnglePsi"])
    assert relion["rlnIsFlip"] == flip
    assert_like(mirror(aligned) if flip else aligned, expected)


def test_each_part_matters():
    # the tolerance tells right from wrong
    image, box = draw(grid(32)), 32
    for other in (rotate(image, 0.5), shift(image, 0.05, 0), mirror(image)):
        with pytest.raises(AssertionError):
            assert_like(other, draw(grid(box)))


def test_relion_averaged_its_own_particles_so(shared):
    """RELION's angles and origins bring its particles onto its class averages; with another sign they do not."""
    folder = shared / "data" / "relion_parity"
    table = read_star(folder / "class2d" / "run_it004_data.star")["particles"]
    classes, pixel_size = read_map(folder / "class2d" / "run_it004_classes.mrcs")
    stack = ImageStacks(table["rlnImageName"].tolist(), lambda name: folder / name.split("/")[-1])
    images = stack.read(range(len(table))).astype(float)
    rows = from_relion(table, pixel_size)
    rows["class_id"] = table["rlnClassNumber"].to_numpy() - 1

    def agreement(rows):
        inside = np.hypot(*grid(32).transpose(2, 0, 1)) < 12
        scores = []
        for image, row in zip(images, rows.itertuples(), strict=True):
            aligned = shift(rotate(image, row.alpha), row.sx, row.sy)
            scores.append(np.corrcoef(aligned[inside], classes[row.class_id][inside])[0, 1])
        return np.mean(scores)

    right = agreement(rows)
    assert right > 0.35
    assert agreement(rows.assign(alpha=-rows["alpha"])) < right - 0.15
    assert agreement(rows.assign(sx=-rows["sx"], sy=-rows["sy"])) < right - 0.05


angles = st.floats(-720, 720, allow_nan=False)
shifts = st.floats(-50, 50, allow_nan=False)


@given(st.integers(0, 1), angles, shifts, shifts)
def test_round_trips(flip, alpha, sx, sy):
    row = parameters_of(class_id=4, mirror=flip, alpha=alpha, sx=sx, sy=sy)
    relion = to_relion(row, 2.5)
    assert -180 < relion["rlnAnglePsi"][0] <= 180 and relion["rlnClassNumber"][0] == 5
    for other in (from_relion(relion, 2.5), from_matrix(to_matrix(row))):
        assert 0 <= other["alpha"][0] < 360 and other["mirror"][0] == flip
        np.testing.assert_allclose(to_matrix(other), to_matrix(row), atol=1e-9)


def test_matrix_is_what_eman2_writes():
    # EMAN2's own for alpha 30, tx 2, ty -3, mirror 1 in single precision
    matrix = to_matrix(parameters_of(mirror=1, alpha=30.0, sx=2.0, sy=-3.0))
    expected = [[-0.8660254, -0.5, 0, -2], [-0.5, 0.8660254, 0, -3], [0, 0, 1, 0]]
    np.testing.assert_allclose(matrix[0], expected, atol=1e-7)
    with pytest.raises(ValueError, match="scales"):
        from_matrix(1.1 * matrix)
    with pytest.raises(ValueError, match="plane"):
        from_matrix(matrix[:, [0, 2, 1]])


@pytest.fixture
def table():
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "image": [f"{i + 1:06d}@a b.mrcs" for i in range(20)],
            "class_id": rng.integers(0, 5, 20),
            "mirror": rng.integers(0, 2, 20),
            "alpha": rng.uniform(0, 360, 20),
            "sx": rng.normal(0, 2, 20),
            "sy": rng.normal(0, 2, 20),
            "peak": rng.normal(0, 1, 20),
            "pixel_error": rng.normal(0, 1, 20),
        }
    )


def test_csv(tmp_path, table):
    write_parameters(tmp_path / "a.csv", table)
    pd.testing.assert_frame_equal(read_parameters(tmp_path / "a.csv"), table, check_dtype=False, check_exact=True)
    assert (tmp_path / "a.csv").read_text().startswith("image,class_id,mirror,alpha,sx,sy,peak,pixel_error\n000001@a")
    few = table[["sx", "sy", "alpha", "mirror", "class_id"]]
    write_parameters(tmp_path / "a.csv", few)
    assert read_parameters(tmp_path / "a.csv").columns.tolist() == ["class_id", "mirror", "alpha", "sx", "sy"]


def test_star(tmp_path, table):
    write_parameters(tmp_path / "a.star", table, pixel_size=1.77)
    block = read_star(tmp_path / "a.star")["particles"]
    assert {"rlnImageName", "rlnClassNumber", "rlnAnglePsi", "rlnOriginXAngst", "rlnIsFlip"} <= set(block)
    assert block["rlnClassNumber"].min() == table["class_id"].min() + 1
    read = read_parameters(tmp_path / "a.star", pixel_size=1.77)
    pd.testing.assert_frame_equal(read, table, check_dtype=False, rtol=1e-11)


def test_broken_tables_are_named(tmp_path, table):
    path = tmp_path / "a.csv"
    with pytest.raises(InputError, match=r"a\.csv"):
        read_parameters(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read as a table"):
        read_parameters(path)
    write_parameters(path, table.drop(columns="sx"))
    with pytest.raises(InputError, match="no column sx"):
        read_parameters(path)
    for column, value in (("alpha", "x"), ("mirror", 0.5), ("sy", np.nan)):
        write_parameters(path, table.astype({column: object}).assign(**{column: [value] + [1] * 19}))
        with pytest.raises(InputError, match=rf"row 1: {column} is .*correct it"):
            read_parameters(path)
    (tmp_path / "a.star").write_text("data_particles\n\nloop_\n_rlnImageName #1\n1@a.mrcs\n")
    with pytest.raises(InputError, match="rlnAnglePsi"):
        read_parameters(tmp_path / "a.star", 1.0)
    for act in (lambda: read_parameters(tmp_path / "a.star"), lambda: write_parameters(tmp_path / "b.star", table)):
        with pytest.raises(ValueError, match="pixel size"):
            act()
