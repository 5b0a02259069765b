"""Atomic models: which atoms count."""

import gemmi
import numpy as np
import pytest

from torchem.data.atoms import read_atoms
from torchem.errors import InputError

PDB = """\
MODEL        1
ATOM      1  N   ALA A   1       1.000   2.000   3.000  1.00  0.00           N
ATOM      2  CA AALA A   1       2.000   2.000   3.000  0.50  0.00           C
ATOM      3  CA BALA A   1       2.500   2.000   3.000  0.50  0.00           C
ATOM      4  HA  ALA A   1       2.000   3.000   3.000  1.00  0.00           H
HETATM    5 MG    MG A   2       5.000   5.000   5.000  1.00  0.00          MG
HETATM    6  O   HOH A   3       9.000   9.000   9.000  1.00  0.00           O
ENDMDL
MODEL        2
ATOM      1  N   ALA A   1       7.000   2.000   3.000  1.00  0.00           N
ENDMDL
END
"""


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
def test_heavy_atoms_of_the_first_model(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".pdb":
        path.write_text(PDB)
    else:
        gemmi.read_pdb_string(PDB).make_mmcif_document().write_file(str(path))
    positions, weights = read_atoms(path)
    np.testing.assert_allclose(positions, [[1, 2, 3], [2, 2, 3], [5, 5, 5]])
    assert weights.tolist() == [7, 6, 12]


def test_unusable_models_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.pdb not found"):
        read_atoms(tmp_path / "none.pdb")
    (tmp_path / "empty.pdb").write_text("REMARK nothing\n")
    with pytest.raises(InputError, match=r"empty\.pdb has no atoms"):
        read_atoms(tmp_path / "empty.pdb")
    (tmp_path / "broken.cif").write_text("loop_ garbage ' _x")
    with pytest.raises(InputError, match=r"broken\.cif"):
        read_atoms(tmp_path / "broken.cif")


def test_the_ferritin_model(shared):
    positions, weights = read_atoms(shared / "data/models/apoferritin_24mer_O.pdb")
    assert len(positions) == 33912
    centre = (positions * weights[:, None]).sum(0) / weights.sum()
    np.testing.assert_allclose(centre, 0, atol=0.05)
