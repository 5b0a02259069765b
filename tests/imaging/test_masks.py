"""Soft masks: their profile, and what replaces the outside."""

import math

import pytest
import torch

from torchem.imaging.masks import apply_circular_mask, remove_outside, soft_sphere


def test_profile_is_one_then_cosine_then_zero():
    profile = soft_sphere(32, 6, 4, ndim=3, dtype=torch.float64)[16, 16, 16:]
    want = [1.0] * 7 + [0.5 + 0.5 * math.cos(math.pi * j / 4) for j in (1, 2, 3)] + [0.0] * 6
    torch.testing.assert_close(profile, torch.tensor(want, dtype=torch.float64))


def test_is_centred_and_isotropic():
    ball = soft_sphere(32, 9, 5)
    assert ball.shape == (32, 32, 32)
    for axis in range(3):
        # the first plane (−L/2) has no mate
        inner = ball.narrow(axis, 1, 31)
        torch.testing.assert_close(inner, inner.flip(axis))
        torch.testing.assert_close(ball, ball.transpose(axis, (axis + 1) % 3))
    torch.testing.assert_close(ball[16], soft_sphere(32, 9, 5, ndim=2))
    assert ball.double().sum().item() == pytest.approx(_volume(9, 5), rel=0.01)


def _volume(radius: float, edge: float) -> float:
    """Integral of 4πr² times the profile."""
    r = torch.linspace(0, radius + edge, 20001, dtype=torch.float64)
    profile = 0.5 + 0.5 * torch.cos(math.pi * ((r - radius) / edge).clamp(0, 1))
    return torch.trapezoid(4 * math.pi * r * r * profile, r).item()


def test_a_hard_edge_is_allowed():
    disc = soft_sphere(16, 4, 0, ndim=2)
    assert set(disc.unique().tolist()) == {0.0, 1.0}
    assert disc.sum().item() == 49  # lattice points with x² + y² <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_becomes_its_weighted_mean(dtype):
    generator = torch.Generator().manual_seed(1)
    levels = torch.tensor([0.0, 5.0, -2.0], dtype=dtype)[:, None, None]
    images = torch.randn(3, 24, 24, generator=generator, dtype=dtype) + levels
    mask = soft_sphere(24, 6, 5, ndim=2, dtype=dtype)
    masked = apply_circular_mask(images, 6, 5)
    assert masked.dtype == dtype
    for image, result in zip(images, masked, strict=True):
        background = (image * (1 - mask)).sum() / (1 - mask).sum()
        torch.testing.assert_close(result[mask == 0], background.expand(int((mask == 0).sum())))
        torch.testing.assert_close(result[mask == 1], image[mask == 1])
        torch.testing.assert_close(result, mask * image + (1 - mask) * background)
    constant = torch.full((1, 24, 24), 3.0)
    torch.testing.assert_close(apply_circular_mask(constant, 6), constant)


def test_given_noise_fills_the_outside():
    images, noise = torch.ones(2, 16, 16), torch.randn(2, 16, 16)
    masked = apply_circular_mask(images, 3, 2, fill=noise)
    outside = soft_sphere(16, 3, 2, ndim=2) == 0
    torch.testing.assert_close(masked[:, outside], noise[:, outside])
    assert (masked[:, 8, 8] == 1).all()


def test_map_outside_the_sphere_becomes_its_mean():
    volume = torch.randn(16, 16, 16, dtype=torch.float64) + 4
    result = remove_outside(volume, 8, 3)
    mask = soft_sphere(16, 8, 3, dtype=torch.float64)
    background = (volume * (1 - mask)).sum() / (1 - mask).sum()
    assert result[0, 0, 0].item() == pytest.approx(background.item())
    torch.testing.assert_close(result[mask == 1], volume[mask == 1])


def test_a_mask_wider_than_the_box_changes_nothing():
    images = torch.randn(2, 8, 8)
    torch.testing.assert_close(apply_circular_mask(images, 40), images)
