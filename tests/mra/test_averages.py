"""Halves, their correlation, filter and centre."""

import torch

from torchem.imaging.resolution import fourier_shell_correlation
from torchem.mra.averages import ClassSums, filtered, mass_centres, resolution_ring, ring_correlation, rolled


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_sums_of_even_and_odd_images() -> None:
    images, class_id = normal(7, 4, 4), torch.tensor([0, 2, 0, 0, 2, 2, 0])
    sums = ClassSums(3, 4, torch.device("cpu"))
    sums.add(images[:3], class_id[:3], torch.arange(3))
    sums.add(images[3:], class_id[3:], torch.arange(3, 7))
    assert sums.members.tolist() == [4, 0, 3] and sums.counts.tolist() == [[3, 0, 1], [1, 0, 2]]
    torch.testing.assert_close(sums.averages()[0], images[class_id == 0].mean(0))
    assert (sums.averages()[1] == 0).all()
    torch.testing.assert_close(sums.halves()[1, 2], images[[1, 5]].mean(0))


def test_ring_correlation() -> None:
    for box in (15, 16):
        a, b = normal(2, box, box), normal(3, box, box)[1:]
        b[0] += a[0]
        found = ring_correlation(a, b)
        for k in range(2):
            torch.testing.assert_close(found[k, 1:], fourier_shell_correlation(a[k], b[k])[1:])
        assert (ring_correlation(a, torch.zeros_like(b)) == 0).all()


def test_resolution_ring() -> None:
    frc = torch.tensor([[1, 0.9, 0.6, 0.3, 0.8], [1, 0.9, 0.9, 0.9, 0.9], [1, 0.1, 0.9, 0.9, 0.9]])
    assert resolution_ring(frc, 0.5).tolist() == [2, 4, 0]


def test_filter_keeps_what_is_sure_and_drops_noise() -> None:
    images = normal(2, 32, 32)
    sure = filtered(images, torch.ones(2, 17, dtype=torch.float64))
    rings = torch.fft.fftfreq(32, 1 / 32)
    inside = (rings[:, None] ** 2 + rings**2).sqrt() < 16.5
    expected = torch.fft.ifft2(torch.fft.fft2(images) * inside).real
    torch.testing.assert_close(sure, expected)
    frc = torch.zeros(2, 17, dtype=torch.float64)
    frc[:, :6] = 1
    power = torch.fft.fft2(filtered(images, frc)).abs()
    radius = (rings[:, None] ** 2 + rings**2).sqrt()
    assert float(power[:, radius > 7.5].max()) < 1e-9
    assert torch.isfinite(filtered(torch.zeros_like(images), torch.zeros_like(frc))).all()


def test_centre_of_mass() -> None:
    axis = torch.arange(33.0) - 16
    blob = torch.exp(-((axis - 4) ** 2 + (axis[:, None] + 3) ** 2) / 8)[None] + 7
    centre = mass_centres(blob, 13)
    assert centre.tolist() == [[4, -3]]
    moved = rolled(blob, centre)[0]
    assert divmod(int(moved.argmax()), 33) == (16, 16)
    assert mass_centres(torch.zeros(1, 33, 33), 13).tolist() == [[0, 0]]
