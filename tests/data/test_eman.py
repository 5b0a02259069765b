"""EMAN2's HDF5 stacks: a file made by HDF5's own library, copied true to the byte; lazy reading; broken files."""

import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5a, h5d, h5s

from torchem.data.eman import EmanStack, write_eman
from torchem.errors import InputError

MADE_BY_C = Path(__file__).parent / "eman2" / "stack.hdf"


def contents(path):
    """Every group, attribute and data set of a file: type, space and bytes."""
    found = {}

    def visit(name, item):
        for number in range(h5a.get_num_attrs(item.id)):
            attribute = h5a.open(item.id, index=number)
            kind, space = attribute.get_type(), attribute.get_space()
            raw = np.empty(attribute.get_storage_size(), np.uint8)
            attribute.read(raw.view(attribute.dtype).reshape(attribute.shape), mtype=kind)
            found[name, attribute.name] = (
                kind.encode(), space.get_simple_extent_type(), space.shape, raw.tobytes(),
            )  # fmt: skip
        if isinstance(item, h5py.Dataset):
            kind = item.id.get_type()
            pixels = np.empty(item.shape, item.dtype)
            h5d.open(item.file.id, name.encode()).read(h5s.ALL, h5s.ALL, pixels, mtype=kind)
            found[name] = kind.encode(), item.shape, pixels.tobytes()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def test_copied_true_to_the_byte(tmp_path):
    stack = EmanStack(MADE_BY_C)
    write_eman(tmp_path / "copy.hdf", map(stack.stored, range(3)), map(stack.header, range(3)))
    copy, original = contents(tmp_path / "copy.hdf"), contents(MADE_BY_C)
    assert len(original) > 50 and copy.keys() == original.keys()
    for name in original:
        assert copy[name] == original[name], name
    # the same again in another second: the time is not in the file
    first = (tmp_path / "copy.hdf").read_bytes()
    time.sleep(1.1)
    write_eman(tmp_path / "copy.hdf", map(stack.stored, range(3)), map(stack.header, range(3)))
    assert (tmp_path / "copy.hdf").read_bytes() == first


def test_values_and_their_types():
    stack = EmanStack(MADE_BY_C)
    stack.check()
    header = stack.header(1)
    assert len(stack) == 3 and stack.shape == (4, 5) and stack.pixel_size == 1.77
    expected = {"ave_n": 4, "bad": False, "is_good": True, "class_ptcl_src": "bdb:particles#all", "dose": 29.3}
    expected |= {"flags": 4000000000, "nx": 5, "ny": 4, "nz": 1, "apix_x": np.float32(1.77)}
    for name, value in expected.items():
        assert header[name] == value, name
    assert stack.header(0)["class_ptcl_src"] == ""
    assert [type(header[name]) for name in ("ave_n", "bad", "dose", "flags", "apix_x")] == [
        int, bool, float, np.uint32, np.float32,
    ]  # fmt: skip
    assert header["members"].dtype == np.int32 and header["members"].tolist() == [0, 3, 5, 8, 13, 70000]
    np.testing.assert_array_equal(header["frc"], np.float32([1, 0.9, 0.25, -0.1]))
    np.testing.assert_array_equal(
        header["xform.align2d"], np.float32([[-0.8, -0.6, 0, -1.25], [-0.6, 0.8, 0, 2.5], [0, 0, 1, 0]])
    )
    pixels = np.arange(20, dtype=np.float32).reshape(4, 5)
    # any order, one twice; the third was stored in 8 bits from -2 to 3
    read = stack.read([2, 0, 2, 1])
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read[1], pixels / np.float32(7) - 1)
    np.testing.assert_array_equal(read[3], (pixels + 100) / np.float32(7) - 1)
    np.testing.assert_allclose(read[0], 13 * pixels / 255 * 5 - 2, atol=1e-6)
    np.testing.assert_array_equal(read[0], read[2])
    # written as floats, nothing shall be scaled once more
    assert stack.stored(2).dtype == np.uint8


def test_few_bits_become_floats_for_good(tmp_path):
    stack = EmanStack(MADE_BY_C)
    write_eman(tmp_path / "a.hdf", stack.read([2]), [stack.header(2)])
    copy = EmanStack(tmp_path / "a.hdf")
    np.testing.assert_array_equal(copy.read([0]), stack.read([2]))
    assert not [name for name in copy.header(0) if name.startswith("stored_")]


def test_averages_with_many_members(tmp_path):
    members = np.arange(40_000)  # more than 64 kB
    images = np.random.default_rng(1).standard_normal((2, 6, 6))
    headers = [{"members": members, "ave_n": 40_000}, {"members": [7], "ave_n": 1, "half": np.arange(0)}]
    write_eman(tmp_path / "a.hdf", images, headers, pixel_size=1.2)
    stack = EmanStack(tmp_path / "a.hdf")
    np.testing.assert_array_equal(stack.read([0, 1]), images.astype(np.float32))
    np.testing.assert_array_equal(stack.header(0)["members"], members)
    assert stack.header(1)["members"] == 7 and stack.header(1)["half"].size == 0
    assert stack.pixel_size == 1.2 and stack.header(1)["apix_z"] == np.float32(1.2)


def test_volumes(tmp_path):
    volumes = np.random.default_rng(1).standard_normal((2, 3, 4, 5)).astype(np.float32)
    write_eman(tmp_path / "a.hdf", volumes)
    stack = EmanStack(tmp_path / "a.hdf")
    assert stack.shape == (3, 4, 5) and stack.pixel_size is None
    assert [stack.header(0)[name] for name in ("nx", "ny", "nz")] == [5, 4, 3]
    np.testing.assert_array_equal(stack.read([1, 0]), volumes[::-1])


def test_one_section_is_an_image(tmp_path):
    with h5py.File(tmp_path / "a.hdf", "w") as file:  # as some writers do; without imageid_max besides
        file["MDF/images/0/image"] = np.arange(6.0, dtype=np.float64).reshape(1, 2, 3)
    stack = EmanStack(tmp_path / "a.hdf")
    assert stack.shape == (2, 3) and len(stack) == 1
    np.testing.assert_array_equal(stack.read([0])[0], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("value", [2**31, 1j, np.zeros((2, 2)), None, [2**40, 0]])
def test_headers_that_eman2_cannot_hold(tmp_path, value):
    with pytest.raises(ValueError, match=r"header EMAN\.odd"):
        write_eman(tmp_path / "a.hdf", np.zeros((1, 4, 4)), [{"odd": value}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("headers", [1, 3])
def test_a_header_for_every_image(tmp_path, headers):
    with pytest.raises(ValueError, match="headers"):
        write_eman(tmp_path / "a.hdf", np.zeros((2, 4, 4)), [{}] * headers)


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "a.hdf"
    with pytest.raises(InputError, match=r"a\.hdf not found"):
        EmanStack(path)
    path.write_bytes(b"no HDF5 at all")
    with pytest.raises(InputError, match=r"a\.hdf cannot be read as HDF5"):
        EmanStack(path)
    path.write_bytes(MADE_BY_C.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"a\.hdf cannot be read as HDF5 .*truncated"):
        EmanStack(path)
    with h5py.File(path, "w") as file:
        file.create_dataset("MDF/images/0/image", data=np.ones((64, 64), np.float32), compression="gzip")
        place, length = file["MDF/images/0/image"].id.get_chunk_info(0)[2:]
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes(length) + whole[place + length :])
    with pytest.raises(InputError, match=r"a\.hdf: image 0 cannot be read"):
        EmanStack(path).read([0])
    with h5py.File(path, "w") as file:
        file["images"] = [1]
    with pytest.raises(InputError, match="no EMAN2 stack"):
        EmanStack(path)
    write_eman(path, np.zeros((0, 4, 4)))
    with pytest.raises(InputError, match="holds no images"):
        EmanStack(path)
    write_eman(path, [np.zeros((4, 4)), np.zeros((4, 6))])
    stack = EmanStack(path)
    for act in (stack.check, lambda: stack.read([0, 1])):
        with pytest.raises(InputError, match=r"image 1 is of 6 x 4 px, image 0 of 4 x 4; .*--clip"):
            act()
    stack.close()
    with h5py.File(path, "a") as file:
        del file["MDF/images/1"]
    stack = EmanStack(path)
    for act in (stack.check, lambda: stack.read([1]), lambda: stack.header(1)):
        with pytest.raises(InputError, match=r"image 1 is not there, of 2"):
            act()
