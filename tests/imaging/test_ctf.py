"""The CTF at known points, against a formula written anew, and RELION's aberration conventions."""

import math

import pytest
import torch

from torchem.errors import InputError
from torchem.imaging.ctf import Optics, aberration_phase, ctf, electron_wavelength, mtf


def optics(**changes) -> Optics:
    constants = dict(name="a", voltage=300.0, cs=2.7, amplitude_contrast=0.1, pixel_size=1.5, box=64)
    return Optics(**(constants | changes))


def half_plane(box: int) -> tuple[torch.Tensor, torch.Tensor]:
    ky, kx = torch.meshgrid(torch.arange(-box // 2, box // 2), torch.arange(box // 2 + 1), indexing="ij")
    return kx.reshape(-1), ky.reshape(-1)


def particle(u=15000.0, v=15000.0, angle=0.0, phase=0.0, b=0.0, scale=1.0, dtype=torch.float64):
    return torch.tensor([[u, v, angle, phase, b, scale]], dtype=dtype)


@pytest.mark.parametrize("voltage, wavelength", [(300, 0.0196875), (200, 0.0250793), (100, 0.0370144)])
def test_wavelength_is_de_broglies(voltage, wavelength):
    assert electron_wavelength(voltage) == pytest.approx(wavelength, rel=2e-5)


def test_agrees_with_the_formula_of_defocus_at_an_angle():
    group = optics(cs=2.0, amplitude_contrast=0.07)
    rows = torch.tensor(
        [[12000, 11000, 30, 0, 0, 1], [30000, 33000, -70, 90, 120, 0.8], [-5000, -4000, 170, 20, 60, 1.3]],
        dtype=torch.float64,
    )
    kx, ky = half_plane(64)
    got = ctf(group, rows, kx, ky)
    x, y = kx.double() / (64 * 1.5), ky.double() / (64 * 1.5)
    wavelength = 12.2643247 / math.sqrt(300e3 * (1 + 300e3 * 0.978466e-6))
    for row, values in zip(rows.tolist(), got, strict=True):
        u, v, angle, phase, b, scale = row
        k2 = x**2 + y**2
        defocus = (u + v) / 2 + (u - v) / 2 * torch.cos(2 * (torch.atan2(y, x) - math.radians(angle)))
        chi = math.pi * wavelength * defocus * k2 - math.pi / 2 * 2.0e7 * wavelength**3 * k2**2
        chi += math.radians(phase) + math.atan(0.07 / math.sqrt(1 - 0.07**2))
        torch.testing.assert_close(values, scale * torch.exp(-b * k2 / 4) * torch.sin(chi), atol=1e-9, rtol=0)


def test_at_the_origin_only_amplitude_contrast_remains():
    origin = torch.zeros(1, dtype=torch.int64)
    assert ctf(optics(), particle(), origin, origin).item() == pytest.approx(0.1, abs=1e-12)
    # a phase plate of 90 degrees turns the sine into a cosine
    turned = ctf(optics(), particle(phase=90), origin, origin).item()
    assert turned == pytest.approx(math.sqrt(1 - 0.01), abs=1e-12)


def test_without_cs_the_zeros_lie_at_whole_turns_of_defocus():
    group = optics(cs=0.0, amplitude_contrast=0.0)
    k = 20
    frequency2 = (k / (64 * 1.5)) ** 2
    for turn in (1, 2, 5):
        defocus = turn / (electron_wavelength(300) * frequency2)
        value = ctf(group, particle(defocus, defocus), torch.tensor([k]), torch.tensor([0])).item()
        assert abs(value) < 1e-7
        peak = ctf(group, particle(defocus - 0.5 / (electron_wavelength(300) * frequency2), 0), *_axis(k)).item()
        assert abs(peak) == pytest.approx(1, abs=1e-9)


def _axis(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([k]), torch.tensor([0])


def test_defocus_u_acts_along_its_angle():
    group, k = optics(), 15
    along = ctf(group, particle(20000, 10000, 90), torch.tensor([0]), torch.tensor([k]))
    across = ctf(group, particle(20000, 10000, 90), torch.tensor([k]), torch.tensor([0]))
    round_u = ctf(group, particle(20000, 20000), *_axis(k))
    round_v = ctf(group, particle(10000, 10000), *_axis(k))
    torch.testing.assert_close(along, round_u)
    torch.testing.assert_close(across, round_v)


def test_values_are_floored_with_their_sign():
    group = optics(cs=0.0, amplitude_contrast=0.0)
    origin = torch.zeros(1, dtype=torch.int64)
    assert ctf(group, particle(), origin, origin).item() == 1e-8
    damped = ctf(group, particle(15000, 15000, b=1e5, scale=-1), *_axis(30))
    assert abs(damped.item()) == 1e-8
    kx, ky = half_plane(64)
    assert ctf(optics(), particle(b=1e4), kx, ky).abs().min() >= 1e-8


def test_phase_flipped_data_see_the_absolute_value():
    kx, ky = half_plane(64)
    plain = ctf(optics(), particle(), kx, ky)
    assert (plain < 0).any()
    torch.testing.assert_close(ctf(optics(phase_flipped=True), particle(), kx, ky), plain.abs())


def test_single_precision_stays_near_double():
    kx, ky = half_plane(64)
    rows = particle(30000, 28000, 25, 40, 50)
    double, single = ctf(optics(), rows, kx, ky), ctf(optics(), rows.float(), kx, ky)
    assert single.dtype == torch.float32
    assert (double - single).abs().max() < 1e-4


def test_constant_even_term_is_a_phase_shift_and_quadratic_one_is_defocus():
    kx, ky = half_plane(64)
    shifted = ctf(optics(even_zernike=(0.3,)), particle(), kx, ky)
    torch.testing.assert_close(shifted, ctf(optics(), particle(phase=-math.degrees(0.3)), kx, ky))
    # Z(0, 2) = 2k² − 1 is the third coefficient (m = −2, 0, 2 follow the constant)
    c = -math.pi * electron_wavelength(300) * 800 / 2
    rows = particle(15000 + 800, 15000 + 800, phase=-math.degrees(-c))
    torch.testing.assert_close(ctf(optics(even_zernike=(0, 0, c)), particle(), kx, ky), ctf(optics(), rows, kx, ky))
    # Z(4, 4, m = 4) leaves the axes' mean alone: equal along x and y, opposite on the diagonals
    four = optics(even_zernike=(0,) * 8 + (500.0,))
    k = 12
    for x, y, sign in ((k, 0, 1), (0, k, 1), (k, k, -1), (k, -k, -1)):
        at = torch.tensor([x]), torch.tensor([y])
        phase = 500 * ((x * x + y * y) / (64 * 1.5) ** 2) ** 2 * sign
        want = ctf(optics(), particle(phase=-math.degrees(phase)), *at)
        torch.testing.assert_close(ctf(four, particle(), *at), want)


def test_odd_terms_shift_and_tilt():
    kx, ky = half_plane(64)
    assert aberration_phase(optics(), kx, ky) is None
    x, y = kx.double() / 96, ky.double() / 96
    # the first two coefficients multiply y and x: a shift of the image, as far as c/2π Å
    shift = aberration_phase(optics(odd_zernike=(0.7, -0.4)), kx, ky)
    torch.testing.assert_close(shift, torch.exp(1j * (0.7 * y - 0.4 * x)))
    tilt = aberration_phase(optics(beam_tilt=(0.3, -0.2)), kx, ky)
    scale = 2 * math.pi * 2.7e7 * electron_wavelength(300) ** 2 * 1e-3
    want = -scale * (x * x + y * y) * (0.3 * x - 0.2 * y)
    torch.testing.assert_close(tilt, torch.exp(1j * want))
    # the coma polynomials (3r² − 2)y and (3r² − 2)x, with their linear parts taken out, are beam tilt
    z = (-scale * -0.2 / 3, -scale * 0.3 / 3)
    coma = optics(odd_zernike=(2 * z[0], 2 * z[1], 0, z[0], z[1], 0))
    torch.testing.assert_close(aberration_phase(coma, kx, ky), tilt)
    # beam tilt replaces those two
    both = optics(beam_tilt=(0.3, -0.2), odd_zernike=(0, 0, 0, 5.0, 6.0, 0))
    torch.testing.assert_close(aberration_phase(both, kx, ky), tilt)


def test_odd_phase_is_odd_and_even_phase_even():
    kx, ky = half_plane(64)
    group = optics(odd_zernike=tuple(0.1 * i for i in range(12)), even_zernike=tuple(0.1 * i for i in range(9)))
    forth, back = aberration_phase(group, kx, ky), aberration_phase(group, -kx, -ky)
    torch.testing.assert_close(forth, back.conj())
    torch.testing.assert_close(ctf(group, particle(), kx, ky), ctf(group, particle(), -kx, -ky))


def test_magnification_acts_on_the_frequency():
    kx, ky = half_plane(64)
    # 2 % along x and −1 % along y: the same as another frequency on either axis
    group = optics(magnification=(1.02, 0.0, 0.0, 0.99), beam_tilt=(0.2, 0.0))
    wide = optics(pixel_size=1.5 / 1.02, beam_tilt=(0.2, 0.0))
    on_x = ky == 0
    torch.testing.assert_close(
        ctf(group, particle(), kx, ky)[:, on_x], ctf(wide, particle(), kx, ky)[:, on_x], atol=1e-10, rtol=0
    )
    torch.testing.assert_close(aberration_phase(group, kx, ky)[on_x], aberration_phase(wide, kx, ky)[on_x])
    # a rotation turns astigmatism
    c, s = math.cos(0.4), math.sin(0.4)
    turned = ctf(optics(magnification=(c, -s, s, c)), particle(20000, 12000, 10), kx, ky)
    torch.testing.assert_close(turned, ctf(optics(), particle(20000, 12000, 10 - math.degrees(0.4)), kx, ky))


def test_detector_response_is_read_in_the_cameras_frequency():
    kx, ky = half_plane(64)
    assert mtf(optics(), kx, ky) is None
    # original pixel 0.75 Å: the images' Nyquist (2 px of 1.5 Å) is a quarter of 1/px of the camera
    group = optics(mtf=((0.0, 0.25, 0.5), (1.0, 0.6, 0.2)), original_pixel_size=0.75)
    values = mtf(group, torch.tensor([0, 16, 32]), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(values, torch.tensor([1.0, 0.8, 0.6], dtype=torch.float64))
    short = optics(mtf=((0.1, 0.2), (0.9, 0.5)), original_pixel_size=0.75)
    torch.testing.assert_close(
        mtf(short, torch.tensor([0, 32]), torch.tensor([0, 0])), torch.tensor([0.9, 0.5], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(voltage=0), "rlnVoltage"),
        (dict(amplitude_contrast=1.2), "rlnAmplitudeContrast"),
        (dict(pixel_size=-1.0), "rlnImagePixelSize"),
        (dict(cs=math.nan), "rlnSphericalAberration"),
        (dict(magnification=(1, 1, 1, 1)), "rlnMagMat"),
        (dict(mtf=((0.0, 0.5), (1.0, 0.0)), original_pixel_size=1.0), "positive"),
        (dict(mtf=((0.0, 0.5), (1.0, 0.5))), "rlnMicrographOriginalPixelSize"),
    ],
)
def test_impossible_optics_are_refused(changes, word):
    with pytest.raises(InputError, match=word):
        optics(**changes)
