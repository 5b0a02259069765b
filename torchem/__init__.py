"""torchem: single-particle cryo-EM refinement in PyTorch.

Public names are loaded on first use, since importing torch takes seconds. The commands
(``python -m torchem.refine``) are not among them: ``python -m`` would load them twice.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchem.data.images import Images
    from torchem.data.particles import Particles
    from torchem.em.options import RefineOptions
    from torchem.em.reference import read_reference
    from torchem.em.refiner import Refiner
    from torchem.errors import InputError
    from torchem.mra.aligner import MultiReferenceAligner, ReferenceFreeAligner
    from torchem.mra.options import AlignOptions

__version__ = "0.1.0"
__all__ = [
    "AlignOptions",
    "Images",
    "InputError",
    "MultiReferenceAligner",
    "Particles",
    "ReferenceFreeAligner",
    "RefineOptions",
    "Refiner",
    "__version__",
    "read_reference",
]

_HOME = {
    "AlignOptions": "torchem.mra.options",
    "MultiReferenceAligner": "torchem.mra.aligner",
    "ReferenceFreeAligner": "torchem.mra.aligner",
    "Images": "torchem.data.images",
    "InputError": "torchem.errors",
    "Particles": "torchem.data.particles",
    "RefineOptions": "torchem.em.options",
    "Refiner": "torchem.em.refiner",
    "read_reference": "torchem.em.reference",
}

# in a checkout, configs/ and kernels/ lie beside this package and are torchem.configs and torchem.kernels
if (_root := Path(__file__).resolve().parents[1]).joinpath("pyproject.toml").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'torchem' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
