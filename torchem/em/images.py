"""Particle images as the E-step wants them: normalised, centred, masked, transformed (Scheres 2012)."""

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchem.data.particles import Particles
from torchem.errors import InputError
from torchem.imaging.ctf import Optics, aberration_phase, ctf_of_terms, ctf_terms, mtf
from torchem.imaging.fourier import FourierPixels, half_transform, inverse_half_transform, squared_magnitude
from torchem.imaging.masks import apply_circular_mask
from torchem.runtime import memory

log = logging.getLogger(__name__)

# the first noise spectra are made of this many images an optics group
NOISE_PARTICLES = 1000


@dataclass
class ImageGeometry:
    """Pixels of one optics group's images inside ``current_size``, and where they lie in the reference's transform.

    Attributes
    ----------
    pixels, size
        the group's own Fourier pixels, and its window.
    kx, ky
        `(p,)` the same in Fourier pixels of the reference: M·k·(L·a)/(box·pixel size).
    shell
        `(p,)` int64: the reference's shell that each lies in, M aside, its last one at most.
    magnification
        (box·pixel size)/(L·a), 1 where group and reference are alike.
    """

    optics: Optics
    pixels: FourierPixels
    size: int
    kx: Tensor
    ky: Tensor
    shell: Tensor
    magnification: float

    @staticmethod
    def of(
        optics: Optics, size: int, box: int, pixel_size: float, dtype: torch.dtype, device: torch.device
    ) -> "ImageGeometry":
        """Geometry for a reference of ``box`` pixels of ``pixel_size`` Å at ``size`` Fourier pixels of it."""
        magnification = optics.box * optics.pixel_size / (box * pixel_size)
        own = min(optics.box, 2 * math.ceil(size / 2 * magnification - 1e-6))
        pixels = FourierPixels.of(optics.box, device)
        n = pixels.count(own)
        kx, ky, shell = _in_the_reference(optics, magnification, box, dtype, device)
        return ImageGeometry(optics, pixels, own, kx[:n], ky[:n], shell[:n], magnification)

    @property
    def n_pixels(self) -> int:
        return len(self.kx)

    def count(self, size: int) -> int:
        """Number of pixels inside ``size`` Fourier pixels of the reference."""
        return self.pixels.count(min(self.size, 2 * math.ceil(size / 2 * self.magnification - 1e-6)))

    def phases(self, shifts_angst: Tensor) -> Tensor:
        """Phase ramps `(t, p)` of shifts `(t, 2)` in Å."""
        ramps = self.pixels.phases(shifts_angst / self.optics.pixel_size, self.size)
        return ramps.to(self.kx.dtype.to_complex())


@lru_cache(maxsize=64)
def _in_the_reference(
    optics: Optics, magnification: float, box: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """``kx``, ``ky`` and ``shell`` of :class:`ImageGeometry` for all pixels of an optics group (kept as they are)."""
    pixels = FourierPixels.of(optics.box, device)
    kx, ky = pixels.kx.to(dtype), pixels.ky.to(dtype)
    m00, m01, m10, m11 = optics.magnification
    shell = torch.floor(pixels.shell.double() / magnification + 0.5).long().clamp(max=box // 2)
    kx, ky = (m00 * kx + m01 * ky) / magnification, (m10 * kx + m11 * ky) / magnification
    return memory.keep((kx, ky, shell), "run")


@dataclass
class ImageBatch:
    """n particles of one half and one optics group.

    Attributes
    ----------
    particles
        `(n,)` int64 numbers in the data set.
    masked, unmasked
        `(n, p)` complex: for alignment and statistics, and for back-projection.
    ctf
        `(n, p)` what the projection is multiplied by: CTF (CTF² for premultiplied images).
    back_ctf
        `(n, p)` what the image is multiplied by before back-projection: CTF (1 for premultiplied images).
    power
        `(n, box//2 + 1)` Σ|X|² of the masked image by shell, whole transform, double.
    window_power
        `(n,)` Σ|X|² over the whole square window, its corners and all of the column kx = 0 included, double; None
        where it was not asked for.
    offset_angst
        `(n, 2)` Å, double: the rounded old offset, by which the image was shifted.
    """

    geometry: ImageGeometry
    particles: Tensor
    masked: Tensor
    unmasked: Tensor
    ctf: Tensor
    back_ctf: Tensor
    power: Tensor
    window_power: Tensor | None
    offset_angst: Tensor

    def __len__(self) -> int:
        return len(self.particles)

    def __getitem__(self, part: slice) -> "ImageBatch":
        """A range of the particles."""
        if part == slice(0, len(self)):
            return self
        mine: dict[str, Any] = {name: value[part] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **mine)


def prepare_images(
    images: Tensor,
    particles: Tensor,
    geometry: ImageGeometry,
    ctf_parameters: Tensor | None,
    norm_factor: Tensor,
    offset_angst: Tensor,
    particle_diameter: float,
    noise_spectrum: Tensor | None,
    seed: int,
    cross_correlation: bool = False,
) -> ImageBatch:
    """Normalise, translate by whole pixels, mask and transform a batch of images.

    Parameters
    ----------
    images
        `(n, L, L)` real, in the precision of the run.
    particles
        `(n,)` their numbers, which seed the noise that fills the outside of the mask.
    ctf_parameters
        `(n, 6)` as :func:`torchem.imaging.ctf.ctf` wants them, double; None: no CTF correction.
    norm_factor
        `(n,)` multiplies the images: mean norm correction over the particle's own.
    offset_angst
        `(n, 2)` last origin offsets, Å; rounded to whole pixels here.
    particle_diameter
        Å.
    noise_spectrum
        `(L//2 + 1,)` σ² to fill the outside of the mask with noise; None: its mean (RELION's zero_mask).
    cross_correlation
        also compute ``window_power``.
    """
    optics, pixels, n_pixels = geometry.optics, geometry.pixels, geometry.n_pixels
    shift = _whole(offset_angst / optics.pixel_size)
    images = translate(images * norm_factor[:, None, None].to(images), shift.long())
    fill = None
    if noise_spectrum is not None:
        fill = spectral_noise(particles, noise_spectrum, optics.box, seed).to(images)
    circle = apply_circular_mask(images, particle_diameter / (2 * optics.pixel_size), fill=fill)
    transform = half_transform(circle)
    window_power = None
    if cross_correlation:
        rows = torch.arange(1 - geometry.size // 2, geometry.size // 2 + 1, device=images.device)
        window_power = squared_magnitude(transform[:, rows, : geometry.size // 2 + 1]).double().sum((1, 2))
    masked = pixels.gather(transform)
    unmasked = pixels.gather(half_transform(images), geometry.size)
    kx, ky = pixels.kx[:n_pixels], pixels.ky[:n_pixels]
    phase = aberration_phase(optics, kx, ky)
    response = mtf(optics, kx, ky)
    for window in (masked[:, :n_pixels], unmasked):
        if phase is not None:
            window *= phase.conj().to(window)
        if response is not None:
            window /= response.to(window)
    magnitudes = squared_magnitude(masked)
    # shell size/2 is summed inside the window only, the shells beyond it whole
    magnitudes[:, n_pixels : pixels.count_within(geometry.size // 2)] = 0
    power = magnitudes.double() @ pixels.shell_matrix(optics.box)
    return ImageBatch(
        geometry, particles, masked[:, :n_pixels], unmasked,
        *modulations(geometry, ctf_parameters, len(images), images.dtype), power, window_power,
        shift * optics.pixel_size,
    )  # fmt: skip


def modulations(
    geometry: ImageGeometry, ctf_parameters: Tensor | None, n: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the projections of n particles, and their images on the way back, are multiplied by: `(n, p)` each.

    CTF and CTF, or CTF² and 1 for premultiplied images; 1 and 1 without ``ctf_parameters``, see :func:`prepare_images`.
    """
    optics, n_pixels = geometry.optics, geometry.n_pixels
    # images are in grey values per area, transforms carry 1/box²
    grey = geometry.magnification**-2
    if ctf_parameters is None:
        modulation = torch.full((n, n_pixels), grey, dtype=dtype, device=geometry.kx.device)
        return modulation, modulation
    modulation = ctf_of_terms(optics, ctf_parameters, _ctf_terms(optics, geometry.kx.device)[:, :n_pixels])
    modulation = modulation.mul_(grey).to(dtype)
    if optics.premultiplied:
        return modulation.square() / grey, torch.full_like(modulation, grey)
    return modulation, modulation


@lru_cache(maxsize=64)
def _ctf_terms(optics: Optics, device: torch.device) -> Tensor:
    """Of all pixels of an optics group (kept: they are the same in every iteration)."""
    pixels = FourierPixels.of(optics.box, device)
    with memory.place("run"):
        return ctf_terms(optics, pixels.kx, pixels.ky)


def _whole(shift: Tensor) -> Tensor:
    """Rounded, halves away from 0."""
    return torch.add(shift, shift.sign(), alpha=0.5).trunc_()


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Shift images `(n, L, L)` by whole pixels `(n, 2)` (x, y); what comes in from outside is 0."""
    box = images.shape[-1]
    source = torch.arange(box, device=images.device) - shift[..., None]  # (n, 2, L)
    inside = (source >= 0) & (source < box)
    x, y = source.clamp(0, box - 1).unbind(1)
    images = images.gather(1, y[:, :, None].expand(-1, -1, box)).gather(2, x[:, None].expand(-1, box, -1))
    return images * (inside[:, 1, :, None] & inside[:, 0, None, :])


def spectral_noise(particles: Tensor, spectrum: Tensor, box: int, seed: int) -> Tensor:
    """Gaussian noise images with a given σ² by shell, the same for a particle whatever its batch, rank or device.

    Parameters
    ----------
    particles
        `(n,)` int64.
    spectrum
        `(box//2 + 1,)` variance of a real or imaginary Fourier component.

    Returns
    -------
    `(n, box, box)` double.
    """
    device = particles.device
    pixel = torch.arange(2 * box * box, device=device)
    bits = _mix((particles[:, None] + 1) * 0x5851F42D4C957F2D + _mix(pixel + (seed << 24)))
    uniform = ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53
    radius, angle = uniform.unflatten(1, (2, -1)).unbind(1)
    white = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
    transform = half_transform(white.reshape(-1, box, box))
    k = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64, device=device)
    shell = torch.floor((k[:, None] ** 2 + k[: box // 2 + 1].abs() ** 2).sqrt() + 0.5).long()
    amplitude = (spectrum[shell.clamp(max=box // 2)] * 2 * box * box).sqrt()
    return inverse_half_transform(transform * amplitude, box)


def _mix(x: Tensor) -> Tensor:
    # the finaliser of SplitMix64 in wrapping int64 arithmetic; >> is made logical by the mask
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class ParticleImages:
    """The particles' images in the precision and on the device of the run, kept there if there is room.

    An image that cannot be used (not a number, or constant) is named once and left out of every batch.
    """

    def __init__(self, particles: Particles, dtype: torch.dtype, device: torch.device, keep: bool) -> None:
        self._particles, self._dtype, self._device = particles, dtype, device
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = {} if keep else None
        self.unusable: set[int] = set()
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(m, L, L)` of those particles `(n,)` of one optics group that can be used, and their numbers."""
        if self._kept is None or not len(indices):
            return self._load(indices)
        # the same batches come in every iteration
        key = int(indices[0]), len(indices)
        if key not in self._kept:
            self._kept[key] = self._load(indices)
        return self._kept[key]

    def _is_kept(self, indices: Tensor) -> bool:
        return self._kept is not None and (int(indices[0]), len(indices)) in self._kept

    def batches(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """What :meth:`read` gives for each of `parts`, the next one read while the last is worked on."""
        parts = list(parts)
        if all(map(self._is_kept, parts)):
            yield from map(self.read, parts)
            return
        with ThreadPoolExecutor(1) as reader:
            ahead: deque[Future] = deque()
            for part in parts:
                ahead.append(reader.submit(self._read_ahead, part))
                if len(ahead) == 2:
                    yield self._taken(ahead.popleft())
            while ahead:
                yield self._taken(ahead.popleft())

    def _read_ahead(self, indices: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        if self._device.type != "cuda":
            return *self.read(indices), None
        # beside the work on the present batch, not behind it
        with torch.cuda.stream(self._stream):
            images, usable = self.read(indices)
            return images, usable, self._stream.record_event()

    def _taken(self, read: Future) -> tuple[Tensor, Tensor]:
        images, indices, ready = read.result()
        if ready is not None:
            present = torch.cuda.current_stream(self._device)
            present.wait_event(ready)
            for tensor in (images, indices):
                tensor.record_stream(present)
        return images, indices

    def sample(self, members: np.ndarray) -> tuple[Tensor, Tensor]:
        """The usable ones of the first NOISE_PARTICLES members, and their numbers; not kept."""
        return self._load(torch.from_numpy(members[:NOISE_PARTICLES]))

    def _load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = self._on_host(indices).to(self._device, non_blocking=True).to(self._dtype)
        lowest, highest = images.flatten(1).aminmax(dim=1)
        usable = (torch.isfinite(lowest) & torch.isfinite(highest) & (highest > lowest)).cpu()
        for particle in indices[~usable].tolist():
            if particle not in self.unusable:
                self.unusable.add(particle)
                name = self._particles.table["rlnImageName"].iloc[particle]
                log.warning("particle %d (%s) is constant or not a number: left out", particle + 1, name)
        if not bool(usable.all()):
            images = images[usable.to(self._device)]
        return images, indices[usable].to(self._device)

    def _on_host(self, indices: Tensor) -> Tensor:
        """For a GPU in pinned memory: it is used again and again, and sent without being copied once more."""
        if self._device.type != "cuda":
            return torch.from_numpy(self._particles.images(indices.numpy()))
        box = self._particles.optics[int(self._particles.optics_group[int(indices[0])])].box
        images = torch.empty((len(indices), box, box), pin_memory=True)
        self._particles.images(indices.numpy(), images.numpy())
        return images


def estimate_noise(
    images: ParticleImages, members: np.ndarray, optics: Optics, particle_diameter: float | None, origin_angst: Tensor
) -> Tensor:
    """First noise spectrum of an optics group: mean power of up to 1,000 images less that of their average.

    σ²(s) = ½ mean over particles of the mean of |X|² over the shell, minus half the shell mean of |mean X|²; where
    that is negative the lower neighbour stands. A single image is not its own average: all of its power is noise.

    Parameters
    ----------
    members
        `(n,)` particles of the group.
    particle_diameter
        Å, of the mask; None: the images are not masked.
    origin_angst
        `(N, 2)` origins of all particles.

    Returns
    -------
    `(box//2 + 1,)` double.

    Raises
    ------
    InputError
        None of the images that were looked at can be used.
    """
    batch, chosen = images.sample(members)
    if not len(batch):
        raise InputError(
            f"optics group {optics.name}: all {min(len(members), NOISE_PARTICLES)} images looked at are constant or "
            "not finite; correct the stack, or leave the group out"
        )
    batch = translate(batch, _whole(origin_angst.to(batch.device)[chosen] / optics.pixel_size).long())
    if particle_diameter is not None:
        batch = apply_circular_mask(batch, particle_diameter / (2 * optics.pixel_size))
    pixels = FourierPixels.of(optics.box, batch.device)
    transforms = pixels.gather(half_transform(batch))
    # the column kx = 0 counts with both its halves, as in RELION
    twice = 1.0 + ((pixels.kx == 0) & (pixels.ky > 0) & (pixels.ky < optics.box // 2)).double()
    sums = pixels.shell_matrix(optics.box) * twice[:, None]
    counts = sums.sum(0).clamp(min=1)
    each = squared_magnitude(transforms).double().mean(0) @ sums / counts
    average = squared_magnitude(transforms.mean(0)).double() @ sums / counts if len(batch) > 1 else 0.0
    sigma2 = (each - average) / 2
    for shell in range(1, len(sigma2)):
        if sigma2[shell] < 0:
            sigma2[shell] = sigma2[shell - 1]
    return sigma2
