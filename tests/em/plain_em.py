"""One expectation-maximization iteration in plain float64 NumPy: the yardstick for `torchem.em`.

Nothing here imports torchem. Loops run over particles, arrays are small, every formula is written once and
directly. It covers 3D and 2D references, any number of classes, global and local searches, and the iteration
that scores by cross-correlation.

Conventions: volumes are indexed `[z, y, x]` and images `[y, x]`, origin at L // 2; the forward transform carries
1/L² for images; spectra run over shells round(|k|) (half away from zero). Euler angles (rot, tilt, psi) are in
degrees with passive factors, `A = Z(psi) Y(tilt) Z(rot)`, and a slice is F(Aᵀ (kx, ky, 0)). Translations are in Å,
applied to the image.

Shape letters: n particles, K classes, D directions, S psi angles, T translations, O children of an orientation
(8, or 2 for 2D references), C children of a translation (4), P Fourier pixels, L box.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import healpix
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ComplexArray = NDArray[np.complex128]


# ------------------------------------------------------------------ what goes in


@dataclass
class Particles:
    """The images of one half and what is known of them.

    `images` (n, L, L); `ctf_parameters` (n, 6): defocus U and V (Å), angle (deg), phase shift (deg), B-factor (Å²),
    scale; `origins_angst` (n, 2) x, y; `norm` (n,); `group` (n,) index of the particle's scale group; `euler` (n, 3)
    last poses, the centres of local searches; `only_class` (n,) restricts each particle to one class, which makes
    different classes from one reference.
    """

    images: Array
    ctf_parameters: Array
    origins_angst: Array
    norm: Array
    group: NDArray[np.int64]
    euler: Array | None = None
    only_class: NDArray[np.int64] | None = None


@dataclass
class Optics:
    """Constants of the microscope: kV, mm, fraction, Å per pixel."""

    voltage: float
    cs: float
    amplitude_contrast: float
    pixel_size: float


@dataclass
class Model:
    """What one half knows at the start of an iteration.

    `references` (K, L, L, L) or (K, L, L) in real space; `sigma2` (L/2+1,); `pdf_direction` (K, D), whose rows sum to
    the class probabilities (D = 1 for 2D references); `sigma_offset` Å; `norm_average`; `scale` (groups,);
    `data_vs_prior` (K, L/2+1), used for the scale correction; `prior_offset` (K, 2) Å, centres of the offset prior
    (2D references only, else zeros).
    """

    references: Array
    sigma2: Array
    pdf_direction: Array
    sigma_offset: float
    norm_average: float
    scale: Array
    data_vs_prior: Array
    prior_offset: Array


@dataclass
class Sampling:
    """The grid of one iteration.

    3D: `healpix_order` and `pixels` (D,) NEST numbers of the directions; 2D: order −1 and one dummy direction.
    `psi_step` deg; `offset_range`, `offset_step` Å; `perturbation` q in [−0.5, 0.5]; `local_sigma` deg: None searches
    globally, a pair (sigma of the direction, sigma of psi) locally.
    """

    psi_step: float
    offset_range: float
    offset_step: float
    healpix_order: int = -1
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    perturbation: float = 0.0
    local_sigma: tuple[float, float] | None = None


@dataclass
class Settings:
    """Choices that hold for the whole iteration.

    `operators` (g, 3, 3) of the point group, identity first. `cross_correlation`: the first iteration of a reference
    on a wrong grey scale. `image_size`: the window of pixels that the second pass compares, where it is not
    `current_size` (which always sets the reference's radius). `shift_in_pixels`: RELION's unit slip, that adds the
    old origin in px to translations in Å in the offset prior (and in 2D subtracts an Å centre from px in the sum for
    sigma_offset).
    """

    particle_diameter: float
    current_size: int
    coarse_size: int
    image_size: int = 0
    padding: int = 2
    adaptive_fraction: float = 0.999
    tau2_fudge: float = 1.0
    operators: Array = field(default_factory=lambda: np.eye(3)[None])
    cross_correlation: bool = False
    do_norm: bool = True
    do_scale: bool = True
    shift_in_pixels: bool = False


# ------------------------------------------------------------------ small things


def round_away(x: Array | float) -> NDArray[np.int64]:
    """Nearest integer, halves away from zero."""
    x = np.asarray(x, float)
    return (np.sign(x) * np.floor(np.abs(x) + 0.5)).astype(np.int64)


def window(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Fourier pixels kx, ky (P,) of a cropped half transform, and whether sums count them.

    Row ky = −size/2 does not exist in an FFT of even size. Sums run over the half plane: shells up to size/2, without
    (0, ky < 0). The cross-correlation runs over the whole window instead, corners and column kx = 0 included.
    """
    ky, kx = np.meshgrid(np.arange(-size // 2 + 1, size // 2 + 1), np.arange(size // 2 + 1), indexing="ij")
    kx, ky = kx.ravel(), ky.ravel()
    return kx, ky, (round_away(np.hypot(kx, ky)) <= size // 2) & ~((kx == 0) & (ky < 0))


def half_plane(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Fourier pixels that sums run over: kx, ky and their shell, each (P,)."""
    kx, ky, counted = window(size)
    return kx[counted], ky[counted], round_away(np.hypot(kx, ky))[counted]


def shell_sums(values: Array, shell: NDArray[np.int64], shells: int) -> Array:
    """Sum of `values` (P,) in every shell: (shells,)."""
    return np.bincount(shell, values, shells)[:shells]


def rotation(rot: float, tilt: float, psi: float) -> Array:
    """Euler matrix A (3, 3) of angles in degrees."""

    def about_z(t: float) -> Array:
        c, s = np.cos(np.deg2rad(t)), np.sin(np.deg2rad(t))
        return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])

    c, s = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    about_y = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    return about_z(psi) @ about_y @ about_z(rot)


def euler_angles(matrix: Array) -> Array:
    """rot, tilt, psi (deg) of an Euler matrix, tilt in [0, 180]; where tilt is 0 all of the turn is psi."""
    sine = np.hypot(matrix[2, 0], matrix[2, 1])
    if sine < 1e-6:
        rot, psi = 0.0, np.arctan2(matrix[0, 1] * np.sign(matrix[2, 2]), matrix[0, 0] * np.sign(matrix[2, 2]))
    else:
        rot, psi = np.arctan2(matrix[2, 1], matrix[2, 0]), np.arctan2(matrix[1, 2], -matrix[0, 2])
    return np.rad2deg([rot, np.arctan2(sine, matrix[2, 2]), psi])


def ctf(optics: Optics, parameters: Array, kx: Array, ky: Array, box: int) -> Array:
    """Contrast transfer of one image at Fourier pixels (P,): +sin, so that data is bright on dark."""
    defocus_u, defocus_v, angle, phase_shift, b_factor, scale = parameters
    volts = optics.voltage * 1e3
    wavelength = 12.2643247 / np.sqrt(volts * (1 + 0.978466e-6 * volts))
    k2 = (kx**2 + ky**2) / (box * optics.pixel_size) ** 2
    azimuth = np.arctan2(ky, kx) - np.deg2rad(angle)
    defocus = (defocus_u + defocus_v) / 2 + (defocus_u - defocus_v) / 2 * np.cos(2 * azimuth)
    q = optics.amplitude_contrast
    phase = (
        np.pi * wavelength * k2 * defocus
        - np.pi / 2 * optics.cs * 1e7 * wavelength**3 * k2**2
        + np.deg2rad(phase_shift)
        + np.arctan(q / np.sqrt(1 - q * q))
    )
    value = scale * np.exp(-b_factor * k2 / 4) * np.sin(phase)
    return np.where(np.abs(value) < 1e-8, np.where(value < 0, -1e-8, 1e-8), value)


def radii(box: int, ndim: int) -> Array:
    """Distance in pixels of every voxel from the origin L // 2."""
    axis = np.arange(box) - box // 2
    return np.sqrt(sum(g.astype(float) ** 2 for g in np.meshgrid(*[axis] * ndim, indexing="ij")))


def soft_outside(r: Array, radius: float, edge: float) -> Array:
    """0 within `radius`, 1 beyond `radius + edge`, a raised cosine between."""
    ramp = 0.5 - 0.5 * np.cos(np.pi * (r - radius) / edge)
    return np.where(r < radius, 0.0, np.where(r > radius + edge, 1.0, ramp))


def fill_outside(image: Array, radius: float, edge: float) -> Array:
    """Replace what lies outside by its own weighted mean."""
    outside = soft_outside(radii(image.shape[-1], image.ndim), radius, edge)
    mean = (outside * image).sum() / outside.sum() if outside.any() else 0.0
    return (1 - outside) * image + outside * mean


def shift_image(image: Array, dx: int, dy: int) -> Array:
    """Move an image by whole pixels; zeros enter."""
    box = image.shape[0]
    out = np.zeros_like(image)
    y, x = np.mgrid[:box, :box]
    inside = (y - dy >= 0) & (y - dy < box) & (x - dx >= 0) & (x - dx < box)
    out[inside] = image[(y - dy)[inside], (x - dx)[inside]]
    return out


def centred_fft(image: Array) -> ComplexArray:
    """Transform with the origin at L // 2 and the factor 1/L²; rows and columns as `np.fft.fft2` orders them."""
    return np.fft.fft2(np.fft.ifftshift(image)) / image.size


# ------------------------------------------------------------------ references in Fourier space


def sinc2(box: int, ndim: int, padding: int) -> Array:
    """Fall-off that trilinear interpolation of the padded transform causes: sinc²(r / (padding · L))."""
    return np.sinc(radii(box, ndim) / (padding * box)) ** 2


def padded_transform(reference: Array, r_max: int, padding: int) -> ComplexArray:
    """Padded transform of a reference, kept for |k| ≤ padding · r_max, on a cube (or square) of
    `padding · r_max + 2` pixels each side of its origin."""
    box, ndim = reference.shape[0], reference.ndim
    large = padding * box
    padded = np.zeros((large,) * ndim)
    start = large // 2 - box // 2
    padded[(slice(start, start + box),) * ndim] = reference / sinc2(box, ndim, padding)
    transform = np.fft.fftn(np.fft.ifftshift(padded)) / box**2
    half = padding * r_max + 2
    k = np.arange(-half, half + 1)
    out = transform[np.ix_(*[k % large] * ndim)]
    k2 = sum(g**2 for g in np.meshgrid(*[k] * ndim, indexing="ij"))
    return np.where(k2 <= (padding * r_max) ** 2, out, 0)


def corners(points: Array) -> list[tuple[NDArray[np.int64], Array]]:
    """The 2^d grid points around each of `points` (m, d), each with its linear weight (m,)."""
    low = np.floor(points).astype(np.int64)
    fraction = points - low
    out = []
    for corner in np.ndindex(*(2,) * points.shape[1]):
        weight = np.prod(np.where(np.array(corner) == 1, fraction, 1 - fraction), axis=1)
        out.append((low + np.array(corner), weight))
    return out


def slice_points(matrix: Array, kx: Array, ky: Array, ndim: int, padding: int) -> Array:
    """Where the pixels of a slice lie in the padded transform: (P, ndim), last axis first (z, y, x)."""
    points = padding * (np.multiply.outer(kx, matrix[0, :ndim]) + np.multiply.outer(ky, matrix[1, :ndim]))
    return points[:, ::-1]


def central_slice(
    transform: ComplexArray, matrix: Array, kx: Array, ky: Array, r_max: int, padding: int
) -> ComplexArray:
    """Linearly interpolated slice (P,), zero beyond |k| = r_max."""
    half = transform.shape[0] // 2
    inside = kx**2 + ky**2 <= r_max**2
    out = np.zeros(len(kx), complex)
    for index, weight in corners(slice_points(matrix, kx[inside], ky[inside], transform.ndim, padding)):
        out[inside] += weight * transform[tuple((index + half).T)]
    return out


class BackProjection:
    """Sums of `data` and `weight` in the padded half space x ≥ 0, on the same grid as `padded_transform`.

    Points with x < 0 enter as their conjugates. `finish` adds conjugate mates on the plane x = 0 (the origin once)
    and fills x < 0, so that both arrays are Hermitian over the full cube.
    """

    def __init__(self, ndim: int, r_max: int, padding: int) -> None:
        self.half = padding * r_max + 2
        self.r_max, self.padding, self.ndim = r_max, padding, ndim
        shape = (2 * self.half + 1,) * ndim
        self.data = np.zeros(shape, complex)
        self.weight = np.zeros(shape)

    def insert(self, matrix: Array, kx: Array, ky: Array, data: ComplexArray, weight: Array) -> None:
        """Add one slice."""
        inside = kx**2 + ky**2 <= self.r_max**2
        points = slice_points(matrix, kx[inside], ky[inside], self.ndim, self.padding)
        data, weight = data[inside], weight[inside]
        negative = points[:, -1] < 0
        points = np.where(negative[:, None], -points, points)
        data = np.where(negative, data.conj(), data)
        for index, fraction in corners(points):
            flat = np.ravel_multi_index(tuple((index + self.half).T), self.data.shape)
            count = self.data.size
            self.data.real += np.bincount(flat, fraction * data.real, count).reshape(self.data.shape)
            self.data.imag += np.bincount(flat, fraction * data.imag, count).reshape(self.data.shape)
            self.weight += np.bincount(flat, fraction * weight, count).reshape(self.data.shape)

    def finish(self) -> tuple[ComplexArray, Array]:
        """The Hermitian sums."""
        flip = (slice(None, None, -1),) * self.ndim
        h = self.half
        plane = (Ellipsis, h)
        origin = (h,) * self.ndim
        out = []
        for array in (self.data, self.weight):
            array = array.copy()
            at_origin = array[origin].real
            array[plane] = array[plane] + array[flip][plane].conj()
            array[origin] = at_origin
            array[..., :h] = array[flip][..., :h].conj()
            out.append(array)
        return out[0], out[1]


# ------------------------------------------------------------------ the grid


@dataclass
class Grid:
    """A sampling written out.

    `coarse` (D, S, 3, 3) Euler matrices and `fine` (D, S, O, 3, 3) of their children, both perturbed; `directions`
    (D, 3) unit vectors and `psi` (S,) deg, not perturbed; `shifts` (T, 2) Å, not perturbed, `coarse_shifts` (T, 2)
    and `fine_shifts` (T, C, 2) perturbed; `fine_euler` (D, S, O, 3) the angles of `fine`.
    """

    coarse: Array
    fine: Array
    fine_euler: Array
    directions: Array
    psi: Array
    shifts: Array
    coarse_shifts: Array
    fine_shifts: Array


def pixel_angles(order: int, pixel: int) -> tuple[float, float]:
    """rot and tilt (deg) of a NEST pixel's centre."""
    theta, phi = healpix.pix2ang(2**order, pixel, nest=True)
    return float(np.rad2deg(phi)), float(np.rad2deg(theta))


def make_grid(sampling: Sampling) -> Grid:
    """Write a sampling out; children are made for one order of oversampling."""
    flat = sampling.healpix_order < 0
    count = round(360 / sampling.psi_step)
    psi = np.arange(count) * 360 / count
    step = 360 / count if flat else 360 / (6 * 2**sampling.healpix_order)
    omega = sampling.perturbation * step
    twist = rotation(0, 0, omega) if flat else rotation(omega, omega, omega)

    coarse, fine, angles, directions = [], [], [], []
    for pixel in sampling.pixels:
        rot, tilt = (0.0, 0.0) if flat else pixel_angles(sampling.healpix_order, pixel)
        nested = [(0.0, 0.0)] if flat else [pixel_angles(sampling.healpix_order + 1, 4 * pixel + i) for i in range(4)]
        directions.append(rotation(rot, tilt, 0)[2])
        coarse.append([rotation(rot, tilt, p) @ twist for p in psi])
        angles.append([[(r, t, p + d) for r, t in nested for d in (-360 / count / 4, 360 / count / 4)] for p in psi])
        fine.append([[rotation(*angle) @ twist for angle in of_psi] for of_psi in angles[-1]])
        if omega != 0:
            angles[-1] = [[euler_angles(matrix) for matrix in of_psi] for of_psi in fine[-1]]

    step, reach = sampling.offset_step, sampling.offset_range
    most = int(np.ceil(reach / step))
    shifts = np.array(
        [
            (x * step, y * step)
            for x in range(-most, most + 1)
            for y in range(-most, most + 1)
            if (x * step) ** 2 + (y * step) ** 2 < reach**2 + 0.001
        ]
    )
    moved = shifts + sampling.perturbation * step
    offsets = np.array([(x, y) for x in (-step / 4, step / 4) for y in (-step / 4, step / 4)])
    return Grid(
        np.array(coarse), np.array(fine), np.array(angles), np.array(directions), psi,
        shifts, moved, moved[:, None] + offsets,
    )  # fmt: skip


def local_prior(grid: Grid, euler: Array, sigma: tuple[float, float], operators: Array) -> Array:
    """Gaussian prior (D, S) of a local search around a pose and its symmetry mates, cut below 3 sigma.

    Each mate's psi is compared with the psi angles where its own direction is near. Directions over all mates sum to
    1, and so do the psi angles of each; where nothing lies within 3 sigma the nearest sample gets all.
    """
    mates = [euler_angles(rotation(*euler) @ g) for g in operators]
    cosines = np.array([grid.directions @ rotation(rot, tilt, 0)[2] for rot, tilt, _ in mates])
    distance = np.rad2deg(np.arccos(np.clip(cosines, -1, 1)))  # (g, D)
    over_directions = np.where(distance < 3 * sigma[0], np.exp(-(distance**2) / (2 * sigma[0] ** 2)), 0)
    if not over_directions.any():
        over_directions[np.unravel_index(np.argmin(distance), distance.shape)] = 1
    over_directions /= over_directions.sum()
    prior = np.zeros((len(grid.directions), len(grid.psi)))
    for share, (_, _, psi) in zip(over_directions, mates, strict=True):
        turn = np.abs(grid.psi - psi) % 360
        turn = np.minimum(turn, 360 - turn)
        over_psi = np.where(turn < 3 * sigma[1], np.exp(-(turn**2) / (2 * sigma[1] ** 2)), 0)
        if not over_psi.any():
            over_psi[np.argmin(turn)] = 1
        prior += np.multiply.outer(share, over_psi / over_psi.sum())
    return prior


# ------------------------------------------------------------------ expectation


@dataclass
class Expectation:
    """What one pass over the particles gives.

    `coarse` (n, K, D, S, T) log weights, −inf where not considered; `significant` the same shape; `fine`
    (n, K, D, S, T, O, C) log weights, −inf outside the children of significant samples; `kept` the same shape,
    normalised weights that entered the sums. In a cross-correlation iteration `coarse` and `fine` hold the scores.
    `data`, `weight` (K, ...) Hermitian sums on the padded grid; `noise` (L/2+1,), `sum_weight`; `norm` (n,) new norm
    corrections; `xa`, `aa` (groups,); `offset` Å²; `pdf_direction` (K, D) and `prior_offset` (K, 2) as sums;
    `log_likelihood`, `pmax`, `n_significant` (n,); `best` (n, 6) index into `fine`; `euler` (n, 3) and
    `origins_angst` (n, 2) of the best child, `best_class` (n,).
    """

    coarse: Array
    significant: NDArray[np.bool_]
    fine: Array
    kept: Array
    data: ComplexArray
    weight: Array
    noise: Array
    sum_weight: float
    norm: Array
    xa: Array
    aa: Array
    offset: float
    pdf_direction: Array
    prior_offset: Array
    log_likelihood: Array
    pmax: Array
    n_significant: NDArray[np.int64]
    best: NDArray[np.int64]
    euler: Array
    origins_angst: Array
    best_class: NDArray[np.int64]


def significant_set(log_weights: Array, fraction: float) -> NDArray[np.bool_]:
    """The heaviest samples whose weights together exceed `fraction` of all; ties at the threshold stay in."""
    weights = np.exp(log_weights - log_weights.max())
    ordered = np.sort(weights[weights > 0])[::-1]
    enough = np.cumsum(ordered) > fraction * ordered.sum()
    last = int(np.argmax(enough)) if enough.any() else len(ordered) - 1
    return weights >= ordered[last]


def phase_ramp(shift_px: Array, kx: Array, ky: Array, box: int) -> ComplexArray:
    """Phases (..., P) that move an image by `shift_px` (..., 2)."""
    return np.exp(-2j * np.pi * (shift_px[..., :1] * kx + shift_px[..., 1:] * ky) / box)


def prepare(
    particles: Particles, i: int, model: Model, optics: Optics, settings: Settings
) -> tuple[ComplexArray, ComplexArray, Array]:
    """Transforms of particle i, masked and not, both (L, L), and its whole-pixel shift in px."""
    image = particles.images[i]
    if settings.do_norm:
        image = image * (model.norm_average / particles.norm[i])
    old = round_away(particles.origins_angst[i] / optics.pixel_size)
    image = shift_image(image, *old)
    masked = fill_outside(image, settings.particle_diameter / (2 * optics.pixel_size), 5)
    return centred_fft(masked), centred_fft(image), old.astype(float)


def scores(
    image: ComplexArray, ramps: ComplexArray, slices: ComplexArray, inverse: Array, cross_correlation: bool
) -> Array:
    """Log likelihoods (r, t), or correlations, of an image (P,) at shifts (t, P) against projections (r, P).

    `inverse` (P,) is 1 / (2 sigma²), 0 where pixels are not compared.
    """
    shifted = image * ramps
    if cross_correlation:
        overlap = (slices.conj() @ shifted.T).real
        return overlap / np.sqrt((np.abs(slices) ** 2).sum(1)[:, None] * (np.abs(image) ** 2).sum())
    cross = 2 * ((slices.conj() * inverse) @ shifted.T).real
    own = (np.abs(slices) ** 2) @ inverse
    return cross - own[:, None] - (np.abs(image) ** 2 * inverse).sum()


def log_offset_prior(
    shifts: Array, old_px: Array, centre: Array, sigma: float, pixel_size: float, in_pixels: bool
) -> Array:
    """Logarithm of the offset prior (T,), unnormalised."""
    if in_pixels:
        offset = (shifts + old_px - centre) * pixel_size
    else:
        offset = shifts + old_px * pixel_size - centre
    return -(offset**2).sum(1) / (2 * sigma**2)


def expectation(
    particles: Particles, optics: Optics, model: Model, sampling: Sampling, settings: Settings
) -> Expectation:
    """Both passes over all particles of one half, and all sums."""
    grid = make_grid(sampling)
    references = model.references
    classes, ndim, box = len(references), references.ndim - 1, references.shape[-1]
    n = len(particles.images)
    D, S = grid.coarse.shape[:2]
    T, O, C = len(grid.shifts), grid.fine.shape[2], grid.fine_shifts.shape[1]  # noqa: E741
    pixel, padding = optics.pixel_size, settings.padding
    shells = box // 2 + 1
    r_max = settings.current_size // 2
    transforms = [padded_transform(reference, r_max, padding) for reference in references]

    image_size = settings.image_size or settings.current_size
    kx1, ky1, counted1 = window(settings.coarse_size)
    kx2, ky2, counted2 = window(image_size)
    shell1, shell2 = round_away(np.hypot(kx1, ky1)), round_away(np.hypot(kx2, ky2))
    kx0, ky0, shell0 = half_plane(box)
    r_coarse = min(r_max, settings.coarse_size // 2)
    coarse_slices = np.array(
        [
            [[central_slice(t, grid.coarse[d, s], kx1, ky1, r_coarse, padding) for s in range(S)] for d in range(D)]
            for t in transforms
        ]
    ).reshape(classes, D * S, -1)
    ramps1 = phase_ramp(grid.coarse_shifts / pixel, kx1, ky1, box)  # (T, P)
    ramps2 = phase_ramp(grid.fine_shifts / pixel, kx2, ky2, box)  # (T, C, P)
    sigma2 = np.concatenate([model.sigma2, np.full(box, np.inf)])  # corners of the window
    inverse1 = np.where(counted1 & (shell1 > 0), 1 / (2 * sigma2[shell1]), 0)  # the origin is not compared
    inverse2 = np.where(counted2 & (shell2 > 0), 1 / (2 * sigma2[shell2]), 0)

    fine_slices: dict[tuple[int, ...], ComplexArray] = {}

    def fine_slice(k: int, d: int, s: int, o: int) -> ComplexArray:
        if (k, d, s, o) not in fine_slices:
            fine_slices[k, d, s, o] = central_slice(transforms[k], grid.fine[d, s, o], kx2, ky2, r_max, padding)
        return fine_slices[k, d, s, o]

    back = [BackProjection(ndim, r_max, padding) for _ in range(classes)]
    # slices of a common grid are summed before they are inserted
    back_data = np.zeros((classes, D, S, O, len(kx2)), complex)
    back_weight = np.zeros((classes, D, S, O, len(kx2)))
    e = Expectation(
        coarse=np.full((n, classes, D, S, T), -np.inf), significant=np.zeros((n, classes, D, S, T), bool),
        fine=np.full((n, classes, D, S, T, O, C), -np.inf), kept=np.zeros((n, classes, D, S, T, O, C)),
        data=np.zeros(0, complex), weight=np.zeros(0), noise=np.zeros(shells), sum_weight=0.0, norm=np.zeros(n),
        xa=np.zeros(len(model.scale)), aa=np.zeros(len(model.scale)), offset=0.0,
        pdf_direction=np.zeros((classes, D)), prior_offset=np.zeros((classes, 2)), log_likelihood=np.zeros(n),
        pmax=np.zeros(n), n_significant=np.zeros(n, np.int64), best=np.zeros((n, 6), np.int64), euler=np.zeros((n, 3)),
        origins_angst=np.zeros((n, 2)), best_class=np.zeros(n, np.int64),
    )  # fmt: skip

    for i in range(n):
        masked, whole, old = prepare(particles, i, model, optics, settings)
        group = particles.group[i]
        scale = model.scale[group]
        ctf1 = scale * ctf(optics, particles.ctf_parameters[i], kx1, ky1, box)
        ctf2 = scale * ctf(optics, particles.ctf_parameters[i], kx2, ky2, box)

        # priors, at the coarse samples
        if sampling.local_sigma is None:
            prior = np.repeat(model.pdf_direction[:, :, None], S, axis=2)
        else:
            around = local_prior(grid, particles.euler[i], sampling.local_sigma, settings.operators)
            prior = np.repeat(around[None], classes, axis=0)
        offered = (
            np.ones(classes, bool) if particles.only_class is None else np.arange(classes) == particles.only_class[i]
        )
        prior = prior * offered[:, None, None]
        with np.errstate(divide="ignore"):
            log_orientation = np.log(prior)  # (K, D, S)
        log_offset = np.array(
            [
                log_offset_prior(grid.shifts, old, centre, model.sigma_offset, pixel, settings.shift_in_pixels)
                for centre in model.prior_offset
            ]
        )  # (K, T)
        log_prior = log_orientation[..., None] + log_offset[:, None, None]
        considered = log_orientation > -np.inf

        # first pass
        likelihood = np.array(
            [
                scores(masked[ky1, kx1], ramps1, coarse_slices[k] * ctf1, inverse1, settings.cross_correlation)
                for k in range(classes)
            ]
        ).reshape(classes, D, S, T)
        if settings.cross_correlation:
            e.coarse[i] = np.where(offered[:, None, None, None], likelihood, -np.inf)
            e.significant[i].flat[np.argmax(e.coarse[i])] = True
        else:
            e.coarse[i] = np.where(considered[..., None], likelihood + log_prior, -np.inf)
            e.significant[i] = significant_set(e.coarse[i], settings.adaptive_fraction)
        e.n_significant[i] = e.significant[i].sum()

        # second pass, children of the significant samples
        for k, d, s in np.argwhere(e.significant[i].any(-1)):
            t = np.flatnonzero(e.significant[i, k, d, s])
            slices = np.array([fine_slice(k, d, s, o) for o in range(O)]) * ctf2
            value = scores(
                masked[ky2, kx2], ramps2[t].reshape(len(t) * C, -1), slices, inverse2, settings.cross_correlation
            ).reshape(O, len(t), C)
            if not settings.cross_correlation:
                value = value + log_prior[k, d, s, t][:, None]
            e.fine[i, k, d, s, t] = value.transpose(1, 0, 2)

        top = e.fine[i].max()
        e.best[i] = np.unravel_index(np.argmax(e.fine[i]), e.fine[i].shape)
        if settings.cross_correlation:
            kept = np.zeros(e.fine[i].shape)
            kept[tuple(e.best[i])] = 1
            e.log_likelihood[i] = top
        else:
            kept = np.exp(e.fine[i] - top)
            total = kept.sum()
            kept = np.where(significant_set(e.fine[i], settings.adaptive_fraction), kept, 0) / total
            # RELION divides both priors by their means over the samples it looks at
            sampled = prior[offered] if sampling.local_sigma is None else prior[considered]
            mean_prior = sampled.mean() * np.exp(log_offset[offered]).mean()
            high = np.abs(masked[ky0, kx0][shell0 > image_size // 2]) ** 2
            e.log_likelihood[i] = (
                top + np.log(total) - np.log(mean_prior) - high.sum() / 2
                - np.log(2 * np.pi * sigma2[shell2[counted2 & (shell2 > 0)]]).sum()
            )  # fmt: skip
        e.kept[i] = kept
        e.pmax[i] = kept.max()

        # sums
        noise = np.zeros(shells)
        for k, d, s, o in np.argwhere(kept.any((3, 5))):
            t, c = np.nonzero(kept[k, d, s, :, o])
            w = kept[k, d, s, t, o, c]  # (m,) all shifts of one orientation
            reference = fine_slice(k, d, s, o) * ctf2
            shifted = masked[ky2, kx2] * ramps2[t, c]  # (m, P)
            noise += shell_sums((w @ np.abs(shifted - reference) ** 2)[counted2], shell2[counted2], shells)
            used = counted2 & (np.append(model.data_vs_prior[k], np.zeros(box))[shell2] > 3)
            e.xa[group] += (w @ (reference.conj() * shifted).real)[used].sum() / scale
            e.aa[group] += w.sum() * (np.abs(reference) ** 2)[used].sum() / scale**2
            back_data[k, d, s, o] += ctf2 * counted2 / sigma2[shell2] * whole[ky2, kx2] * (w @ ramps2[t, c])
            back_weight[k, d, s, o] += w.sum() * ctf2**2 * counted2 / sigma2[shell2]
            moved = old * pixel + grid.fine_shifts[t, c]  # (m, 2) Å
            centre = model.prior_offset[k] * (pixel if settings.shift_in_pixels else 1)
            e.offset += w @ ((moved - centre) ** 2).sum(1)
            e.prior_offset[k] += w @ moved
            e.pdf_direction[k, d] += w.sum()
            e.sum_weight += w.sum()
        beyond = shell0 > image_size // 2
        noise += shell_sums(np.abs(masked[ky0, kx0][beyond]) ** 2, shell0[beyond], shells)
        e.noise += noise
        old_norm = particles.norm[i] / model.norm_average
        e.norm[i] = old_norm * np.sqrt(2 * noise.sum()) if settings.do_norm else particles.norm[i]

        k, d, s, t, o, c = e.best[i]
        e.euler[i] = grid.fine_euler[d, s, o]
        e.origins_angst[i] = old * pixel + grid.fine_shifts[t, c]
        e.best_class[i] = k

    for k, d, s, o in np.argwhere(back_weight.any(-1)):
        back[k].insert(grid.fine[d, s, o], kx2, ky2, back_data[k, d, s, o], back_weight[k, d, s, o])
    finished = [b.finish() for b in back]
    e.data = np.array([f[0] for f in finished])
    e.weight = np.array([f[1] for f in finished])
    return e


# ------------------------------------------------------------------ maximization


@dataclass
class Maximization:
    """What an iteration ends with.

    `models`: one a half (or the one of a classification), references solvent-masked; `unmasked` the maps before the
    solvent mask, per half (K, ...); `fsc` (L/2+1,); `tau2`, `data_vs_prior`, `sigma2_reconstruction` per half
    (K, L/2+1); `resolution_shell` after §6.11 (from half 1).
    """

    models: list[Model]
    unmasked: list[Array]
    fsc: Array
    tau2: list[Array]
    data_vs_prior: list[Array]
    sigma2_reconstruction: list[Array]
    resolution_shell: int


def grid_radius2(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Squared distance of the points of a padded grid from its origin, in padded pixels."""
    axes = [np.arange(size) - size // 2 for size in shape]
    return sum(g**2 for g in np.meshgrid(*axes, indexing="ij"))


def right_half(array: NDArray) -> NDArray:
    """The half x ≥ 0 of a padded grid, the part that spectra run over."""
    return array[..., array.shape[-1] // 2 :]


def symmetrise(data: ComplexArray, weight: Array, operators: Array, radius: int) -> tuple[ComplexArray, Array]:
    """Add rotated copies of both sums, linearly interpolated, within `radius` padded pixels; no division."""
    half = data.shape[0] // 2
    points = np.argwhere(grid_radius2(data.shape) <= radius**2) - half
    out = []
    for array in (data, weight):
        total = array.copy()
        for operator in operators[1:]:
            rotated = points[:, ::-1] @ operator.T  # x, y, z
            value = sum(w * array[tuple((index + half).T)] for index, w in corners(rotated[:, ::-1]))
            total[tuple((points + half).T)] += value
        out.append(total)
    return out[0], out[1]


def downsampled_average(data: ComplexArray, weight: Array, r_max: int, padding: int) -> ComplexArray:
    """Unregularised map's transform on unpadded voxels: sums over round(k / padding), divided."""
    half = data.shape[0] // 2
    small = r_max + 1
    k = np.argwhere(np.ones(data.shape, bool)) - half
    index = round_away(k / padding) + small
    inside = ((index >= 0) & (index <= 2 * small)).all(1)
    shape = (2 * small + 1,) * data.ndim
    flat = np.ravel_multi_index(tuple(index[inside].T), shape)
    count = int(np.prod(shape))
    values = data.reshape(-1)[inside]
    total = np.bincount(flat, values.real, count) + 1j * np.bincount(flat, values.imag, count)
    weights = np.bincount(flat, weight.reshape(-1)[inside], count)
    return np.divide(total, weights, out=np.zeros_like(total), where=weights > 0).reshape(shape)


def fourier_shell_correlation(a: ComplexArray, b: ComplexArray, r_max: int, shells: int) -> Array:
    """FSC of two Hermitian arrays centred on their origin, over x ≥ 0 up to radius r_max; 1 at the origin."""
    a, b = right_half(a), right_half(b)
    axes = [np.arange(a.shape[0]) - a.shape[0] // 2] * (a.ndim - 1) + [np.arange(a.shape[-1])]
    r = np.sqrt(sum(g.astype(float) ** 2 for g in np.meshgrid(*axes, indexing="ij")))
    inside = r <= r_max
    shell = round_away(r[inside])
    cross = shell_sums((a[inside] * b[inside].conj()).real, shell, shells)
    power = shell_sums(np.abs(a[inside]) ** 2, shell, shells) * shell_sums(np.abs(b[inside]) ** 2, shell, shells)
    fsc = np.divide(cross, np.sqrt(power), out=np.zeros(shells), where=power > 0)
    fsc[0] = 1
    return fsc


def reference_power(transform: ComplexArray, r_max: int, padding: int, shells: int) -> Array:
    """Half the mean power of a reference in every shell round(|k| / padding): tau2 of a classification."""
    r2 = right_half(grid_radius2(transform.shape))
    inside = r2 <= (padding * r_max) ** 2
    shell = round_away(np.sqrt(r2[inside]) / padding)
    total = shell_sums(np.abs(right_half(transform)[inside]) ** 2, shell, shells)
    return total / np.maximum(shell_sums(np.ones(len(shell)), shell, shells), 1) / 2


def noise_in_reconstruction(weight: Array, r_max: int, padding: int, shells: int) -> Array:
    """σ² of the map per shell: inverse of the mean weight, padding^d · weight, over padded voxels."""
    r2 = right_half(grid_radius2(weight.shape))
    inside = r2 < (padding * r_max) ** 2
    shell = round_away(np.sqrt(r2[inside]) / padding)
    total = shell_sums(padding**weight.ndim * right_half(weight)[inside], shell, shells)
    count = shell_sums(np.ones(len(shell)), shell, shells)
    return np.divide(count, total, out=np.zeros(shells), where=total > 1e-10)


def reconstruct(
    data: ComplexArray, weight: Array, tau2: Array | None, box: int, r_max: int, padding: int, fudge: float
) -> Array:
    """Real-space map of sums on the padded grid; `tau2` None leaves the prior out."""
    ndim = data.ndim
    half = data.shape[0] // 2
    r2 = grid_radius2(data.shape)
    inside = r2 < (padding * r_max) ** 2
    r = np.sqrt(r2) / padding
    weight = weight.copy()
    if tau2 is not None:
        shell = round_away(r)
        regular = inside & (shell >= 5)
        prior = tau2[shell[regular]]
        small = 1 / (0.001 * np.where(weight[regular] > 0, weight[regular], np.inf))
        weight[regular] += np.where(prior > 0, 1 / (padding**ndim * fudge * np.where(prior > 0, prior, 1)), small)
    shell = np.minimum(np.floor(r).astype(np.int64), r_max - 1)
    counted = right_half(inside)
    total = shell_sums(right_half(weight)[counted], right_half(shell)[counted], r_max)
    floor = total / shell_sums(np.ones(counted.sum()), right_half(shell)[counted], r_max) / 1000
    weight = np.maximum(weight, floor[shell])
    kept = (r2 <= (padding * r_max) ** 2) & (weight > 0)
    transform = np.divide(data, weight, out=np.zeros_like(data), where=kept)

    # onto the half transform of the padded box; of the Nyquist planes only +L·padding/2 exists
    large = padding * box
    k = np.argwhere(kept) - half
    k = k[(k[:, -1] >= 0) & (k > -large // 2).all(1) & (k <= large // 2).all(1)]
    padded = np.zeros((large,) * (ndim - 1) + (large // 2 + 1,), complex)
    padded[tuple((k % large).T)] = transform[tuple((k + half).T)]
    image = np.fft.irfftn(padded, (large,) * ndim, axes=range(ndim)) * large**ndim
    start = large // 2 - box // 2
    image = np.fft.fftshift(image)[(slice(start, start + box),) * ndim]
    image = image / (padding**ndim * (box if ndim == 3 else 1))
    image = fill_outside(image, box / 2, 3)
    return image / sinc2(box, ndim, padding)


def low_pass(volume: Array, pixel_size: float, resolution: float) -> Array:
    """Raised-cosine low-pass, two Fourier pixels wide around L · pixel_size / resolution."""
    box = volume.shape[0]
    axes = [np.fft.fftfreq(box) * box] * (volume.ndim - 1) + [np.fft.rfftfreq(box) * box]
    r = np.sqrt(sum(g**2 for g in np.meshgrid(*axes, indexing="ij")))
    filtered = np.fft.rfftn(volume) * low_pass_curve(r, box * pixel_size / resolution)
    return np.fft.irfftn(filtered, volume.shape, axes=range(volume.ndim))


def low_pass_curve(r: Array, radius: float) -> Array:
    """1 below radius − 1, 0 above radius + 1 (Fourier pixels)."""
    ramp = 0.5 + 0.5 * np.cos(np.pi * (r - radius + 1) / 2)
    return np.where(r < radius - 1, 1.0, np.where(r > radius + 1, 0.0, ramp))


def resolution_shell(data_vs_prior: Array) -> int:
    """Shell before the first with data-vs-prior below 1; a later one above 1, more than three shells on, wins."""
    below = np.flatnonzero(data_vs_prior[1:] < 1) + 1
    shell = int(below[0]) - 1 if len(below) else len(data_vs_prior) - 1
    later = np.flatnonzero(data_vs_prior > 1)
    if len(later) and later[-1] > shell + 3:
        shell = int(later[-1])
    return max(shell, 5)


def maximization(
    halves: list[Expectation],
    groups: list[NDArray[np.int64]],
    models: list[Model],
    optics: Optics,
    settings: Settings,
    *,
    join_angst: float | None = None,
    resolution_angst: float = 0.0,
    ini_high: float | None = None,
    combine: bool = False,
) -> Maximization:
    """The M-step.

    Two `halves`: gold-standard refinement, tau2 from the FSC, low resolution joined out to
    max(`join_angst`, `resolution_angst`). One: classification, tau2 from the power of the references that the
    iteration started from. `groups` (n,) scale group of each particle, a half each. `ini_high` low-passes the new
    maps (done after the cross-correlation iteration). `combine`: the last iteration, both halves make one map.
    """
    references = models[0].references
    classes, ndim, box = len(references), references.ndim - 1, references.shape[-1]
    padding, r_max = settings.padding, settings.current_size // 2
    shells = box // 2 + 1
    sums = [[(half.data[k].copy(), half.weight[k].copy()) for k in range(classes)] for half in halves]
    if ndim == 3:
        sums = [[symmetrise(*pair, settings.operators, padding * r_max) for pair in half] for half in sums]

    fsc = np.zeros(shells)
    if len(halves) == 2:
        if join_angst is not None:
            # a resolution that is a shell's own must not step up by rounding
            limit = int(np.ceil(box * optics.pixel_size / max(join_angst, resolution_angst) - 1e-6))
            for k in range(classes):
                (data1, weight1), (data2, weight2) = sums[0][k], sums[1][k]
                low = grid_radius2(data1.shape) <= (padding * limit) ** 2
                data1[low] = data2[low] = (data1[low] + data2[low]) / 2
                weight1[low] = weight2[low] = (weight1[low] + weight2[low]) / 2
        average = [downsampled_average(*half[0], r_max, padding) for half in sums]
        fsc = fourier_shell_correlation(average[0], average[1], r_max, shells)
        if combine:
            for k in range(classes):
                both = (sums[0][k][0] + sums[1][k][0], sums[0][k][1] + sums[1][k][1])
                sums[0][k] = sums[1][k] = both

    result = Maximization([], [], fsc, [], [], [], 0)
    for half, model, group, sum_of in zip(halves, models, groups, sums, strict=True):
        maps = np.zeros_like(references)
        tau2, ratio, sigma2 = (np.zeros((classes, shells)) for _ in range(3))
        for k in range(classes):
            data, weight = sum_of[k]
            sigma2[k] = noise_in_reconstruction(weight, r_max, padding, shells)
            if len(halves) == 2:
                f = np.maximum(fsc, 0.001)
                if combine:
                    f = np.sqrt(2 * f / (1 + f))
                f = np.minimum(f, 0.999)
                ratio[k] = settings.tau2_fudge * f / (1 - f)
                tau2[k] = ratio[k] * sigma2[k]
            else:
                power = reference_power(padded_transform(model.references[k], r_max, padding), r_max, padding, shells)
                tau2[k] = power
                ratio[k] = np.divide(settings.tau2_fudge * power, sigma2[k], out=np.zeros(shells), where=sigma2[k] > 0)
            maps[k] = reconstruct(data, weight, tau2[k], box, r_max, padding, settings.tau2_fudge)
        if ini_high is not None:
            curve = low_pass_curve(np.arange(shells), box * optics.pixel_size / ini_high)
            maps = np.array([low_pass(m, optics.pixel_size, ini_high) for m in maps])
            tau2, ratio = tau2 * curve**2, ratio * curve**2
        result.unmasked.append(maps)
        result.tau2.append(tau2)
        result.data_vs_prior.append(ratio)
        result.sigma2_reconstruction.append(sigma2)

        new = replace(model)
        radius = settings.particle_diameter / (2 * optics.pixel_size)
        new.references = maps if combine else maps * (1 - soft_outside(radii(box, ndim), radius, 5))
        new.norm_average = half.norm.sum() / half.sum_weight if settings.do_norm else model.norm_average
        new.scale = new_scale(half, model, group, settings)
        new.pdf_direction = half.pdf_direction / half.sum_weight
        new.sigma_offset = max(np.sqrt(half.offset / (2 * half.sum_weight)), np.sqrt(2.0))
        if ndim == 2:
            new.prior_offset = half.prior_offset / half.sum_weight
        if not settings.cross_correlation:
            pixels = shell_sums(np.ones(len(half_plane(box)[2])), half_plane(box)[2], shells)
            new.sigma2 = half.noise / (2 * half.sum_weight * pixels)
            for s in range(1, shells):
                if new.sigma2[s] < 1e-14:
                    new.sigma2[s] = new.sigma2[s - 1]
        new.data_vs_prior = result.data_vs_prior[0]
        result.models.append(new)
    if ini_high is not None:
        result.resolution_shell = int(round_away(box * optics.pixel_size / ini_high))
    else:
        result.resolution_shell = max(resolution_shell(r) for r in result.data_vs_prior[0])
    return result


def new_scale(half: Expectation, model: Model, group: NDArray[np.int64], settings: Settings) -> Array:
    """Scale of every group: XA / AA, within a factor five of the median, mean over particles set to 1."""
    if not settings.do_scale or settings.cross_correlation or len(model.scale) < 2:
        return model.scale
    scale = np.where(half.aa > 0, half.xa / np.where(half.aa > 0, half.aa, 1), 1)
    middle = np.median(scale)
    scale = np.clip(scale, middle / 5, 5 * middle)
    return scale / (np.bincount(group, minlength=len(scale)) @ scale / len(group))


# ------------------------------------------------------------------ before the first iteration


def initial_noise(images: Array, optics: Optics, particle_diameter: float) -> Array:
    """Noise spectrum (L/2+1,) before the first iteration: half the mean shell power of the masked images minus half
    the shell power of their mean; a negative shell takes its lower neighbour.

    Shells are averaged over the whole half transform, so the mates on kx = 0 count twice.
    """
    box = images.shape[-1]
    shells = box // 2 + 1
    kx, ky, _ = window(box)
    shell = round_away(np.hypot(kx, ky))
    count = shell_sums(np.ones(len(shell)), shell, shells)

    def power(image: Array) -> Array:
        return shell_sums(np.abs(centred_fft(image)[ky, kx]) ** 2, shell, shells) / count

    masked = [fill_outside(image, particle_diameter / (2 * optics.pixel_size), 5) for image in images]
    sigma2 = sum(power(image) for image in masked) / len(images) / 2 - power(sum(masked) / len(images)) / 2
    for s in range(1, shells):
        if sigma2[s] < 0:
            sigma2[s] = sigma2[s - 1]
    return sigma2


# ------------------------------------------------------------------ a small problem


def phantom(box: int, pixel_size: float, rng: np.random.Generator, ndim: int = 3) -> Array:
    """A lopsided heap of Gaussian blobs within 0.3 L of the centre."""
    axis = (np.arange(box) - box // 2) * pixel_size
    grid = np.meshgrid(*[axis] * ndim, indexing="ij")
    reach = 0.3 * box * pixel_size
    out = np.zeros((box,) * ndim)
    for _ in range(12):
        centre = rng.uniform(-reach, reach, ndim) / np.sqrt(ndim)
        out += np.exp(-sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) / (2 * (1.6 * pixel_size) ** 2))
    return out


@dataclass
class Problem:
    """Particles of one or two halves with everything that an iteration needs."""

    halves: list[Particles]
    models: list[Model]
    optics: Optics
    sampling: Sampling
    settings: Settings


def example(
    ndim: int, classes: int, *, seed: int = 1, n: int = 20, box: int = 24, halves: int = 1, perturbation: float = 0.3,
    local: bool = False, groups: int = 2, operators: Array | None = None, pixels: NDArray[np.int64] | None = None,
    cross_correlation: bool = False,
) -> Problem:  # fmt: skip
    """A problem of `n` noisy particles: 3D or 2D, with offsets, norm corrections, scale groups and unequal priors.

    `pixels`: NEST directions of order 1 (every third by default); `local` searches all 48 with sigmas of 20° around
    the true poses turned by a few degrees.
    """
    rng = np.random.default_rng(seed)
    pixel_size, shells = 4.0, box // 2 + 1
    optics = Optics(300.0, 2.7, 0.1, pixel_size)
    truth = np.array([phantom(box, pixel_size, rng, ndim) for _ in range(classes)]) * (0.25 if ndim == 3 else 1.2)
    if pixels is None:
        pixels = np.arange(0, 48, 1 if local else 3)
    flat = ndim == 2
    sampling = Sampling(
        psi_step=20.0 if flat else 30.0, offset_range=9.0, offset_step=6.0, perturbation=perturbation,
        healpix_order=-1 if flat else 1, pixels=np.zeros(1, np.int64) if flat else pixels,
        local_sigma=(20.0, 20.0) if local else None,
    )  # fmt: skip
    settings = Settings(
        particle_diameter=0.7 * box * pixel_size, current_size=box - 4, coarse_size=box // 2 + 2, tau2_fudge=2.0,
        operators=np.eye(3)[None] if operators is None else operators, cross_correlation=cross_correlation,
    )  # fmt: skip
    kx, ky, _ = half_plane(box)
    transforms = [padded_transform(t, box // 2, 2) for t in truth]
    parts, models = [], []
    for _ in range(halves):
        count = n // halves
        images, poses = [], []
        parameters = np.column_stack(
            [rng.uniform(6e3, 2e4, count), rng.uniform(6e3, 2e4, count), rng.uniform(0, 180, count)]
            + [np.full(count, v) for v in (5.0, 20.0, 1.0)]
        )
        origins = rng.normal(0, 5, (count, 2))
        for i in range(count):
            euler = np.array([rng.uniform(-180, 180), np.rad2deg(np.arccos(rng.uniform(-1, 1))), rng.uniform(0, 360)])
            if flat:
                euler[:2] = 0
            poses.append(euler)
            cut = central_slice(transforms[i % classes], rotation(*euler), kx, ky, box // 2, 2)
            cut = cut * ctf(optics, parameters[i], kx, ky, box) * phase_ramp(-origins[i] / pixel_size, kx, ky, box)[0]
            half = np.zeros((box, box // 2 + 1), complex)
            half[ky, kx] = cut
            half[-ky[(kx == 0) & (ky > 0)], 0] = cut[(kx == 0) & (ky > 0)].conj()
            image = np.fft.fftshift(np.fft.irfft2(half, (box, box))) * box**2
            images.append(image)
        norm, group, scale = rng.uniform(0.8, 1.25, count), np.arange(count) % groups, np.linspace(0.9, 1.1, groups)
        stack = scale[group][:, None, None] * np.array(images) + rng.normal(size=(count, box, box))
        stack *= norm[:, None, None]
        euler = np.array(poses) + rng.normal(0, 4, (count, 3)) * ([0, 0, 1] if flat else 1)
        parts.append(
            Particles(stack, parameters, origins + rng.normal(0, 2, (count, 2)), norm, group, euler)
        )  # fmt: skip
        references = np.array([low_pass(t, pixel_size, 4 * pixel_size) for t in truth])
        references += rng.normal(0, 0.05 * truth.std(), references.shape)
        directions = rng.uniform(0.2, 1, (classes, len(sampling.pixels)))
        directions[:, 1:] *= rng.random(directions[:, 1:].shape) > 0.1  # some directions are dead
        models.append(
            Model(
                references=references, sigma2=initial_noise(stack, optics, settings.particle_diameter),
                pdf_direction=directions / directions.sum(), sigma_offset=6.0, norm_average=1.03,
                scale=scale, data_vs_prior=np.tile(np.linspace(8, 0, shells), (classes, 1)),
                prior_offset=rng.normal(0, 2, (classes, 2)) * flat,
            )
        )  # fmt: skip
    return Problem(parts, models, optics, sampling, settings)
