"""The state of an alignment, all that one iteration leaves to the next; and what an iteration tells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from torchem.mra.averages import resolution_ring
from torchem.ops.correlation import Alignment, Shifts

FRC_THRESHOLD = 0.5


@dataclass
class State:
    """All of it, on the device.

    Attributes
    ----------
    alignment
        of all images, double precision.
    references
        `(k, L, L)`.
    given
        whether the references were given by the user, whose frame they then keep.
    pixel_error
        `(n,)` px at the last ring between this iteration and the one before; NaN where class or mirror changed.
    stage, power
        of reference-free alignment.
    generator
        of whatever is random.
    """

    iteration: int
    alignment: Alignment
    references: Tensor
    given: bool
    pixel_error: Tensor
    converged: bool
    stage: int
    power: float
    generator: torch.Generator

    @staticmethod
    def initial(n_images: int, references: Tensor, seed: int, given: bool) -> State:
        """Nothing is known of any image."""
        zero = torch.zeros(n_images, dtype=torch.float64, device=references.device)
        none = Alignment(zero.long() - 1, zero.bool(), zero, torch.stack([zero, zero], 1), zero)
        error = zero + torch.nan
        generator = torch.Generator().manual_seed(seed)
        return State(0, none, references, given, error, False, 0, 0.0, generator)

    def update(self, alignment: Alignment, radius: float) -> None:
        """Take what an iteration found, and note how far each image moved at most (EMAN2's pixel error)."""
        before = self.alignment
        turn = alignment.angle - before.angle
        error = 2 * (turn / 2).sin().abs() * radius + (alignment.shift() - before.shift()).norm(dim=1)
        same = (alignment.reference == before.reference) & (alignment.mirror == before.mirror)
        self.pixel_error = torch.where(same, error, torch.nan)
        self.alignment = alignment

    def movement(self) -> tuple[float, float]:
        """Share of the images that changed class or mirror, and the mean pixel error of the others, NaN without any."""
        error = self.pixel_error.cpu()
        kept = torch.isfinite(error)
        return 1 - float(kept.double().mean()), float(error[kept].mean())

    def follow(self, centres: Tensor) -> None:
        """The average of each class was moved so that whole-pixel places `(k, 2)` are its centre: so are its images."""
        alignment = self.alignment
        x, y = centres.double()[alignment.reference].unbind(1)
        x = torch.where(alignment.mirror, -x, x)
        c, s = alignment.angle.cos(), alignment.angle.sin()
        alignment.offset = alignment.offset + torch.stack([c * x - s * y, s * x + c * y], 1)


@dataclass(frozen=True)
class Iteration:
    """What one iteration found.

    Attributes
    ----------
    parameters
        one row an image: image, class_id, mirror, alpha, sx, sy, peak, pixel_error (EMAN2's convention; degrees,
        pixels; the last against the iteration before, missing where class or mirror changed).
    averages
        `(k, L, L)` class averages, unfiltered, on the device.
    frc
        `(k, L//2 + 1)` correlation of the averages of even and odd images by Fourier ring.
    members
        `(k,)` images of each class.
    changed
        share of the images whose class or mirror changed.
    pixel_error
        mean over the others.
    """

    number: int
    parameters: pd.DataFrame
    averages: Tensor
    frc: Tensor
    members: Tensor
    changed: float
    pixel_error: float
    peak: float
    shifts: Shifts
    seconds: float
    converged: bool

    def resolution(self, pixel_size: float | None) -> np.ndarray:
        """`(k,)` where the correlation of the halves falls below 0.5: Å, or pixels if no pixel size is known."""
        box = self.averages.shape[-1]
        ring = resolution_ring(self.frc, FRC_THRESHOLD).cpu().numpy().astype(float)
        return np.divide(box * (pixel_size or 1.0), ring, out=np.full(len(ring), np.inf), where=ring > 0)
