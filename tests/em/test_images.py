"""Particle images on their way into the E-step, and the first noise spectra."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.em import plain_em as em
from torchem.data.particles import Particles
from torchem.em import images as images_module
from torchem.em.images import (
    ImageBatch,
    ImageGeometry,
    ParticleImages,
    estimate_noise,
    prepare_images,
    spectral_noise,
    translate,
)
from torchem.imaging.ctf import Optics, aberration_phase, ctf, mtf
from torchem.imaging.fourier import FourierPixels, half_transform, inverse_half_transform

BOX, PIXEL = 24, 4.0
OPTICS = Optics("one", 300.0, 2.7, 0.1, PIXEL, BOX)
CPU = torch.device("cpu")
PARAMETERS = torch.tensor([[12000.0, 10500, 30, 0, 20, 0.9], [7000, 7000, 0, 45, 0, 1]], dtype=torch.float64)


def white(n: int, box: int = BOX, seed: int = 0) -> Tensor:
    return torch.randn((n, box, box), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepared(images: Tensor, optics: Optics = OPTICS, size: int = 18, **changes: object) -> ImageBatch:
    n = len(images)
    geometry = ImageGeometry.of(optics, size, BOX, PIXEL, images.dtype, CPU)
    values = {
        "particles": torch.arange(n), "ctf_parameters": PARAMETERS[:n], "norm_factor": torch.ones(n),
        "offset_angst": torch.zeros((n, 2), dtype=torch.float64), "particle_diameter": 70.0, "noise_spectrum": None,
        "seed": 1,
    }  # fmt: skip
    return prepare_images(images, geometry=geometry, **(values | changes))


def with_transform(images: Tensor, factor: Tensor, box: int = BOX) -> Tensor:
    """Images whose Fourier pixels are multiplied; what has no pixel of its own is lost."""
    pixels = FourierPixels.of(box)
    transform = half_transform(images)
    values = pixels.gather(transform) * factor
    out = torch.zeros_like(transform)
    out[:, pixels.ky % box, pixels.kx] = values
    mates = (pixels.kx == 0) & (pixels.ky > 0)
    out[:, -pixels.ky[mates], 0] = values[:, mates].conj()
    return inverse_half_transform(out, box)


@pytest.mark.parametrize("size", [10, 18, 24])
def test_agrees_with_the_plain_preparation(size: int) -> None:
    problem = em.example(2, 1, n=6)
    particles, model = problem.halves[0], problem.models[0]
    n = len(particles.images)
    geometry = ImageGeometry.of(OPTICS, size, BOX, PIXEL, torch.float64, CPU)
    batch = prepare_images(
        torch.from_numpy(particles.images), torch.arange(n), geometry, torch.from_numpy(particles.ctf_parameters),
        model.norm_average / torch.from_numpy(particles.norm), torch.from_numpy(particles.origins_angst),
        problem.settings.particle_diameter, None, 0, cross_correlation=True,
    )  # fmt: skip
    kx, ky = (k[: geometry.n_pixels].numpy() for k in (geometry.pixels.kx, geometry.pixels.ky))
    for i in range(n):
        masked, unmasked, shift = em.prepare(particles, i, model, problem.optics, problem.settings)
        assert np.abs(batch.masked[i].numpy() - masked[ky, kx]).max() < 1e-14
        assert np.abs(batch.unmasked[i].numpy() - unmasked[ky, kx]).max() < 1e-14
        assert np.allclose(batch.offset_angst[i], shift * PIXEL)
        modulation = em.ctf(problem.optics, particles.ctf_parameters[i], kx, ky, BOX)
        assert np.abs(batch.ctf[i].numpy() - modulation).max() < 1e-12
        assert torch.equal(batch.ctf, batch.back_ctf)
        # inside the window its own pixels, beyond it whole shells
        kx0, ky0, shell0 = em.half_plane(BOX)
        counted = (shell0 > size // 2) | ((shell0 < size // 2) | (ky0 > -(size // 2)))
        power = np.abs(masked[ky0, kx0]) ** 2 * counted
        assert np.allclose(batch.power[i], em.shell_sums(power, shell0, BOX // 2 + 1), rtol=1e-12)
        wx, wy, _ = em.window(size)
        assert float(batch.window_power[i]) == pytest.approx((np.abs(masked[wy, wx]) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize(("offset", "pixels"), [(1.99, 0), (2.0, 1), (-2.0, -1), (5.9, 1), (6.0, 2), (-9.0, -2)])
def test_offsets_round_to_whole_pixels_away_from_zero(offset: float, pixels: int) -> None:
    images = white(1)
    batch = prepared(images, offset_angst=torch.tensor([[offset, 0.0]], dtype=torch.float64))
    assert batch.offset_angst.tolist() == [[pixels * PIXEL, 0.0]]
    still = prepared(translate(images, torch.tensor([[pixels, 0]])))
    assert torch.equal(batch.masked, still.masked)


def test_translation_lets_zeros_in() -> None:
    images = white(3)
    shifts = torch.tensor([[3, -2], [0, 0], [-30, 1]])
    found = translate(images, shifts)
    for image, moved, (dx, dy) in zip(images, found, shifts.tolist(), strict=True):
        assert np.array_equal(moved.numpy(), em.shift_image(image.numpy(), dx, dy))
    assert not found[2].any()
    assert torch.equal(found[1], images[1])
    # two shifts one after the other are one shift, where nothing was lost
    twice = translate(translate(images, shifts[:1].expand(3, 2)), torch.tensor([[-1, 4]]).expand(3, 2))
    once = translate(images, torch.tensor([[2, 2]]).expand(3, 2))
    assert torch.equal(twice[:, 4:-4, 4:-4], once[:, 4:-4, 4:-4])


def test_the_norm_factor_scales_the_image() -> None:
    images = white(2)
    one, two = prepared(images), prepared(images, norm_factor=torch.tensor([2.0, 0.5]))
    assert torch.allclose(two.masked, one.masked * torch.tensor([[2.0], [0.5]]))
    assert torch.allclose(two.power, one.power * torch.tensor([[4.0], [0.25]]))


def test_uncorrected_data_have_no_ctf() -> None:
    batch = prepared(white(2), ctf_parameters=None)
    assert bool((batch.ctf == 1).all())
    assert bool((batch.back_ctf == 1).all())


def test_premultiplied_images_give_the_same_sums() -> None:
    """Multiplied by their CTF beforehand, images are back-projected with the same numerator and denominator."""
    images = white(2)
    pixels = FourierPixels.of(BOX)
    multiplied = with_transform(images, ctf(OPTICS, PARAMETERS, pixels.kx, pixels.ky))
    plain = prepared(images)
    batch = prepared(multiplied, replace(OPTICS, premultiplied=True))
    assert torch.allclose(batch.unmasked * batch.back_ctf, plain.unmasked * plain.back_ctf, atol=1e-12)
    assert torch.allclose(batch.ctf * batch.back_ctf, plain.ctf * plain.back_ctf, atol=1e-12)
    # a projection is compared after both of its CTFs
    assert torch.allclose(batch.ctf, plain.ctf.square(), atol=1e-12)


def test_beam_tilt_is_undone() -> None:
    images = white(2)
    tilted = replace(OPTICS, beam_tilt=(1.2, -0.7))
    pixels = FourierPixels.of(BOX)
    phase = aberration_phase(tilted, pixels.kx, pixels.ky)
    moved = with_transform(images, phase)
    found, expected = prepared(moved, tilted), prepared(images)
    assert torch.allclose(found.unmasked, expected.unmasked, atol=1e-12)
    assert not torch.allclose(prepared(moved).unmasked, expected.unmasked, atol=1e-3)
    # the power is that of the image as it is
    assert torch.allclose(found.power, prepared(moved).power)


def test_detector_response_is_undone() -> None:
    images = white(2)
    detector = replace(OPTICS, mtf=((0.0, 0.25, 0.5), (1.0, 0.7, 0.3)), original_pixel_size=2.0)
    pixels = FourierPixels.of(BOX)
    found = prepared(with_transform(images, mtf(detector, pixels.kx, pixels.ky)), detector)
    assert torch.allclose(found.unmasked, prepared(images).unmasked, atol=1e-12)
    # residuals in the window are of the images as they are compared
    n = found.geometry.n_pixels
    by_shell = found.masked.abs().square() @ pixels.shell_matrix(18)
    assert n == pixels.count(18)
    assert torch.allclose(found.power[:, :10], by_shell[:, :10])


def test_magnification_matrix_moves_the_pixels() -> None:
    stretched = replace(OPTICS, magnification=(1.02, 0.0, 0.01, 0.98))
    geometry = ImageGeometry.of(stretched, 18, BOX, PIXEL, torch.float64, CPU)
    kx, ky = (k[: geometry.n_pixels].double() for k in (geometry.pixels.kx, geometry.pixels.ky))
    assert torch.allclose(geometry.kx, 1.02 * kx)
    assert torch.allclose(geometry.ky, 0.01 * kx + 0.98 * ky)


@pytest.mark.parametrize(("box", "pixel", "own"), [(24, 4.0, 18), (48, 2.0, 18), (36, 4.0, 28), (20, 4.0, 16)])
def test_windows_of_other_pixel_and_box(box: int, pixel: float, own: int) -> None:
    """A group's window reaches the same resolution, and its pixels lie where the reference has that frequency."""
    geometry = ImageGeometry.of(replace(OPTICS, box=box, pixel_size=pixel), 18, BOX, PIXEL, torch.float64, CPU)
    assert geometry.size == own
    kx = geometry.pixels.kx[: geometry.n_pixels].double()
    assert torch.allclose(geometry.kx / (BOX * PIXEL), kx / (box * pixel))
    assert geometry.count(18) == geometry.n_pixels
    assert geometry.count(10) <= geometry.n_pixels
    spectrum = torch.arange(BOX // 2 + 1, dtype=torch.float64)
    expected = geometry.pixels.shell[: geometry.n_pixels] / (box * pixel) * BOX * PIXEL
    assert float((spectrum[geometry.shell] - expected.clamp(max=BOX // 2)).abs().max()) <= 0.5


def test_an_image_twice_as_fine_weighs_as_much() -> None:
    """The same picture in another pixel size is compared on the reference's scale."""

    def picture(box: int, pixel: float) -> Tensor:
        axis = (torch.arange(box, dtype=torch.float64) - box // 2) * pixel
        return torch.exp(-((axis[:, None] - 6) ** 2 + (axis + 9) ** 2) / 200)[None]

    coarse = prepared(picture(24, 4.0), ctf_parameters=None)
    for box, pixel in ((48, 2.0), (32, 3.0)):
        fine = prepared(picture(box, pixel), replace(OPTICS, box=box, pixel_size=pixel), ctf_parameters=None)
        assert torch.allclose(fine.unmasked / fine.ctf, coarse.unmasked, atol=1e-6)
        assert torch.allclose(fine.geometry.kx, coarse.geometry.kx)
    wider = prepared(picture(48, 4.0), replace(OPTICS, box=48), ctf_parameters=None)
    found = {
        (float(x), float(y)): complex(v)
        for x, y, v in zip(wider.geometry.kx, wider.geometry.ky, (wider.unmasked / wider.ctf)[0], strict=True)
    }
    for x, y, v in zip(coarse.geometry.kx, coarse.geometry.ky, coarse.unmasked[0], strict=True):
        if x**2 + y**2 < 80:  # both windows hold it
            assert abs(found[float(x), float(y)] - complex(v)) < 1e-5


def test_noise_outside_the_mask() -> None:
    spectrum = torch.linspace(2.0, 0.5, BOX // 2 + 1, dtype=torch.float64) / BOX**2
    images = white(2)
    batch = prepared(images, noise_spectrum=spectrum, size=BOX)
    other = prepared(images, noise_spectrum=spectrum, size=BOX, seed=2)
    assert torch.equal(batch.unmasked, other.unmasked)
    assert not torch.allclose(batch.masked, other.masked)
    # the filling is that of the particle, whatever its place in a batch
    alone = prepared(
        images[1:], noise_spectrum=spectrum, size=BOX, particles=torch.tensor([1]), ctf_parameters=PARAMETERS[1:]
    )
    assert torch.allclose(alone.masked[0], batch.masked[1], atol=1e-14)


def test_spectral_noise_has_the_spectrum_and_is_gaussian() -> None:
    spectrum = torch.linspace(3.0, 0.2, BOX // 2 + 1, dtype=torch.float64)
    noise = spectral_noise(torch.arange(400), spectrum, BOX, 5)
    assert noise.shape == (400, BOX, BOX)
    pixels = FourierPixels.of(BOX)
    inner = pixels.count(BOX - 2)
    values = pixels.gather(half_transform(noise))[:, 1:inner]
    shell = pixels.shell[1:inner]
    for part in (values.real, values.imag):
        variance = part.square().mean(0)
        ratio = torch.stack([variance[shell == s].mean() / spectrum[s] for s in range(1, BOX // 2)])
        assert float((ratio - 1).abs().max()) < 0.15
        kurtosis = (part / variance.sqrt()).pow(4).mean()
        assert float(kurtosis) == pytest.approx(3.0, abs=0.15)
    mean = values.mean(0).abs() / spectrum[shell].sqrt()
    assert float(mean.max()) < 0.25
    # pixels and particles are independent
    correlation = torch.corrcoef(values.real[:, :50].T) - torch.eye(50)
    assert float(correlation.abs().max()) < 0.25


def test_spectral_noise_depends_on_particle_and_seed_only() -> None:
    spectrum = torch.ones(BOX // 2 + 1, dtype=torch.float64)
    together = spectral_noise(torch.tensor([7, 0, 123456]), spectrum, BOX, 3)
    for i, particle in enumerate((7, 0, 123456)):
        assert torch.allclose(spectral_noise(torch.tensor([particle]), spectrum, BOX, 3)[0], together[i], atol=1e-14)
    assert not torch.allclose(together[0], together[1])
    assert not torch.allclose(spectral_noise(torch.tensor([7]), spectrum, BOX, 4)[0], together[0])


class Stack:
    """What :class:`ParticleImages` asks of particles."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self._images[torch.from_numpy(indices)].numpy()


def first_noise(images: Tensor, particle_diameter: float | None, n: int | None = None) -> Tensor:
    source = ParticleImages(Stack(images), images.dtype, CPU, keep=False)
    origins = torch.zeros((len(images), 2), dtype=torch.float64)
    return estimate_noise(source, np.arange(n or len(images)), OPTICS, particle_diameter, origins)


def test_first_noise_spectrum_of_white_noise_is_flat() -> None:
    signal = torch.exp(-((torch.arange(BOX) - BOX / 2) ** 2) / 20.0).double()
    images = white(600) * 1.5 + 8 * signal[:, None] * signal
    found = first_noise(images, None)
    # variance 2.25 a pixel, shared by real and imaginary parts; the picture that all have in common is taken out
    expected = 2.25 / (2 * BOX**2)
    assert float((found[1:] / expected - 1).abs().max()) < 0.08


@pytest.mark.parametrize("diameter", [None, 60.0])
def test_first_noise_spectrum_agrees_with_the_plain_one(diameter: float | None) -> None:
    images = white(20)
    # without a mask the plain one gets a circle that holds the whole image
    expected = em.initial_noise(images.numpy(), em.Optics(300.0, 2.7, 0.1, PIXEL), diameter or 1e3)
    assert np.allclose(first_noise(images, diameter), expected, rtol=1e-12)


def test_first_noise_spectrum_is_never_negative() -> None:
    same = white(1).expand(5, -1, -1) + 1e-9 * white(5)
    found = first_noise(same.contiguous(), None)
    assert float(found[1:].min()) >= min(float(found[0]), 0) or float(found.min()) > -1e-15
    assert bool(torch.isfinite(found).all())


def test_first_noise_spectrum_takes_a_thousand_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "NOISE_PARTICLES", 30)
    images = white(40)
    assert torch.equal(first_noise(images, None), first_noise(images[:30], None))


@pytest.mark.parametrize("keep", [False, True])
def test_unusable_particles_are_named_and_left_out(
    keep: bool, small_set: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(_optics: object, _particles: object, images: np.ndarray) -> None:
        images[3] = 7.0
        images[5, 2, 2] = math.nan
        images[8, 0, 0] = math.inf

    particles = Particles.read(small_set(spoil))
    source = ParticleImages(particles, torch.float32, CPU, keep)
    with caplog.at_level(logging.WARNING):
        first, indices = source.read(torch.arange(6))
        second, later = source.read(torch.arange(6, 12))
        again, _ = source.read(torch.arange(6))
        # a batch of nothing else
        nothing, none = source.read(torch.tensor([3, 5]))
    assert indices.tolist() == [0, 1, 2, 4]
    assert later.tolist() == [6, 7, 9, 10, 11]
    assert first.shape == (4, 16, 16)
    assert torch.equal(first, again)
    assert torch.equal(first[3], torch.from_numpy(particles.images(np.array([4]))[0]))
    assert bool(torch.isfinite(second).all())
    assert len(nothing) == len(none) == 0
    assert source.unusable == {3, 5, 8}
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3
    assert "000004@particles.mrcs" in messages[0]
    assert "particle 4 " in messages[0]


def test_images_are_read_once_if_there_is_room(small_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    particles = Particles.read(small_set())
    calls: list[int] = []
    read = particles.images
    monkeypatch.setattr(particles, "images", lambda indices: calls.append(len(indices)) or read(indices))
    for keep, expected in ((True, 1), (False, 3)):
        calls.clear()
        source = ParticleImages(particles, torch.float64, CPU, keep)
        for _ in range(3):
            images, _ = source.read(torch.arange(4, 9))
        assert len(calls) == expected
        assert images.dtype == torch.float64
