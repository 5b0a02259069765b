"""Class averages of even and odd images: their correlation by ring, the filter that follows from it, centring."""

from __future__ import annotations

import torch
from torch import Tensor

from torchem.imaging.masks import soft_sphere
from torchem.imaging.resolution import shell_indices
from torchem.runtime.distributed import World

EDGE_PX = 5.0
# a class that is smaller gives up its seat
SMALLEST = 4
# below this correlation of the halves a ring, and all beyond it, are noise
NOISE = 0.143


class ClassSums:
    """Sums and numbers of the aligned images of each class, those with even and odd numbers apart.

    Attributes
    ----------
    images
        `(2, k, L, L)` float64, so that neither batches nor ranks matter to the averages.
    counts
        `(2, k)` float64.
    """

    def __init__(self, n_classes: int, box: int, device: torch.device) -> None:
        self.images = torch.zeros((2, n_classes, box, box), dtype=torch.float64, device=device)
        self.counts = torch.zeros((2, n_classes), dtype=torch.float64, device=device)

    def add(self, aligned: Tensor, class_id: Tensor, numbers: Tensor) -> None:
        """Add aligned images `(n, L, L)` of classes `(n,)`, which have these numbers `(n,)` in the data set."""
        place = numbers % 2 * self.counts.shape[1] + class_id
        self.images.flatten(0, 1).index_add_(0, place, aligned.double())
        self.counts.flatten().index_add_(0, place, torch.ones_like(place, dtype=torch.float64))

    def reduce(self, world: World) -> None:
        """Add up what all ranks have."""
        world.sum_(self.images)
        world.sum_(self.counts)

    @property
    def members(self) -> Tensor:
        """`(k,)` images of each class."""
        return self.counts.sum(0)

    def averages(self) -> Tensor:
        """`(k, L, L)`; empty classes are 0."""
        return self.images.sum(0) / self.members.clamp(min=1)[:, None, None]

    def halves(self) -> Tensor:
        """`(2, k, L, L)` averages of even and of odd images."""
        return self.images / self.counts.clamp(min=1)[..., None, None]


def ring_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of images `(k, L, L)`, each with its partner, by Fourier ring: `(k, L//2 + 1)`."""
    box = a.shape[-1]
    shells, multiplicity = shell_indices(box, 2, a.device)
    inside = (shells <= box // 2).flatten()
    index = shells.flatten()[inside]
    fa, fb = torch.fft.rfft2(a), torch.fft.rfft2(b)

    def by_ring(values: Tensor) -> Tensor:
        weighted = (values * multiplicity.to(values)).flatten(1)[:, inside]
        return values.new_zeros((len(values), box // 2 + 1)).index_add_(1, index, weighted)

    cross = by_ring((fa * fb.conj()).real)
    power = by_ring(fa.abs().square()).sqrt() * by_ring(fb.abs().square()).sqrt()
    return torch.where(power > 0, cross / power, 0.0)


def resolution_ring(frc: Tensor, threshold: float) -> Tensor:
    """`(k,)`: the last ring before the correlation `(k, rings)` first falls below a threshold; 0 if the first does."""
    below = frc[:, 1:] < threshold
    first = torch.where(below.any(1), below.int().argmax(1), frc.shape[1] - 1)
    return first


def filtered(averages: Tensor, frc: Tensor) -> Tensor:
    """Averages as the halves say they can be trusted: each ring times 2F/(1 + F), nothing from the first noisy one on.

    The Wiener filter of the average of both halves (Rosenthal & Henderson 2003, by ring); so the noise of small classes
    neither counts as their energy nor attracts images.

    Parameters
    ----------
    averages
        `(k, L, L)`.
    frc
        `(k, L//2 + 1)` of their halves.
    """
    box = averages.shape[-1]
    # rings hold few points at low resolution: neighbours are averaged
    smooth = torch.nn.functional.avg_pool1d(frc[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    ring = torch.arange(frc.shape[1], device=frc.device)
    trusted = ring <= resolution_ring(smooth, NOISE).clamp(min=2)[:, None]
    # of two rings at least something is kept
    weight = torch.where(ring <= 2, smooth.clamp(min=NOISE), smooth).clamp(0, 1)
    weight = torch.where(trusted, 2 * weight / (1 + weight), 0.0)
    shells, _ = shell_indices(box, 2, averages.device)
    weight = torch.nn.functional.pad(weight, (0, int(shells.max()) - box // 2))
    return torch.fft.irfft2(torch.fft.rfft2(averages) * weight[:, shells], s=(box, box))


def masked(averages: Tensor, radius: float) -> Tensor:
    """Averages within a soft disc, less their mean around it."""
    mask = soft_sphere(averages.shape[-1], radius, EDGE_PX, 2, averages.dtype, averages.device)
    edge = mask * (1 - mask)
    around = (averages * edge).sum((1, 2)) / edge.sum().clamp(min=1e-12)
    return (averages - around[:, None, None]) * mask


def mass_centres(averages: Tensor, radius: float) -> Tensor:
    """`(k, 2)` whole pixels (x, y) from pixel L//2 to the centre of mass of what is brighter than its surroundings."""
    mass = masked(averages, radius).clamp(min=0)
    axis = torch.arange(averages.shape[-1], dtype=mass.dtype, device=mass.device) - averages.shape[-1] // 2
    total = mass.sum((1, 2))
    centre = torch.stack([(mass.sum(1) * axis).sum(1), (mass.sum(2) * axis).sum(1)], 1)
    return torch.where(total > 0, centre.T / total, 0.0).T.round()


def rolled(averages: Tensor, centres: Tensor) -> Tensor:
    """Averages `(k, L, L)` moved so that whole-pixel places `(k, 2)` come to pixel L//2; what leaves comes in again."""
    return torch.stack([
        average.roll((-round(y), -round(x)), (0, 1)) for average, (x, y) in zip(averages, centres.tolist(), strict=True)
    ])  # fmt: skip
