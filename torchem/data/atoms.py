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
    positions, numbers = [], []
    if len(structure):
        for chain in structure[0]:
            for residue in chain:
                if residue.is_water():
                    continue
                for atom in residue:
                    if not atom.is_hydrogen() and atom.altloc in ("\0", "A"):
                        positions.append(atom.pos.tolist())
                        numbers.append(atom.element.atomic_number)
    if not positions:
        raise InputError(f"{path} has no atoms; give a .pdb or .cif file of a model")
    return np.array(positions, np.float64), np.array(numbers, np.float64)
