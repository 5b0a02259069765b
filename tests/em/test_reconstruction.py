"""Maps from slices: what was projected comes back."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.em import plain_em as em
from torchem.em.reconstruction import Backprojection, fourier_shell_correlation_of_sums, prior_from_fsc
from torchem.imaging.fourier import FourierPixels
from torchem.imaging.masks import soft_sphere
from torchem.imaging.projection import fourier_volume, volume_radius2, volume_shape
from torchem.imaging.resolution import fourier_shell_correlation
from torchem.imaging.symmetry import operators, rotation_matrix
from torchem.ops.slices import backproject, project

BOX, PADDING = 24, 2


def random_matrices(n: int, ndim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand((3, n), generator=generator, dtype=torch.float64)
    tilt = torch.rad2deg(torch.acos(2 * u[1] - 1))
    flat = torch.zeros(n, dtype=torch.float64)
    return rotation_matrix(360 * u[0], tilt, 360 * u[2]) if ndim == 3 else rotation_matrix(flat, flat, 360 * u[2])


def truth(ndim: int) -> Tensor:
    """A ball of white noise: as much power in every shell."""
    noise = torch.randn((BOX,) * ndim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return noise * soft_sphere(BOX, 5.0, 3.0, ndim, torch.float64)


def summed(
    map_: Tensor, n: int, r_max: int, noise: float = 0.0, seed: int = 0, weight: float = 1.0, group: str = "C1"
) -> Backprojection:
    """n slices of a map, inserted where they were cut."""
    ndim = map_.ndim
    pixels = FourierPixels.of(BOX)
    p = pixels.count(2 * r_max)
    kx, ky = pixels.kx[:p].to(map_.dtype), pixels.ky[:p].to(map_.dtype)
    matrices = random_matrices(n, ndim, seed).to(map_.dtype)
    slices = project(fourier_volume(map_, r_max, PADDING), matrices, kx, ky, PADDING, r_max)
    generator = torch.Generator().manual_seed(seed + 1)
    slices += noise * torch.randn(slices.shape, generator=generator, dtype=slices.dtype)
    data = torch.zeros(volume_shape(r_max, PADDING, ndim), dtype=slices.dtype)
    weights = torch.zeros(data.shape, dtype=map_.dtype)
    share = torch.full(slices.shape, weight, dtype=map_.dtype)
    backproject(data, weights, weight * slices, share, matrices, kx, ky, PADDING, r_max)
    return Backprojection.of([(data, weights)], torch.from_numpy(operators(group)), PADDING, BOX)[0]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("r_max", [9, 12])
def test_projecting_and_reconstructing_gives_the_map_back(ndim: int, dtype: torch.dtype, r_max: int) -> None:
    map_ = truth(ndim)
    found = summed(map_.to(dtype), 600, r_max).reconstruct().double()
    fsc = fourier_shell_correlation(found, map_)
    assert float(fsc[: r_max - 1].min()) > 0.99
    # and on the same scale
    transforms = [np.abs(np.fft.fftn(m.numpy())).ravel() for m in (found, map_)]
    inside = shells(ndim) < r_max - 1
    assert np.linalg.norm(transforms[0][inside]) == pytest.approx(np.linalg.norm(transforms[1][inside]), rel=0.03)


def test_symmetry_fills_what_few_slices_leave_empty() -> None:
    # the four copies of a map under D2 are mirrored axes about the origin
    inner = truth(3)[1:, 1:, 1:]
    copies = inner + inner.flip(1, 2) + inner.flip(0, 1) + inner.flip(0, 2)
    symmetric = torch.zeros((BOX,) * 3, dtype=torch.float64)
    symmetric[1:, 1:, 1:] = copies
    few, filled = (summed(symmetric, 12, 9, group=name).reconstruct() for name in ("C1", "D2"))
    fsc = [fourier_shell_correlation(m, symmetric)[4:9].mean() for m in (few, filled)]
    assert float(1 - fsc[1]) < 0.5 * float(1 - fsc[0])
    inner = filled[1:, 1:, 1:]
    assert torch.allclose(inner, inner.flip(1, 2), atol=1e-6 * float(inner.abs().max()))


def test_noise_power_is_that_of_the_reconstruction() -> None:
    """Slices weighted by 1/sigma² give a map whose shells vary by what is predicted."""
    noise, weight = 0.02, 1 / 0.02**2  # of a real or imaginary component, nearly
    sums = [summed(0 * truth(3), 300, 9, noise * 2**0.5, seed, weight) for seed in range(6)]
    predicted = sums[0].noise_power()
    assert float(predicted[10:].abs().max()) == 0
    powers = []
    for sum_ in sums:
        # in Fourier space, voxel by voxel: data / weight where there is weight
        radius = volume_radius2(tuple(sum_.weight.shape), sum_.weight.device).sqrt() / PADDING
        dense = sum_.weight > 0.02 * sum_.weight.max()
        shell = (radius > 2.5) & (radius < 8.5) & dense
        powers.append(float((sum_.data[shell].abs().square() / sum_.weight[shell]).mean()))
    # E|data|² = 2 sigma² weight² summed over shares: between that of a whole slice and that of shared corners
    assert 0.2 < np.mean(powers) / 2 < 1.0
    doubled = summed(0 * truth(3), 300, 9, noise, 0, 2 * weight).noise_power()
    assert torch.allclose(predicted[:9], 2 * doubled[:9])


def test_fsc_of_sums() -> None:
    map_ = truth(3)
    one, other = (summed(map_, 300, 9, 0.01, seed) for seed in (0, 1))
    same = fourier_shell_correlation_of_sums(one, one)
    assert torch.allclose(same[:10], torch.ones(10).double())
    assert not same[10:].any()
    fsc = fourier_shell_correlation_of_sums(one, other)
    assert torch.equal(fsc, fourier_shell_correlation_of_sums(other, one))
    assert float(fsc[0]) == 1
    assert float(fsc[2]) > float(fsc[8])
    # as the maps say, but that they are masked and interpolated
    maps = fourier_shell_correlation(one.reconstruct(), other.reconstruct())
    assert float((fsc - maps)[:9].abs().max()) < 0.1


def test_prior_from_fsc() -> None:
    fsc = torch.tensor([1.0, 0.5, 1 / 7, 0.0, -0.3], dtype=torch.float64)
    noise = torch.tensor([2.0, 2.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    ratio, tau2 = prior_from_fsc(fsc, noise, 1.0, joined=False)
    assert ratio.tolist() == pytest.approx([999, 1, 1 / 6, 0.001 / 0.999, 0.001 / 0.999])
    assert torch.allclose(tau2, ratio * noise)
    # both halves in one map: an FSC of 1/7 is what a ratio of 1 needs
    joined, _ = prior_from_fsc(fsc, noise, 1.0, joined=True)
    assert float(joined[2]) == pytest.approx(1.0)
    doubled, tau2_doubled = prior_from_fsc(fsc, noise, 2.0, joined=False)
    assert torch.allclose(doubled, 2 * ratio)
    assert torch.allclose(tau2_doubled, 2 * tau2)


def test_the_prior_damps_from_shell_five_on() -> None:
    map_ = truth(3)
    sum_ = summed(map_, 400, 9)
    free = sum_.reconstruct()
    strict = sum_.reconstruct(torch.full((BOX // 2 + 1,), 1e-12, dtype=torch.float64))
    filtered = fourier_shell_correlation(free, strict)
    assert float(filtered[:4].min()) > 0.99
    power = [em.shell_sums(np.abs(np.fft.fftn(m.numpy()).ravel()) ** 2, shells(3), 13) for m in (free, strict)]
    assert (power[1][6:9] < 0.05 * power[0][6:9]).all()
    wide = sum_.reconstruct(torch.full((BOX // 2 + 1,), 1e12, dtype=torch.float64))
    assert torch.allclose(wide, free, atol=1e-9)


def shells(ndim: int) -> np.ndarray:
    """Shell of each value of a whole transform, flat."""
    k = np.fft.fftfreq(BOX) * BOX
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*[k] * ndim)))
    return np.floor(radius + 0.5).astype(int).ravel()


def test_coverage() -> None:
    sum_ = summed(truth(3), 400, 9)
    weight_mean = 1 / sum_.noise_power()[:9]
    tau2 = torch.full((BOX // 2 + 1,), 2 * float(1 / weight_mean.min()), dtype=torch.float64)
    share = sum_.coverage(tau2, 1.0)
    assert bool(((share >= 0) & (share <= 1)).all())
    assert float(share[1]) == 1
    nothing = sum_.coverage(torch.zeros_like(tau2), 1.0)
    assert not nothing.any()
    everything = sum_.coverage(tau2 * 1e12, 1.0)
    assert float(everything[1:8].min()) > 0.9
