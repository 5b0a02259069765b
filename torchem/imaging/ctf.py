"""The microscope: contrast transfer function, odd aberrations, magnification matrix and detector response.

Signs and units are RELION's. Every function takes integer Fourier pixels (kx, ky) of the group's box; the
spatial frequency is M·(kx, ky)/(box · pixel size) in 1/Å, M being the magnification matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchem.errors import InputError

# smallest |CTF|, so that nothing downstream divides by zero
CTF_FLOOR = 1e-8


@dataclass(frozen=True)
class Optics:
    """Constants of one optics group, one row of RELION's data_optics table.

    Attributes
    ----------
    voltage, cs, amplitude_contrast
        kV, mm, and a fraction in [0, 1].
    pixel_size, box
        Å and pixels of the particle images.
    beam_tilt
        mrad, x and y.
    odd_zernike, even_zernike
        radians; coefficients in RELION's order of polynomials in the frequency in 1/Å (not normalised).
    magnification
        M, row by row: rlnMagMat00, 01, 10, 11.
    premultiplied, phase_flipped
        whether the images were multiplied by their CTF, or by its sign.
    mtf
        frequencies in 1/px of the original pixel, ascending, and detector response at each.
    original_pixel_size
        Å, of the camera as the MTF was measured; needed with ``mtf``.
    """

    name: str
    voltage: float
    cs: float
    amplitude_contrast: float
    pixel_size: float
    box: int
    beam_tilt: tuple[float, float] = (0.0, 0.0)
    odd_zernike: tuple[float, ...] = ()
    even_zernike: tuple[float, ...] = ()
    magnification: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 1.0)
    premultiplied: bool = False
    phase_flipped: bool = False
    mtf: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    original_pixel_size: float | None = None

    def __post_init__(self) -> None:
        for label, value, right in (
            ("rlnVoltage", self.voltage, self.voltage > 0),
            ("rlnSphericalAberration", self.cs, math.isfinite(self.cs)),
            ("rlnAmplitudeContrast", self.amplitude_contrast, 0 <= self.amplitude_contrast <= 1),
            ("rlnImagePixelSize", self.pixel_size, self.pixel_size > 0),
            ("rlnImageSize", self.box, self.box > 0),
            ("rlnMagMat00..11", self.magnification, self._determinant() > 0),
        ):
            if not right:
                raise InputError(
                    f"optics group {self.name!r}: {label} is {value}; "
                    "correct it in the data_optics table of the particles' STAR file"
                )
        if self.mtf is not None:
            frequencies, values = self.mtf
            ascending = all(a < b for a, b in pairwise(frequencies))
            if len(frequencies) != len(values) or len(values) < 2 or not ascending or min(values) < 1e-10:
                raise InputError(
                    f"optics group {self.name!r}: the MTF needs two or more ascending frequencies with "
                    "positive values; correct the file of rlnMtfFileName or remove that column"
                )
            if not self.original_pixel_size:
                raise InputError(
                    f"optics group {self.name!r}: an MTF needs rlnMicrographOriginalPixelSize; "
                    "add it to data_optics, or remove rlnMtfFileName"
                )

    def _determinant(self) -> float:
        a, b, c, d = self.magnification
        return a * d - b * c


def electron_wavelength(voltage_kv: float) -> float:
    """Relativistic electron wavelength in Å: 12.2643247/√(V(1 + 0.978466e-6 V)), V in volts, as in RELION."""
    volts = voltage_kv * 1e3
    return 12.2643247 / math.sqrt(volts * (1 + volts * 0.978466e-6))


def ctf(optics: Optics, parameters: Tensor, kx: Tensor, ky: Tensor) -> Tensor:
    r"""Contrast transfer functions of bright-on-dark images, positive near the first maximum of underfocus.

    :math:`s e^{-Bk^2/4}\sin(\pi\lambda k^2\Delta - \tfrac12\pi C_s\lambda^3k^4 + \varphi + \arcsin Q - Z)`
    with the astigmatic defocus Δ(θ), phase shift φ and even Zernike phase Z; its absolute value for
    phase-flipped data (RELION's ``CTF::getCTF``).

    Parameters
    ----------
    parameters
        `(n, 6)` per particle: defocus U and V (Å, positive is underfocus), angle of U from x (degrees), phase
        shift (degrees), B-factor (Å²), scale.
    kx, ky
        `(p,)` Fourier pixels of ``optics.box``.

    Returns
    -------
    `(n, p)`, dtype and device of ``parameters``; magnitudes below 1e-8 become 1e-8, sign kept.
    """
    return ctf_of_terms(optics, parameters, ctf_terms(optics, kx.to(parameters.device), ky.to(parameters.device)))


def ctf_terms(optics: Optics, kx: Tensor, ky: Tensor) -> Tensor:
    """What :func:`ctf` takes of the pixels, whatever the particle: `(5, p)` float64.

    The phase without defocus, πλ times k², x² − y² and 2xy, of which Δ(θ)k² is made (mean defocus · k² + half
    difference · (cos 2α (x² − y²) + sin 2α · 2xy)), and -k²/4.
    """
    x, y = _frequencies(optics, kx, ky)
    square = x * x + y * y
    wavelength = electron_wavelength(optics.voltage)
    fixed = math.asin(optics.amplitude_contrast) - math.pi / 2 * optics.cs * 1e7 * wavelength**3 * square**2
    fixed = fixed - _zernike(optics.even_zernike, _even_order, x, y)
    forms = math.pi * wavelength * torch.stack((square, x * x - y * y, 2 * x * y))
    return torch.cat((fixed[None], forms, square[None] / -4))


def ctf_of_terms(optics: Optics, parameters: Tensor, terms: Tensor) -> Tensor:
    """:func:`ctf` at the pixels of :func:`ctf_terms`."""
    fixed, *forms, quarter = terms.to(parameters)
    # (n, 1) each
    defocus_u, defocus_v, angle, phase_shift, b_factor, scale = parameters[:, :, None].unbind(1)
    difference, twice_angle = defocus_u - defocus_v, angle * (math.pi / 90)
    argument = torch.add(fixed, phase_shift, alpha=math.pi / 180)  # (n, p)
    # sums in place, not a matrix product: TF32 products would ruin arguments of hundreds of radians
    argument.addcmul_(defocus_u + defocus_v, forms[0], value=0.5)
    argument.addcmul_(difference * twice_angle.cos(), forms[1], value=0.5)
    argument.addcmul_(difference * twice_angle.sin(), forms[2], value=0.5)
    values = argument.sin_().mul_((b_factor * quarter).exp_())
    if optics.phase_flipped:
        values.abs_()
    values.mul_(scale)
    return torch.copysign(values.abs().clamp_(min=CTF_FLOOR), values)


def aberration_phase(optics: Optics, kx: Tensor, ky: Tensor, dtype: torch.dtype = torch.complex128) -> Tensor | None:
    r"""Unit phases that beam tilt and odd Zernike terms put on image transforms, or None without any.

    :math:`e^{i\Psi(k)}` with Ψ = Σ cᵢZᵢ(k) − 2πC_sλ²|k|²(k·t), t the beam tilt in radians (RELION's
    ``ObservationModel::getPhaseCorrection``). Multiply image transforms by its conjugate to undo it. A beam
    tilt takes the place of the coma coefficients (n = 3, m = ±1), as in RELION.

    Parameters
    ----------
    kx, ky
        `(p,)` Fourier pixels of ``optics.box``.

    Returns
    -------
    `(p,)` complex on the device of ``kx``.
    """
    tilt_x, tilt_y = optics.beam_tilt
    coefficients = list(optics.odd_zernike)
    if tilt_x or tilt_y:
        coefficients[3:5] = [0.0] * len(coefficients[3:5])
    if not (any(coefficients) or tilt_x or tilt_y):
        return None
    x, y = _frequencies(optics, kx, ky)
    phase = _zernike(tuple(coefficients), _odd_order, x, y)
    coma = 2e-3 * math.pi * optics.cs * 1e7 * electron_wavelength(optics.voltage) ** 2
    phase = phase - coma * (x * x + y * y) * (x * tilt_x + y * tilt_y)
    return torch.polar(torch.ones_like(phase), phase).to(dtype)


def mtf(optics: Optics, kx: Tensor, ky: Tensor) -> Tensor | None:
    """Detector response at each Fourier pixel, linear between the curve's points, or None without a curve.

    The frequency is that of the camera (no magnification matrix); image transforms are divided by it.

    Returns
    -------
    `(p,)` float64 on the device of ``kx``; the first and last value beyond the curve's ends.
    """
    if optics.mtf is None or optics.original_pixel_size is None:
        return None
    curve = torch.tensor(optics.mtf, dtype=torch.float64, device=kx.device)
    frequencies, values = curve[0] / optics.original_pixel_size, curve[1]
    radius = torch.hypot(kx.double(), ky.double()) / (optics.box * optics.pixel_size)
    right = torch.searchsorted(frequencies, radius).clamp(1, len(values) - 1)
    left = right - 1
    share = ((radius - frequencies[left]) / (frequencies[right] - frequencies[left])).clamp(0, 1)
    return torch.lerp(values[left], values[right], share)


def _frequencies(optics: Optics, kx: Tensor, ky: Tensor) -> tuple[Tensor, Tensor]:
    """Spatial frequencies x, y `(p,)` float64 in 1/Å, the magnification matrix applied."""
    size = optics.box * optics.pixel_size
    x, y = kx.double() / size, ky.double() / size
    xx, xy, yx, yy = optics.magnification
    return xx * x + xy * y, yx * x + yy * y


def _even_order(index: int) -> tuple[int, int]:
    """Angular and radial order (m, n) of an even coefficient: n = 0, 2, 4, … and m = −n, −n + 2, …, n."""
    half = math.isqrt(index)
    return 2 * (index - half * half - half), 2 * half


def _odd_order(index: int) -> tuple[int, int]:
    """Angular and radial order (m, n) of an odd coefficient: n = 1, 3, 5, … and m = −n, −n + 2, …, n."""
    half = (math.isqrt(1 + 4 * index) - 1) // 2
    n = 2 * half + 1
    return 2 * (index - half * half - half) - n, n


def _zernike(coefficients: tuple[float, ...], order: Callable[[int], tuple[int, int]], x: Tensor, y: Tensor) -> Tensor:
    """Sum of Zernike polynomials: cosine terms for m >= 0, sine terms of |m| for m < 0, radius in 1/Å."""
    total = torch.zeros_like(x)
    radius, azimuth = torch.hypot(x, y), torch.atan2(y, x)
    for index, coefficient in enumerate(coefficients):
        if not coefficient:
            continue
        m, n = order(index)
        radial = torch.zeros_like(x)
        for k in range((n - abs(m)) // 2 + 1):
            # (−1)^k (n−k)! / (k! ((n+|m|)/2−k)! ((n−|m|)/2−k)!)
            binomials = math.comb(n - k, k) * math.comb(n - 2 * k, (n - abs(m)) // 2 - k)
            radial = radial + (-1) ** k * binomials * radius ** (n - 2 * k)
        angular = torch.cos(m * azimuth) if m >= 0 else torch.sin(-m * azimuth)
        total = total + coefficient * radial * angular
    return total
