"""STAR files: what is written reads back exactly, what is broken is named."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchem.data.star import read_star, write_star
from torchem.errors import InputError


def test_reads_loops_and_single_values(tmp_path):
    path = tmp_path / "a.star"
    path.write_text(
        '# comment\n\ndata_general\n\n_rlnOutputRootName   job/run # why\n_rlnTomoTomogramsFile ""\n'
        "_rlnCurrentIteration 4\n_rlnCurrentResolution inf\n\ndata_\nloop_\n_rlnMicrographName #1\n_rlnDefocusU #2\n"
        '_rlnGroupNumber\n1 1e4 3\n"a b.mrc" -2.5 4\n\nhash#2.mrc 0 5\n'
    )
    blocks = read_star(path)
    assert blocks["general"] == {
        "rlnOutputRootName": "job/run",
        "rlnTomoTomogramsFile": "",
        "rlnCurrentIteration": 4,
        "rlnCurrentResolution": math.inf,
    }
    table = blocks[""]
    assert table["rlnMicrographName"].tolist() == ["1", "a b.mrc", "hash#2.mrc"]  # a name that looks like a number
    assert table["rlnDefocusU"].tolist() == [1e4, -2.5, 0.0]
    assert table["rlnGroupNumber"].dtype == np.int64


def test_nothing_is_read_after_the_last_block(tmp_path):
    path = tmp_path / "a.star"
    path.write_text("data_one\n_a 1\n\ndata_two\nloop_\n_b\n2\n3\n\ndata_three\nbroken\n")
    blocks = read_star(path, last="two")
    assert list(blocks) == ["one", "two"]
    assert blocks["two"]["b"].tolist() == [2, 3]
    with pytest.raises(InputError, match="line 11"):
        read_star(path)


def test_windows_line_ends_and_underscored_numbers(tmp_path):
    path = tmp_path / "a.star"
    path.write_bytes(b"data_x\r\nloop_\r\n_rlnJobTag #1\r\n_rlnVoltage #2\r\n2017_01 300\r\n")
    table = read_star(path)["x"]
    assert table["rlnJobTag"].tolist() == ["2017_01"]
    assert table["rlnVoltage"].tolist() == [300]


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=5),
    text=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12),
)
def test_every_digit_survives(tmp_path_factory, values, text):
    assume(not ('"' in text and "'" in text))
    path = tmp_path_factory.mktemp("star") / "a.star"
    table = pd.DataFrame({"rlnX": values, "rlnSomeName": [text] * len(values), "rlnN": range(len(values))})
    write_star(path, {"t": table, "g": {"rlnX": values[0], "rlnOtherName": text, "rlnYes": True}}, comment="one\ntwo")
    assert path.read_text().startswith("# one\n# two\n")
    blocks = read_star(path)
    assert blocks["t"]["rlnX"].astype(float).tolist() == values
    assert blocks["t"]["rlnSomeName"].tolist() == [text] * len(values)
    assert blocks["g"] == {"rlnX": values[0], "rlnOtherName": text, "rlnYes": 1}


def test_long_identifiers_keep_their_digits(tmp_path):
    path = tmp_path / "a.star"
    path.write_text(f"data_x\nloop_\n_cryosparcUid #1\n{2**64 - 1}\n12\n")
    assert read_star(path)["x"]["cryosparcUid"].tolist() == [str(2**64 - 1), "12"]


def test_another_program_reads_the_same(tmp_path):
    starfile = pytest.importorskip("starfile")
    table = pd.DataFrame({"rlnImageName": ["1@a.mrcs", "2@a b.mrcs"], "rlnDefocusU": [0.1 + 0.2, 1e-9], "rlnN": [1, 2]})
    write_star(tmp_path / "a.star", {"general": {"rlnPixelSize": 1.77, "rlnNrClasses": 2}, "particles": table})
    blocks = starfile.read(tmp_path / "a.star", always_dict=True)
    assert blocks["general"] == {"rlnPixelSize": 1.77, "rlnNrClasses": 2}
    for label in table:
        assert blocks["particles"][label].tolist() == table[label].tolist()


def test_float32_is_written_by_its_own_digits(tmp_path):
    table = pd.DataFrame({"rlnX": np.array([0.1, 1e-30], np.float32)})
    write_star(tmp_path / "a.star", {"t": table})
    assert " 0.1 " in (" " + (tmp_path / "a.star").read_text().replace("\n", " "))
    assert (read_star(tmp_path / "a.star")["t"]["rlnX"].to_numpy(np.float32) == table["rlnX"]).all()


def test_an_empty_table_keeps_its_columns(tmp_path):
    write_star(tmp_path / "a.star", {"t": pd.DataFrame({"rlnX": [], "rlnY": []}), "u": {"rlnZ": 1}})
    blocks = read_star(tmp_path / "a.star")
    assert list(blocks["t"].columns) == ["rlnX", "rlnY"] and len(blocks["t"]) == 0
    assert blocks["u"] == {"rlnZ": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no data_ block"),
        (b"# only a comment\n", "no data_ block"),
        (b"MRC\0\0\0", "binary"),
        (b"\xff\xfe\xfa", "binary"),
        (b"some text\n", "line 1"),
        (b"data_a\nloop_\n_rlnA #1\n_rlnB #2\n1 2\n3\n", "line 6 .row 2 of data_a.: 1 values for 2 columns"),
        (b"data_a\nloop_\n_rlnA #1\n1 2\n", "2 values for 1 columns"),
        (b"data_a\nloop_\n1 2\n", "no labels"),
        (b"data_a\nloop_\n_rlnA #1\n_rlnA #2\n1 2\n", "_rlnA stands twice"),
        (b"data_a\n_rlnA 1\ndata_a\n_rlnA 2\n", "data_a stands here twice"),
        (b"data_a\n_rlnA 1 2\n", "line 2"),
        (b"data_a\n_rlnA\n", "line 2"),
        (b"data_a\n_rlnA 1\nloop_\n_rlnB #1\n1\n", "second loop_"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, content, says):
    path = tmp_path / "broken.star"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        read_star(path)
    assert "broken.star" in str(error.value)


def test_missing_file_and_unwritable_folder(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.star"):
        read_star(tmp_path / "none.star")
    with pytest.raises(InputError, match="cannot write"):
        write_star(tmp_path / "no" / "folder.star", {"a": {"rlnX": 1}})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.star"
    write_star(path, {"a": {"rlnX": 1}})
    with pytest.raises(InputError, match="cannot stand in a STAR file"):
        write_star(path, {"a": {"rlnXName": "two\nlines"}})
    assert read_star(path) == {"a": {"rlnX": 1}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.star"]
