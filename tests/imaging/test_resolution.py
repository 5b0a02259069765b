"""Fourier shell correlation and its correction for masks; shells, filters, the resolution of a curve."""

import math

import pytest
import torch

from torchem.imaging.masks import soft_sphere
from torchem.imaging.resolution import (
    fourier_shell_correlation,
    phase_randomised_fsc,
    raised_cosine_lowpass,
    resolution_at,
    shell_average,
    shell_indices,
)


def noise(box: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(box, box, box, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("box", [16, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_correlates_with_itself(box, dtype):
    a = noise(box, 1, dtype)
    fsc = fourier_shell_correlation(a, a)
    assert fsc.dtype == dtype and fsc.shape == (box // 2 + 1,)
    torch.testing.assert_close(fsc, torch.ones_like(fsc))
    torch.testing.assert_close(fourier_shell_correlation(a, 3 * a), fsc)
    torch.testing.assert_close(fourier_shell_correlation(a, -a)[1:], -fsc[1:])
    assert fourier_shell_correlation(a, -a)[0] == 1


@pytest.mark.parametrize("box, ndim", [(12, 3), (11, 3), (16, 2)])
def test_sums_run_over_the_whole_transform(box, ndim):
    a = torch.randn((box,) * ndim, dtype=torch.float64)
    b = a + torch.randn((box,) * ndim, dtype=torch.float64)
    k = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64)
    radius = torch.stack(torch.meshgrid(*[k] * ndim, indexing="ij")).square().sum(0).sqrt()
    fa, fb = torch.fft.fftn(a), torch.fft.fftn(b)
    fsc, power = fourier_shell_correlation(a, b), shell_average(torch.fft.rfftn(a).abs() ** 2, ndim)
    for shell in range(1, box // 2 + 1):
        at = (radius >= shell - 0.5) & (radius < shell + 0.5)
        want = (fa * fb.conj()).real[at].sum() / (fa.abs()[at].square().sum() * fb.abs()[at].square().sum()).sqrt()
        assert fsc[shell].item() == pytest.approx(want.item(), abs=1e-12)
        assert power[shell].item() == pytest.approx(fa.abs()[at].square().mean().item())


def test_shells_count_every_point_once():
    shells, multiplicity = shell_indices(8)
    assert shells.shape == (8, 8, 5) and shells[0, 0, 3] == 3 and shells[-1, 0, 0] == 1
    # √(1 + 1 + 0) rounds to 1, √(2² + 1 + 1) = 2.449 to 2, √(4 + 4 + 4) = 3.46 to 3
    assert shells[1, 1, 0] == 1 and shells[1, 1, 2] == 2 and shells[2, 2, 2] == 3
    assert multiplicity.expand(8, 8, 5).sum() == 8**3


def test_independent_noise_does_not_correlate():
    fsc = fourier_shell_correlation(noise(32, 1), noise(32, 2))
    shells, multiplicity = shell_indices(32)
    count = torch.bincount(shells.flatten(), multiplicity.expand(32, 32, 17).flatten())[:17]
    # half of a shell's points are independent
    assert (fsc[1:].abs() < 4 / (count[1:] / 2).sqrt()).all()


def test_fsc_of_signal_and_noise_is_the_ratio_of_powers():
    signal = noise(48, 1)
    fsc = fourier_shell_correlation(signal + noise(48, 2), signal + noise(48, 3))
    assert fsc[8:].mean().item() == pytest.approx(0.5, abs=0.02)


def test_an_empty_map_correlates_with_nothing():
    fsc = fourier_shell_correlation(torch.zeros(8, 8, 8), noise(8, 1, torch.float32))
    assert fsc.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_maps_of_different_size_are_refused():
    with pytest.raises(ValueError, match="size"):
        fourier_shell_correlation(torch.zeros(8, 8, 8), torch.zeros(6, 6, 6))


def half_maps(box: int, cut: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Halves of a particle that agree up to a shell, with noise everywhere, and the particle's mask."""
    mask = soft_sphere(box, box / 6, 3, dtype=torch.float64)
    lowpass = raised_cosine_lowpass(box, 1.0, box / cut, 2, dtype=torch.float64)
    signal = torch.fft.irfftn(torch.fft.rfftn(noise(box, 1)) * lowpass, s=(box,) * 3) * 40 * mask
    return signal + noise(box, 2), signal + noise(box, 3), mask


def test_random_phases_take_away_what_the_mask_adds():
    box = 48
    half1, half2, _ = half_maps(box, 8)
    tight = soft_sphere(box, 6, 1, dtype=torch.float64)
    corrected, unmasked, masked, random = phase_randomised_fsc(half1, half2, tight, torch.Generator().manual_seed(5))
    start = int((unmasked < 0.8).nonzero()[0])
    # low resolution is the masked curve; further out the true correlation is nought
    torch.testing.assert_close(corrected[: start + 2], masked[: start + 2])
    torch.testing.assert_close(random[: start - 2], masked[: start - 2], atol=0.05, rtol=0)
    assert corrected[:6].min() > 0.9
    assert corrected[16:].mean().abs() < 0.1
    assert (corrected <= masked + 1e-12)[start + 2 :].logical_or(random[start + 2 :] < 0).all()


def test_correction_follows_the_formula():
    half1, half2, mask = half_maps(32, 6)
    corrected, unmasked, masked, random = phase_randomised_fsc(half1, half2, mask, torch.Generator().manual_seed(1))
    start = int((unmasked < 0.8).nonzero()[0])
    for shell in range(start + 2, 17):
        want = 0.0 if random[shell] > masked[shell] else (masked[shell] - random[shell]) / (1 - random[shell])
        assert corrected[shell].item() == pytest.approx(float(want))
    torch.testing.assert_close(unmasked, fourier_shell_correlation(half1, half2))
    torch.testing.assert_close(masked, fourier_shell_correlation(half1 * mask, half2 * mask))


def test_randomised_noise_has_no_correlation_even_masked():
    mask = soft_sphere(48, 14, 5, dtype=torch.float64)
    _, _, masked, random = phase_randomised_fsc(noise(48, 1), noise(48, 2), mask, torch.Generator().manual_seed(2))
    assert random[5:].mean().abs() < 0.03 and random[10:].abs().max() < 0.2
    assert masked[5:].mean().abs() < 0.03


def test_equal_halves_need_no_correction():
    a, mask = noise(16, 1), soft_sphere(16, 4, 3, dtype=torch.float64)
    corrected, *_ = phase_randomised_fsc(a, a, mask, torch.Generator().manual_seed(1))
    torch.testing.assert_close(corrected, torch.ones_like(corrected))


def test_one_seed_gives_one_curve():
    half1, half2, mask = half_maps(24, 5)
    curves = [phase_randomised_fsc(half1, half2, mask, torch.Generator().manual_seed(s))[3] for s in (1, 1, 2)]
    assert torch.equal(curves[0], curves[1]) and not torch.equal(curves[0], curves[2])


def test_resolution_is_the_last_shell_before_the_first_fall():
    fsc = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.7, 0.1])
    assert resolution_at(fsc, 0.5, 100, 1.5) == (2, 75.0)
    assert resolution_at(fsc, 0.143, 100, 1.5) == (4, 37.5)
    assert resolution_at(torch.ones(6), 0.143, 10, 2.0) == (5, 4.0)
    assert resolution_at(torch.tensor([1.0, 0.0]), 0.143, 10, 2.0) == (0, math.inf)


def test_lowpass_falls_about_its_resolution():
    # 40 Fourier pixels of 80 Å·px: 10 Å is pixel 8
    profile = raised_cosine_lowpass(40, 2.0, 10.0, dtype=torch.float64)[0, 0]
    assert profile[:8].tolist() == [1.0] * 8
    assert profile[8].item() == pytest.approx(0.5)
    assert profile[9:].abs().max().item() == 0.0
    wide = raised_cosine_lowpass(40, 2.0, 10.0, width=4, ndim=2)
    assert wide.shape == (40, 21)
    torch.testing.assert_close(wide[0, 6:11], torch.tensor([1.0, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.1464466, 0.0]))
