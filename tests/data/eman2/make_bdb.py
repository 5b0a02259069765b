"""EMAN2DB/: a BDB stack of twelve images of 5 x 4 pixels, and a virtual stack of three of them.

    python make_bdb.py        needs db_load, Berkeley DB's own (Debian: apt install db-util; 5.3.28 made these files)

Records as EMAN2 makes them under Python 2: keys and headers are pickles of protocol 2 in which text is bytes
(SHORT_BINSTRING) and a Transform is libpyTransform2's class called with twelve floats.
"""

import io
import pickle
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "EMAN2DB"


class Transform:
    def __init__(self, matrix):
        self.matrix = matrix

    def __reduce__(self):
        return Transform, (self.matrix,)


class EMAN2Ctf(Transform):
    def __reduce__(self):
        return EMAN2Ctf, (self.matrix,)


for module, kind in (("libpyTransform2", Transform), ("libpyAligner2", EMAN2Ctf)):
    kind.__module__ = module
    sys.modules[module] = types.ModuleType(module)
    setattr(sys.modules[module], kind.__name__, kind)


class Python2Pickler(pickle._Pickler):
    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_str(self, text):
        self.write(pickle.SHORT_BINSTRING + struct.pack("<B", len(text)) + text.encode())
        self.memoize(text)

    dispatch[str] = save_str


def dumps(value):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue()


def load(name, records):
    lines = ["VERSION=3", "format=bytevalue", f"database={name}", "type=btree", "db_pagesize=1024", "HEADER=END"]
    lines += [" " + part.hex() for record in records for part in record]
    (FOLDER / f"{name}.bdb").unlink(missing_ok=True)
    subprocess.run(
        ["db_load", str(FOLDER / f"{name}.bdb")], input="\n".join([*lines, "DATA=END", ""]).encode(), check=True
    )


def header(key):
    turn = [0.6, 0.8, 0.0, 1.5 * key, -0.8, 0.6, 0.0, -0.25, 0.0, 0.0, 1.0, 0.0]
    return {
        "apix_x": float(np.float32(1.77)), "ctf": EMAN2Ctf([2.0, 0.1, 45.0]), "data_n": key, "is_complex": 0,
        "is_complex_x": False, "members": list(range(key * 100)), "nx": 5, "ny": 4, "nz": 1,
        "ptcl_source_image": f"mic{key:03d}.hdf", "xform.align2d": Transform(turn),
    }  # fmt: skip


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    # the file holds the images in another order than their keys
    place = {key: (5 * key + 2) % 12 for key in range(12)}
    pixels = np.empty((12, 4, 5), "<f4")
    for key in range(12):
        pixels[place[key]] = np.arange(20).reshape(4, 5) / 7 + 100 * key
    pixels.tofile(FOLDER / "particles_5x4x1")
    records = [(dumps("maxrec"), dumps(11)), (dumps("5x4x1"), dumps(11))]
    for key in range(12):
        records += [(dumps(key), dumps(header(key))), (b"5x4x1" + dumps(key), dumps(place[key]))]
    load("particles", records)
    virtual = [(dumps("maxrec"), dumps(2))]
    for new, key in enumerate((7, 0, 11)):
        virtual.append((dumps(new), dumps({**header(key), "data_path": f"particles_5x4x1*{80 * place[key]}"})))
    load("chosen", virtual)
