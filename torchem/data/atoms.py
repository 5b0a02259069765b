"""Atomic models as points with weights."""

from pathlib import Path

import gemmi
import numpy as np

from torchem.errors import InputError


def read_atoms(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Heavy atoms of the first model of a PDB or mmCIF file.

    Waters, hydrogens and alternative locations other than A are left out.

    Returns
    -------
    `(n, 3)` float64 positions in Å as the file has them, `(n,)` float64 atomic numbers.

    Raises
    ------
    InputError
        for a file that is missing, garbled or without atoms.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"file {path} not found; check the path of the atomic model")
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an atomic model ({error}); give a .pdb or .cif file") from error
    structure.remove_waters()
    structure.remove_hydrogens()
    atoms = gemmi.FlatStructure(structure)
    taken = (atoms.model_num == atoms.model_num[:1]) & np.isin(atoms.altlocs, (0, ord("A")))
    if not taken.any():
        raise InputError(f"{path} has no atoms; give a .pdb or .cif file of a model")
    return atoms.pos[taken], atoms.elements[taken].astype(np.float64)
