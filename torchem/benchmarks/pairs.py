"""What fine scores and back-projection are timed on: particles, each with orientations of its own around one pose."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchem.benchmarks.measure import DEVICE
from torchem.imaging.fourier import FourierPixels
from torchem.imaging.projection import volume_shape
from torchem.imaging.symmetry import rotation_matrix
from torchem.ops.pairs import Operands
from torchem.ops.slices import Slices

PADDING = 2
NEAR_DEG = 5.0  # how far a particle's orientations lie from each other
KEPT = 0.1  # share of a pair's shifts that carry weight
# sums and pixels of chunks: as large as a refinement makes them
CHUNK_ELEMENTS = {"cuda": 2**27, "cpu": 2**21}


@dataclass(frozen=True)
class Pairs:
    """m pairs of n images and u slices at t shifts; :func:`torchem.ops.pairs.score_pairs` has the shapes."""

    slices: Slices
    orientation: Tensor
    which: Tensor
    images: Tensor
    weights: Tensor
    phases: Tensor
    probability: Tensor
    operands: Operands

    @staticmethod
    def random(n: int, box: int, n_orientations: int, n_shifts: int) -> "Pairs":
        """Noise in double precision, on the CPU."""
        generator = torch.Generator().manual_seed(n + box + n_orientations + n_shifts)

        def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        pixels = FourierPixels.of(box, torch.device("cpu"))
        p = pixels.count(box)
        m = n * n_orientations
        which = torch.arange(n).repeat_interleave(n_orientations)
        angles = 360 * torch.rand((3, n), generator=generator, dtype=torch.float64)[:, which] + NEAR_DEG * normal(3, m)
        complex_dtype = torch.complex128
        weights, phases = normal(n, p).square(), torch.polar(torch.ones(n_shifts, p).double(), normal(n_shifts, p))
        kept = torch.rand((m, n_shifts), generator=generator) < KEPT
        return Pairs(
            Slices(
                normal(1, *volume_shape(box // 2, PADDING, 3), dtype=complex_dtype), torch.zeros(m, dtype=torch.int64),
                rotation_matrix(*angles), pixels.kx[:p].double(), pixels.ky[:p].double(), PADDING, box // 2,
            ),
            torch.arange(m), which, normal(n, p, dtype=complex_dtype), weights, phases,
            torch.rand((m, n_shifts), generator=generator, dtype=torch.float64) * kept,
            Operands(
                normal(n, p, dtype=complex_dtype), weights, normal(n, p, dtype=complex_dtype), weights,
                torch.ones(n, dtype=torch.float64), torch.ones(p, dtype=torch.float64),
            ),
        )  # fmt: skip

    def on_device(self, precision: str) -> "Pairs":
        """The same on the device, in single or double precision."""
        return _moved(self, precision)


def _moved(value: Any, precision: str) -> Any:
    if isinstance(value, Tensor):
        single = {torch.float64: torch.float32, torch.complex128: torch.complex64}
        return value.to(DEVICE, single.get(value.dtype, value.dtype) if precision == "single" else value.dtype)
    if isinstance(value, (Pairs, Slices, Operands)):
        return replace(value, **{name: _moved(part, precision) for name, part in vars(value).items()})
    return value
