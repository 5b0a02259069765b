"""Fourier transforms of centred images and maps, and the list of pixels that every sum of refinement runs over."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from torchem.runtime import memory


def half_transform(images: Tensor, ndim: int = 2) -> Tensor:
    """Transform real images or maps whose origin is the pixel L//2; the forward transform carries 1/L^ndim.

    Parameters
    ----------
    images
        `(..., L, L)`, or `(..., L, L, L)` with ``ndim=3``.

    Returns
    -------
    `(..., L, L//2 + 1)` complex, x fastest and non-negative, y (and z) in FFT order.
    """
    axes = tuple(range(-ndim, 0))
    return torch.fft.rfftn(torch.fft.ifftshift(images, dim=axes), dim=axes, norm="forward")


def inverse_half_transform(transform: Tensor, box: int, ndim: int = 2) -> Tensor:
    """Invert :func:`half_transform`: `(..., L, L//2 + 1)` complex to `(..., L, L)` real, origin at L//2."""
    axes = tuple(range(-ndim, 0))
    return torch.fft.fftshift(torch.fft.irfftn(transform, s=(box,) * ndim, dim=axes, norm="forward"), dim=axes)


def squared_magnitude(values: Tensor) -> Tensor:
    """|z|² of complex values, without the square root of ``abs`` (which PyTorch compiles for a GPU at run time)."""
    return torch.view_as_real(values).square().sum(-1)


def round_half_away(x: float) -> int:
    """Round to the nearest integer, halves away from zero (RELION's rule; Python's goes to even)."""
    return math.floor(abs(x) + 0.5) * (1 if x >= 0 else -1)


@dataclass(frozen=True)
class FourierPixels:
    """The half plane of an L × L transform as a list of P pixels, ordered so that smaller windows are prefixes.

    Pixels have kx >= 0, without (kx = 0, ky < 0), and shell = round(|k|) <= L/2. They are sorted by shell, so that
    the pixels of an image cropped to ``size`` in Fourier space are the first ``count(size)`` ones; the cropped
    window has no row ky = -size/2 (ky = +size/2 stands for it), so those come last in their shell.

    Attributes
    ----------
    box
        L, pixels.
    kx, ky, shell
        `(p,)` int64: Fourier pixels and their shell.
    place
        `(p,)` int64: where they are in a flattened half transform.
    """

    box: int
    kx: Tensor
    ky: Tensor
    shell: Tensor
    place: Tensor

    @staticmethod
    @lru_cache(maxsize=16)
    def of(box: int, device: torch.device | str = "cpu") -> "FourierPixels":
        """The pixels of one box size on one device (kept: they are the same for every iteration)."""
        with memory.place("run"):
            return FourierPixels._of(box, device)

    @staticmethod
    def _of(box: int, device: torch.device | str) -> "FourierPixels":
        half = box // 2
        ky, kx = torch.meshgrid(torch.arange(-half, half + 1), torch.arange(half + 1), indexing="ij")
        ky, kx = ky.reshape(-1), kx.reshape(-1)
        radius2 = (kx * kx + ky * ky).double()
        shell = torch.floor(radius2.sqrt() + 0.5).long()
        # row ky = -L/2 is the same transform row as +L/2
        keep = (shell <= half) & ~((kx == 0) & (ky < 0)) & (ky > -half)
        kx, ky, shell = kx[keep], ky[keep], shell[keep]
        angle = torch.atan2(ky.double(), kx.double())
        order = torch.argsort(angle, stable=True)
        order = order[torch.argsort((shell * 2 + (ky == -shell))[order], stable=True)]
        place = (ky % box) * (half + 1) + kx
        return FourierPixels(box, *(a[order].to(device) for a in (kx, ky, shell, place)))

    def count(self, size: int) -> int:
        """Number of pixels in the window cropped to ``size`` (even) Fourier pixels."""
        return _counts(self.box)[0][size // 2]

    def count_within(self, shell: int) -> int:
        """Number of pixels in all shells up to one."""
        return _counts(self.box)[1][shell]

    def gather(self, transform: Tensor, size: int | None = None) -> Tensor:
        """Take the pixels, or those of a smaller window, out of half transforms: `(..., L, L//2 + 1)` to `(..., p)`."""
        return transform.flatten(-2)[..., self.place[: self.count(size or self.box)]]

    def shell_matrix(self, size: int) -> Tensor:
        """`(count(size), L//2 + 1)` double zeros and ones: ``values @ shell_matrix`` sums pixels by shell."""
        return _shell_matrix(self.box, self.shell.device)[: self.count(size)]

    def shell_counts(self) -> Tensor:
        """`(L//2 + 1,)` int64: number of pixels in each whole shell."""
        return torch.bincount(self.shell, minlength=self.box // 2 + 1)

    def phases(self, shifts_px: Tensor, size: int) -> Tensor:
        """Phase ramps exp(-2 pi i k·t / L) that shift an image by t: `(t, 2)` pixels (x, y) to `(t, count(size))`."""
        n = self.count(size)
        shifts = shifts_px * (-2 * math.pi / self.box)
        angle = shifts[:, :1] * self.kx[:n] + shifts[:, 1:] * self.ky[:n]
        return torch.polar(angle.new_ones(()), angle)


@lru_cache(maxsize=16)
def _shell_matrix(box: int, device: torch.device) -> Tensor:
    """Of all pixels (kept: every batch is summed by it)."""
    return memory.keep(torch.nn.functional.one_hot(FourierPixels.of(box, device).shell).double(), "run")


@lru_cache(maxsize=16)
def _counts(box: int) -> tuple[list[int], list[int]]:
    """Pixels in the window that reaches each shell, and in all shells up to it."""
    pixels = FourierPixels.of(box)
    within = torch.bincount(pixels.shell).cumsum(0)
    bottom = torch.bincount(pixels.shell[(pixels.ky == -pixels.shell) & (pixels.shell > 0)], minlength=len(within))
    return (within - bottom).tolist(), within.tolist()
