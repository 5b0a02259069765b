"""EMAN2's BDB stacks: files made by Berkeley DB's own db_load (eman2/make_bdb.py), virtual ones, and hostile ones."""

import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from torchem.data import bdb
from torchem.data.bdb import BdbStack
from torchem.errors import InputError

pytest.importorskip("dissect.database", reason='the extra "bdb" is not installed')
HERE = Path(__file__).parent / "eman2"


def image(key):
    return (np.arange(20).reshape(4, 5) / 7 + 100 * key).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(HERE / "EMAN2DB", tmp_path / "EMAN2DB")
    return tmp_path


@pytest.mark.parametrize("name", ["bdb:{}#particles", "BDB:{}/particles", "{}/EMAN2DB/particles.bdb"])
def test_a_stack_of_db_load(name):
    stack = BdbStack(name.format(HERE))
    stack.check()
    assert len(stack) == 12 and stack.shape == (4, 5) and stack.pixel_size == 1.77
    order = [11, 0, 3, 3]
    np.testing.assert_array_equal(stack.read(order), [image(key) for key in order])
    header = stack.header(7)
    assert header["ptcl_source_image"] == "mic007.hdf" and header["members"] == list(range(700))
    assert header["is_complex_x"] is False and header["apix_x"] == float(np.float32(1.77))
    assert header["ctf"] == [2.0, 0.1, 45.0]
    matrix = header["xform.align2d"]
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, np.float32([[0.6, 0.8, 0, 10.5], [-0.8, 0.6, 0, -0.25], [0, 0, 1, 0]]))


def test_in_the_current_folder(monkeypatch):
    monkeypatch.chdir(HERE)
    assert len(BdbStack("bdb:particles")) == 12


def test_chosen_images():
    stack = BdbStack(f"bdb:{HERE}#particles?7,2")
    assert stack.keys.tolist() == [7, 2]
    np.testing.assert_array_equal(stack.read([1, 0]), [image(2), image(7)])
    with pytest.raises(InputError, match="image 12 is not in"):
        BdbStack(f"bdb:{HERE}#particles?1,12")
    with pytest.raises(InputError, match="keys after"):
        BdbStack(f"bdb:{HERE}#particles?select.good")


def test_a_virtual_stack(folder):
    stack = BdbStack(f"bdb:{folder}#chosen")
    stack.check()
    np.testing.assert_array_equal(stack.read([0, 1, 2]), [image(7), image(0), image(11)])
    (folder / "EMAN2DB" / "particles_5x4x1").unlink()
    for act in (BdbStack(f"bdb:{folder}#chosen").check, lambda: BdbStack(f"bdb:{folder}#chosen").read([0])):
        with pytest.raises(InputError, match=r"chosen\.bdb: its images lie in .*particles_5x4x1"):
            act()


def test_python_3_and_a_database_without_a_name(folder, monkeypatch):
    # later pickles, and records as they come out of a file without a name
    records = [(pickle.dumps(3, 4), pickle.dumps({"nx": 5, "ny": 4, "nz": 1, "text": "Å"}, 4))]
    records += [(b"5x4x1" + pickle.dumps(3, 4), pickle.dumps(2, 4)), (pickle.dumps("maxrec", 4), pickle.dumps(3, 4))]
    monkeypatch.setattr(bdb, "_records", lambda path: records)
    stack = BdbStack(f"bdb:{folder}#particles")
    assert stack.keys.tolist() == [3] and stack.header(0)["text"] == "Å" and stack.pixel_size is None
    np.testing.assert_array_equal(stack.read([0])[0], image(0))  # what lies at place 2


class Hostile:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_is_run(folder, monkeypatch, capsys, protocol):
    header = {"nx": 5, "ny": 4, "nz": 1, "xform.align2d": Hostile()}
    records = [(pickle.dumps(0, 2), pickle.dumps(header, protocol))]
    monkeypatch.setattr(bdb, "_records", lambda path: records)
    with pytest.raises(InputError, match=r"particles\.bdb: the record .* cannot be read .*builtin.*\.print"):
        BdbStack(f"bdb:{folder}#particles")
    assert capsys.readouterr().out == ""


def test_mixed_sizes(folder, monkeypatch):
    sizes = [(5, 4), (6, 4)]
    records = [
        (pickle.dumps(i, 2), pickle.dumps({"nx": x, "ny": y, "nz": 1, "data_path": "particles_5x4x1*0"}, 2))
        for i, (x, y) in enumerate(sizes)
    ]
    monkeypatch.setattr(bdb, "_records", lambda path: records)
    stack = BdbStack(f"bdb:{folder}#particles")
    for act in (stack.check, lambda: stack.read([0, 1])):
        with pytest.raises(InputError, match="image 1 is of 6 x 4 px, image 0 of 5 x 4"):
            act()


def test_broken_files_are_named(folder):
    path = folder / "EMAN2DB" / "particles.bdb"
    with pytest.raises(InputError, match=r"nothing\.bdb not found"):
        BdbStack(f"bdb:{folder}#nothing")
    pixels = folder / "EMAN2DB" / "particles_5x4x1"
    pixels.write_bytes(pixels.read_bytes()[:-8])
    stack = BdbStack(f"bdb:{folder}#particles")
    for act in (stack.check, lambda: stack.read(range(12))):
        with pytest.raises(InputError, match=r"particles_5x4x1 ends before image 9 "):
            act()
    whole = path.read_bytes()
    for broken in (whole[:3000], b"no database" * 100, b"", whole[:512][::-1]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"particles\.bdb is no Berkeley DB B-tree"):
            BdbStack(f"bdb:{folder}#particles")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dissect.database.bsd", None)
    with pytest.raises(InputError, match=r'pip install dissect.database, or convert'):
        BdbStack(f"bdb:{HERE}#particles")
