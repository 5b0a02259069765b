r"""Polar resampling of images on rings around a shifted centre, and the Fourier transform along the rings.

A ring of radius r has :math:`n_r` samples, a power of two not less than 2πr, at the angles
:math:`(i+½)\,2π/n_r`. Half steps make the samples symmetric under reversal and under reflection in both axes, so that
the transform is four small products, of cosines and sines with even and odd frequencies, each a quarter as wide and
as long as the whole (a quarter of its operations).
"""

import functools
import itertools
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

# the shortest ring: its quarter is 16 samples, the least that tensor cores multiply
SHORTEST = 64


@dataclass(frozen=True)
class Band:
    """Frequencies ``low`` to ``high`` - 1, which the outermost ``n_rings`` rings have."""

    low: int
    high: int
    n_rings: int


@dataclass(frozen=True)
class Rings:
    """Rings ``first`` to ``last`` (pixels, 1 apart) of images of ``box`` pixels, kept from the outermost inwards."""

    box: int
    first: int
    last: int

    @property
    def centre(self) -> int:
        return self.box // 2

    @property
    def reach(self) -> int:
        """The farthest from the centre that a sample may be, pixels."""
        return min(self.centre, self.box - 1 - self.centre)

    @property
    def radii(self) -> list[int]:
        return list(range(self.last, self.first - 1, -1))

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Samples of each ring."""
        return [max(SHORTEST, 2 ** math.ceil(math.log2(2 * math.pi * r))) for r in self.radii]

    @property
    def n_angles(self) -> int:
        """Angles at which images are compared: samples of the outermost ring."""
        return self.lengths[0]

    @property
    def n_samples(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """Rings of one length: length, the first of them, how many; long ones first."""
        lengths = self.lengths
        return [(n, lengths.index(n), lengths.count(n)) for n in sorted(set(lengths), reverse=True)]

    @functools.cached_property
    def bands(self) -> list[Band]:
        """Frequencies by how many rings have them: a ring those below half of its length."""
        lengths = self.lengths
        edges = [0, *sorted({n // 2 for n in lengths})]
        return [Band(a, b, sum(n // 2 > a for n in lengths)) for a, b in itertools.pairwise(edges)]

    def weights(self) -> Tensor:
        """`(rings,)` float64: the share of the disc that one sample of each ring stands for."""
        radii, lengths = (torch.tensor(x, dtype=torch.float64) for x in (self.radii, self.lengths))
        return radii / (radii.sum() * lengths)

    def points(self) -> tuple[Tensor, Tensor, Tensor]:
        """Samples in the order that the products take: by length, then quarter (θ, π−θ, π+θ, −θ), then θ, then ring.

        Returns
        -------
        `(samples,)` ring (int64), x and y (float64 pixels from the centre).
        """
        ring, x, y = [], [], []
        for n, start, count in self.groups:
            theta = (torch.arange(n // 4, dtype=torch.float64) + 0.5) * (2 * math.pi / n)
            angle = torch.stack([theta, math.pi - theta, math.pi + theta, -theta])[..., None]
            radius = torch.tensor(self.radii[start : start + count], dtype=torch.float64)
            ring.append(torch.arange(start, start + count).expand(4, n // 4, -1).flatten())
            x.append((radius * angle.cos()).flatten())
            y.append((radius * angle.sin()).flatten())
        return torch.cat(ring), torch.cat(x), torch.cat(y)


def polar_samples(images: Tensor, rings: Rings, centres: Tensor, neighbours: bool = False) -> Tensor:
    """Sample images on rings, bilinearly; beyond the border of an image its edge goes on.

    Parameters
    ----------
    images
        `(n, L, L)` real, y then x.
    centres
        `(n, 2)` pixels (x, y) from pixel L//2: where the rings lie in each image.
    neighbours
        also with the rings one pixel away along each axis.

    Returns
    -------
    `(n, samples)`, ordered as :meth:`Rings.points`; with neighbours `(n, 3, 3, samples)`, rows y - 1, y, y + 1.
    """
    box, around = rings.box, 1 if neighbours else 0
    n = len(images)
    flat = images.flatten(1)
    index, fraction = [], []
    for points, centre in zip(_points(rings, images.device), centres.double().unbind(1), strict=True):
        at = points + (centre[:, None] + rings.centre)
        corner = at.floor()
        fraction.append((at - corner).to(images.dtype))
        index.append([(corner.int() + step).clamp(0, box - 1) for step in range(-around, around + 2)])
    columns, rows = index
    (fx, fy), lines = fraction, []
    for row in rows:
        values = [flat.gather(1, (row * box + column).long()) for column in columns]
        lines.append(torch.stack([left.lerp(right, fx) for left, right in itertools.pairwise(values)], 1))
    samples = [upper.lerp(lower, fy[:, None]) for upper, lower in itertools.pairwise(lines)]
    return torch.stack(samples, 1) if neighbours else samples[0].reshape(n, -1)


@functools.lru_cache(maxsize=16)
def _points(rings: Rings, device: torch.device) -> tuple[Tensor, Tensor]:
    _, x, y = rings.points()
    return x.to(device), y.to(device)


@functools.lru_cache(maxsize=16)
def centred(rings: Rings, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`polar_samples` of images that lie at their centre: four pixels `(samples, 4)` and the share of each."""
    pixels, shares = _corners(rings, 0.0, 0.0)
    return pixels.long().to(device), shares.to(device, dtype)


def _corners(rings: Rings, x: float, y: float) -> tuple[Tensor, Tensor]:
    """Numbers of the four pixels around each sample of one centre, int32, and their shares, `(samples, 4)`."""
    box = rings.box
    _, px, py = rings.points()
    at_x, at_y = ((p + rings.centre + c).clamp(0, box - 1) for p, c in ((px, x), (py, y)))
    left, top = at_x.floor().clamp(max=box - 2), at_y.floor().clamp(max=box - 2)
    fx, fy = at_x - left, at_y - top
    first = (top * box + left).int()
    pixels = torch.stack([first, first + 1, first + box, first + box + 1], 1)
    return pixels, torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], 1)


@functools.lru_cache(maxsize=1024)
def resampling(rings: Rings, x: float, y: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`polar_samples` at one centre as a sparse matrix `(samples, L²)`."""
    pixels, shares = _corners(rings, x, y)
    rows = torch.arange(0, pixels.numel() + 1, 4, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            rows, pixels.flatten(), shares.to(dtype).flatten(), (len(pixels), rings.box**2), check_invariants=False
        ).to(device)


@functools.lru_cache(maxsize=64)
def quarter_waves(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines and sines mθ of the first quarter: `(2, 2, n/4, n/4)`: function, parity of m, m//2, sample."""
    theta = (torch.arange(n // 4, dtype=torch.float64) + 0.5) * (2 * math.pi / n)
    m = torch.arange(n // 2, dtype=torch.float64).reshape(-1, 2).T
    angle = m[..., None] * theta
    return torch.stack([angle.cos(), angle.sin()]).to(device, dtype)


def ring_spectra(samples: Tensor, rings: Rings) -> Tensor:
    r"""Transform along the rings, :math:`\sum_i p_i e^{-imθ_i}` for 0 ≤ m < n_r/2, of samples with images in columns.

    Parameters
    ----------
    samples
        `(samples, b)`, rows as :meth:`Rings.points`.

    Returns
    -------
    `(2, 2, a/4, rings, b)`: real and imaginary part, parity of the frequency, frequency // 2, ring, image; undefined
    where a ring has no such frequency.
    """
    b, lengths = samples.shape[1], rings.lengths
    result = samples.new_empty((2, 2, rings.n_angles // 4, len(lengths), b))
    row = 0
    for n, start, count in rings.groups:
        a, b_, c, d = samples[row : row + n * count].reshape(4, n // 4, count * b)
        row += n * count
        waves = quarter_waves(n, samples.dtype, samples.device)
        # what is even and odd under reversal, for cosines and sines
        for part, (near, far) in enumerate(((a + d, b_ + c), (d - a, b_ - c))):
            # and under reflection, for even and odd frequencies
            for parity, folded in enumerate((near + far, near.sub_(far))):
                out = result[part, parity, : n // 4, start : start + count].flatten(1)
                torch.mm(waves[part, parity], folded, out=out)
    return result
