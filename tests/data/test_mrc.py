"""MRC maps and stacks: every mode and byte order, broken headers, several stacks."""

import mrcfile
import numpy as np
import pytest

from torchem.data.mrc import ImageStacks, read_header, read_map, write_map, write_stack
from torchem.errors import InputError


@pytest.fixture
def values():
    return np.random.default_rng(1).integers(0, 100, (3, 4, 5))


def raw(path, values, *, order="<", stamp=True, cell=None, mapped=(1, 2, 3), volume=True):
    """An MRC file written by hand, byte by byte."""
    modes = {"i1": 0, "i2": 1, "f4": 2, "u2": 6, "f2": 12}
    header = bytearray(1024)
    nz, ny, nx = values.shape
    mode = modes[values.dtype.str[1:]]
    header[:40] = np.array([nx, ny, nz, mode, 0, 0, 0, nx, ny, nz], f"{order}i4").tobytes()
    header[40:52] = np.array(cell or (2.5 * nx, 2.5 * ny, 2.5 * nz), f"{order}f4").tobytes()
    header[64:76] = np.array(mapped, f"{order}i4").tobytes()
    header[88:92] = np.array(int(volume), f"{order}i4").tobytes()
    header[208:212] = b"MAP "
    if stamp:
        header[212:216] = bytes([0x44, 0x44, 0, 0]) if order == "<" else bytes([0x11, 0x11, 0, 0])
    path.write_bytes(bytes(header) + values.astype(values.dtype.newbyteorder(order)).tobytes())


@pytest.mark.parametrize("dtype", ["i1", "i2", "f4", "u2", "f2"])
@pytest.mark.parametrize(("order", "stamp"), [("<", True), (">", True), (">", False)])
def test_modes_and_byte_orders(tmp_path, values, dtype, order, stamp):
    raw(tmp_path / "a.mrc", values.astype(dtype), order=order, stamp=stamp)
    read, pixel_size = read_map(tmp_path / "a.mrc")
    assert read.dtype == np.float32 and pixel_size == 2.5
    np.testing.assert_array_equal(read, values)


def test_map_written_and_read(tmp_path, values):
    write_map(tmp_path / "a.mrc", values, 1.2345, label="simulated")
    read, pixel_size = read_map(tmp_path / "a.mrc")
    np.testing.assert_array_equal(read, values)
    assert pixel_size == 1.2345
    with mrcfile.open(tmp_path / "a.mrc") as file:
        assert file.is_volume() and mrcfile.validate(tmp_path / "a.mrc")
        assert file.get_labels() == ["simulated"]
    first = (tmp_path / "a.mrc").read_bytes()
    write_map(tmp_path / "a.mrc", values, 1.2345, label="simulated")
    assert (tmp_path / "a.mrc").read_bytes() == first  # no date within


def test_stack_written_and_read(tmp_path, values):
    write_stack(tmp_path / "a.mrcs", values.astype(np.float16), 3.0)
    with mrcfile.open(tmp_path / "a.mrcs") as file:
        assert file.is_image_stack() and file.header.mode == 12
    read, pixel_size = read_map(tmp_path / "a.mrcs")
    np.testing.assert_array_equal(read, values)
    assert pixel_size == 3.0


def test_axes_in_another_order(tmp_path, values):
    # columns run along z, rows along x, sections along y
    raw(tmp_path / "a.mrc", values.astype("f4"), mapped=(3, 1, 2), cell=(4, 3, 5))
    with pytest.raises(InputError, match="not cubes"):
        read_map(tmp_path / "a.mrc")
    raw(tmp_path / "a.mrc", values.astype("f4"), mapped=(3, 1, 2))
    read, _ = read_map(tmp_path / "a.mrc")
    np.testing.assert_array_equal(read, values.transpose(2, 0, 1))  # (y, x, z) -> (z, y, x)


def test_header_without_a_pixel_size(tmp_path, values):
    raw(tmp_path / "a.mrc", values.astype("f4"), cell=(0, 0, 0))
    assert read_map(tmp_path / "a.mrc")[1] is None


def test_broken_maps_are_named(tmp_path, values):
    path = tmp_path / "broken.mrc"
    with pytest.raises(InputError, match="not found"):
        read_map(path)
    path.write_bytes(b"short")
    with pytest.raises(InputError, match=r"broken\.mrc cannot be read as an MRC file"):
        read_map(path)
    path.write_text("data_particles\n" * 200)
    with pytest.raises(InputError, match="no MRC file"):
        read_map(path)
    write_map(path, values, 1.0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"truncated.*3 sections of 5 x 4.*\(1 whole"):
        read_header(path)
    raw(path, np.where(values == values.max(), np.nan, values).astype("f4"))
    with pytest.raises(InputError, match="not finite"):
        read_map(path)


@pytest.fixture
def stacks(tmp_path):
    rng = np.random.default_rng(2)
    images = {name: rng.normal(size=(n, 6, 6)).astype(np.float32) for name, n in (("a.mrcs", 3), ("b.mrc", 4))}
    for name, stack in images.items():
        write_stack(tmp_path / name, stack, 1.0)
    names = ["000003@a.mrcs", "1@b.mrc", "2@a.mrcs", "4@b.mrc", "2@a.mrcs"]
    expected = np.stack([images[n.split("@")[1]][int(n.split("@")[0]) - 1] for n in names])
    return ImageStacks(names, lambda name: tmp_path / name, where="p.star"), expected


def test_images_of_several_stacks_in_any_order(stacks):
    images, expected = stacks
    images.check()
    assert len(images) == 5 and images.files == ["a.mrcs", "b.mrc"]
    np.testing.assert_array_equal(images.read(range(5)), expected)
    np.testing.assert_array_equal(images.read([3, 0, 3]), expected[[3, 0, 3]])
    given = np.empty((2, *expected.shape[1:]), np.float32)
    assert images.read([1, 2], given) is given
    np.testing.assert_array_equal(given, expected[[1, 2]])


def test_a_name_without_at_is_one_image(tmp_path):
    write_stack(tmp_path / "one.mrc", np.ones((1, 4, 4)), 1.0)
    assert ImageStacks(["one.mrc"], lambda name: tmp_path / name).read([0]).shape == (1, 4, 4)


@pytest.mark.parametrize("name", ["0@a.mrcs", "x@a.mrcs", "-1@a.mrcs", "1@", "@a.mrcs"])
def test_image_names_that_are_none(tmp_path, name):
    with pytest.raises(InputError, match=r"p\.star, row 2: .*rlnImageName"):
        ImageStacks(["1@a.mrcs", name], lambda name: tmp_path / name, where="p.star")


def test_index_past_the_end_and_mixed_sizes(tmp_path):
    write_stack(tmp_path / "a.mrcs", np.zeros((2, 4, 4)), 1.0)
    write_stack(tmp_path / "b.mrcs", np.zeros((2, 6, 6)), 1.0)
    write_stack(tmp_path / "c.mrcs", np.zeros((2, 6, 4)), 1.0)
    images = ImageStacks(["1@a.mrcs", "3@a.mrcs", "1@b.mrcs"], lambda name: tmp_path / name)
    for act in (images.check, lambda: images.read([1])):
        with pytest.raises(InputError, match=r"row 2: image 3@a\.mrcs is past the end .* has 2 images"):
            act()
    with pytest.raises(InputError, match="different sizes"):
        images.read([0, 2])
    with pytest.raises(InputError, match="not square"):
        ImageStacks(["1@c.mrcs"], lambda name: tmp_path / name).check()
