"""Transforms, the list of Fourier pixels, and shifts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.em import plain_em as em
from torchem.imaging.fourier import FourierPixels, half_transform, inverse_half_transform, round_half_away


def random_images(n: int, box: int, ndim: int = 2) -> Tensor:
    return torch.randn((n, *[box] * ndim), generator=torch.Generator().manual_seed(box), dtype=torch.float64)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("box", [12, 16])
def test_transform_and_back(box: int, ndim: int) -> None:
    images = random_images(2, box, ndim)
    transform = half_transform(images, ndim)
    assert transform.shape == (2, *[box] * (ndim - 1), box // 2 + 1)
    assert torch.allclose(inverse_half_transform(transform, box, ndim), images, atol=1e-12)
    # the origin of the transform is the mean, that of the image is pixel L//2
    assert torch.allclose(transform.flatten(1)[:, 0].real, images.flatten(1).mean(1))
    point = torch.zeros([box] * ndim)
    point[(box // 2,) * ndim] = 1
    assert torch.allclose(half_transform(point, ndim), torch.tensor(1.0 / box**ndim).to(torch.complex64))


@pytest.mark.parametrize("box", [4, 24, 30])
def test_pixels_are_those_of_the_half_plane(box: int) -> None:
    """Each image power is counted by pixels and mates as the whole transform has it, up to L/2."""
    pixels = FourierPixels.of(box)
    found = set(zip(pixels.kx.tolist(), pixels.ky.tolist(), strict=True))
    assert len(found) == len(pixels.kx)
    kx, ky, _ = em.half_plane(box)
    assert found == set(zip(kx.tolist(), ky.tolist(), strict=True))
    # no pixel is another's conjugate mate
    assert all((-x, -y) not in found for x, y in found if (x, y) != (0, 0))
    assert pixels.shell_counts().tolist() == np.bincount(em.half_plane(box)[2]).tolist()


@pytest.mark.parametrize("box", [24, 30])
def test_smaller_windows_are_prefixes(box: int) -> None:
    pixels = FourierPixels.of(box)
    for size in range(2, box + 1, 2):
        n = pixels.count(size)
        kx, ky, _ = em.half_plane(size)
        window = set(zip(kx.tolist(), ky.tolist(), strict=True))
        assert set(zip(pixels.kx[:n].tolist(), pixels.ky[:n].tolist(), strict=True)) == window
    assert pixels.count(0) == 1
    assert pixels.count(box) == len(pixels.kx)


def test_gather_takes_the_pixels_of_a_transform() -> None:
    box, (image,) = 16, random_images(1, 16)
    pixels = FourierPixels.of(box)
    whole = em.centred_fft(image.numpy())
    expected = torch.from_numpy(whole[pixels.ky.numpy(), pixels.kx.numpy()])
    assert torch.allclose(pixels.gather(half_transform(image)), expected, atol=1e-15)


def test_cropping_a_transform_keeps_its_scale() -> None:
    """The pixels of a window are the transform of the image resampled to that size."""
    (image,) = random_images(1, 24)
    pixels, window = FourierPixels.of(24), FourierPixels.of(16)
    n = window.count(14)
    transform = half_transform(image)
    small = inverse_half_transform(torch.cat((transform[:8], transform[-8:]))[:, :9], 16)
    assert torch.allclose(window.gather(half_transform(small))[:n], pixels.gather(transform)[:n], atol=1e-15)


def test_shell_sums() -> None:
    pixels = FourierPixels.of(24)
    values = torch.rand(pixels.count(18), dtype=torch.float64)
    sums = values @ pixels.shell_matrix(18)
    expected = np.bincount(pixels.shell[: len(values)].numpy(), values.numpy(), 13)
    assert torch.allclose(sums, torch.from_numpy(expected))


def test_shifts_move_images_and_compose() -> None:
    box, (image,) = 16, random_images(1, 16)
    pixels = FourierPixels.of(box)
    shifts = torch.tensor([[3.0, -2.0], [0.37, 1.61], [3.37, -0.39]], dtype=torch.float64)
    whole, other, both = pixels.phases(shifts, box)
    assert torch.allclose(whole * other, both, atol=1e-13)
    moved = torch.roll(image, (-2, 3), (0, 1))  # x is the last axis
    n = pixels.count(box - 2)  # at L/2 a shift is not defined
    before, after = (pixels.gather(half_transform(i))[:n] for i in (image, moved))
    assert torch.allclose(before * whole[:n], after)
    assert torch.equal(pixels.phases(shifts, 8), pixels.phases(shifts, box)[:, : pixels.count(8)])
    assert torch.equal(pixels.phases(torch.zeros(1, 2), box), torch.ones(1, len(pixels.kx)).to(torch.complex64))


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, 1), (1.5, 2), (2.5, 3), (-0.5, -1), (-2.5, -3), (2.4999, 2), (0.0, 0), (-1.4, -1)]
)
def test_halves_round_away_from_zero(value: float, expected: int) -> None:
    assert round_half_away(value) == expected
