r"""Rotational correlation of images with references, straight and mirrored, at every shift: the best of each image.

With p the polar image around centre + s, q a polar reference (zero mean, unit variance) and μ the share of the disc of
a sample, the correlation coefficient at the angle α is

.. math:: C(s, α) = \frac{1}{σ_p(s)} \sum_r μ_r \sum_i p_s(r, θ_i)\, q(r, θ_i - α)
          = \frac{1}{σ_p(s)} \Re \sum_{m \ge 0} ε_m e^{imα} \sum_r \frac{μ_r}{n_r} P_{rm} Q_{rm}^*,

ε₀ = 1 and 2 otherwise; a mirrored reference q(π - φ) takes (-1)^m Q_{rm} for Q_{rm}^*. Both are normalised over the
disc, weighted by radius, at every shift (Yang et al. 2012, ISAC), so references of unequal energy compete fairly.
EMAN2's convention: aligned = mirror_x(rotate by α, then shift), which looks like the reference.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchem.ops.polar import SHORTEST, Rings, centred, polar_samples, quarter_waves, resampling, ring_spectra

# images of one block of the matrix products on a CPU, and of a peak's refinement
BLOCK = 96
# the kernels: bytes of spectra and sums held at once, and sums of how many references at most
CHUNK_BYTES, REFERENCES_AT_ONCE = 3 * 2**27, 64
# images side by side: a multiple of what a program takes
IMAGES = 64
# launches: rows, columns, warps, stages and rings of a step of the sums; columns, pairs, warps and stages of
# the angles; samples and registers of the peaks
SUM_ROWS, SUM_COLUMNS, SUM_WARPS, SUM_STAGES, RINGS_DEPTH = 64, 128, 4, 5, 16
ANGLE_COLUMNS, ANGLE_PAIRS, ANGLE_WARPS, ANGLE_STAGES = 64, 20, 8, 3
PEAK_SAMPLES, PEAK_REGISTERS = 32, 80
# rings and angles of profiles whose values fill one line of a cache: neighbouring samples ask for few lines
TILE_RINGS, TILE_ANGLES = 4, 8
# sums over rings are stored times this, so that half precision keeps their digits
UNIT = 2.0**12
# half precision may err by MARGIN, of which frequencies that are left out make FREQUENCY_ERROR rms; so many (reference,
# mirror) within it of an image's best are compared in float32
MARGIN, CANDIDATES, FREQUENCY_ERROR = 1e-3, 4, 1e-4
# quadratics through neighbours 1 px apart, the second around the maximum of the first: neighbours that are whole pixels
# apart are interpolated alike, so that the smoothing of noise between pixels does not move the peak
PASSES = 2


@dataclass(frozen=True)
class Shifts:
    """Centres that are tried: multiples of ``step`` up to ``x_range`` and ``y_range`` (pixels) on either side."""

    x_range: float
    y_range: float
    step: float

    def axis(self, reach: float) -> list[float]:
        count = math.floor(reach / self.step + 1e-6)
        return [i * self.step for i in range(-count, count + 1)]

    def table(self) -> Tensor:
        """`(t, 2)` float64 pixels (x, y)."""
        y, x = torch.meshgrid(
            *(torch.tensor(self.axis(r), dtype=torch.float64) for r in (self.y_range, self.x_range)), indexing="ij"
        )
        return torch.stack([x.flatten(), y.flatten()], 1)

    def free(self) -> tuple[bool, bool]:
        """Whether there is anything to be found along x and y."""
        return len(self.axis(self.x_range)) > 1, len(self.axis(self.y_range)) > 1


@dataclass(frozen=True)
class References:
    """References for :func:`align`; what compares them with images is made when first asked for.

    Attributes
    ----------
    images
        `(k, L, L)`.
    mirror
        whether they are compared mirrored, too.
    """

    images: Tensor
    rings: Rings
    mirror: bool = True

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def sides(self) -> int:
        return 2 if self.mirror else 1

    @functools.cached_property
    def polar(self) -> tuple[Tensor, Tensor]:
        """:func:`polar_references`."""
        return polar_references(self.images, self.rings)

    @property
    def transform(self) -> Tensor:
        """`(k, rings, 2, a/2)`: real and imaginary parts of ε μ/n Q; 0 where a ring has no such frequency."""
        return self.polar[0]

    @property
    def profiles(self) -> Tensor:
        """`(k, rings, a)`: μ q at the angles by which samples and turned references can differ.

        Multiples of the step between angles for the longest rings, of which shorter ones lie half a step off.
        """
        return self.polar[1]

    @functools.cached_property
    def tiles(self) -> Tensor:
        """`(k, rings/4, a/8, 4, 8)`: profiles as the kernels read them, rings made up to whole tiles."""
        padded = torch.nn.functional.pad(self.profiles, (0, 0, 0, -len(self.rings.radii) % TILE_RINGS))
        return padded.unflatten(1, (-1, TILE_RINGS)).unflatten(3, (-1, TILE_ANGLES)).transpose(2, 3).contiguous()

    @functools.cached_property
    def spectra(self) -> list[Tensor]:
        """For each band of the rings `(2, 2, m, 2·sides·k, rings)`: what takes P to sums over rings.

        Real and imaginary parts of P, for even and odd frequencies, to the real and then the imaginary parts of
        Σ ε μ/n P Q*, and with mirrors of Σ ε μ/n P Q.
        """
        by_parity = self.transform.unflatten(3, (-1, 2)).permute(2, 4, 3, 0, 1)  # (2, 2, a/4, k, rings)
        spectra = []
        for band in self.rings.bands:
            real, imaginary = by_parity[:, :, band.low // 2 : band.high // 2, :, : band.n_rings]
            # columns that real and imaginary parts meet, and rows of real and imaginary, straight and mirrored results
            of_real = [real, real, -imaginary, imaginary][:: 1 if self.mirror else 2]
            of_imaginary = [imaginary, -imaginary, real, real][:: 1 if self.mirror else 2]
            spectra.append(torch.stack([torch.cat(of_real, 2), torch.cat(of_imaginary, 2)]))
        return spectra

    @functools.cached_property
    def n_frequencies(self) -> int:
        """How many frequencies the kernels' search looks at, a power of two; waits for the device.

        Others are left out if the error of a coefficient with an image of white noise stays below FREQUENCY_ERROR:
        for a share f of the reference's energy, and N pixels within the last ring, it is √(f/N) rms.
        """
        counts, energies = _frequency_tables(self.rings, self.images.dtype, self.images.device)
        beyond = (self.transform.flatten(1).square() @ energies).amax(0).tolist()
        allowed = FREQUENCY_ERROR**2 * math.pi * self.rings.last**2
        return next(count for count, rest in zip(counts, beyond, strict=True) if not rest > allowed)

    @property
    def width(self) -> int:
        """Real and imaginary parts of all rings, in whole steps of the kernels' sums."""
        return -(-2 * len(self.rings.radii) // RINGS_DEPTH) * RINGS_DEPTH

    @functools.cached_property
    def operand(self) -> Tensor:
        """`(m, 2·sides·k, width)` float16: UNIT times what takes a frequency's spectra to sums over rings.

        Columns: real and imaginary parts, ring by ring, 0 beyond the frequency's rings; rows: reference, real or
        imaginary part of the sum, side.
        """
        real, imaginary = (self.transform[..., : self.n_frequencies] * UNIT).half().unbind(2)  # (k, rings, m)
        # rows of real and imaginary, straight and mirrored results; columns that real and imaginary parts meet
        terms = torch.stack([real, imaginary, real, -imaginary, -imaginary, real, imaginary, real])
        terms = terms.unflatten(0, (2, 2, 2))[:, : self.sides].permute(5, 3, 0, 1, 4, 2).flatten(1, 3).flatten(2)
        operand = terms.new_zeros((*terms.shape[:2], self.width))
        operand[..., : terms.shape[2]] = terms
        return operand


@dataclass
class Alignment:
    """Where each image fits best: aligned(x) = image(R(α) M x + offset), M the mirror of x.

    Attributes
    ----------
    reference, mirror
        `(n,)` int64 and bool.
    angle
        `(n,)` radians, α.
    offset
        `(n, 2)` pixels (x, y): the aligned image's centre in the image, from pixel L//2.
    peak
        `(n,)` correlation coefficient.
    """

    reference: Tensor
    mirror: Tensor
    angle: Tensor
    offset: Tensor
    peak: Tensor

    def shift(self) -> Tensor:
        """`(n, 2)` EMAN2's sx and sy in pixels, applied after the rotation by alpha: -R(-α) offset."""
        c, s = self.angle.cos(), self.angle.sin()
        x, y = self.offset.unbind(-1)
        return -torch.stack([c * x + s * y, c * y - s * x], -1)


def polar_references(references: Tensor, rings: Rings) -> tuple[Tensor, Tensor]:
    """Sample, normalise and transform references `(k, L, L)`: ``transform`` and ``profiles`` of :class:`References`.

    Float32 on a GPU goes through the Triton kernels.
    """
    if references.is_cuda and references.dtype == torch.float32:
        return polar_references_by_kernels(references, rings)
    k, n_angles = len(references), rings.n_angles
    pixels, shares = centred(rings, references.dtype, references.device)
    weights = _weights(rings, references.dtype, references.device)
    samples = (references.flatten(1)[:, pixels] * shares).sum(2)
    samples = samples - (samples @ weights)[:, None]
    power = samples.square() @ weights
    # an empty reference stays empty, and correlates with nothing
    samples = samples * weights * torch.where(power > 0, power, 1.0).rsqrt()[:, None]
    both = samples.new_empty((k, len(rings.radii), 2 * n_angles))
    all_waves, row = _reference_waves(rings, samples.dtype, samples.device), 0
    for (n, start, count), waves in zip(rings.groups, all_waves.split([n for n, _, _ in rings.groups]), strict=True):
        group = samples[:, row : row + n * count].unflatten(1, (n, count)).mT
        torch.bmm(group, waves.expand(k, -1, -1), out=both[:, start : start + count])
        row += n * count
    return both[..., :n_angles].unflatten(2, (2, -1)), both[..., n_angles:].contiguous()


def correlation_table(images: Tensor, centres: Tensor, references: References) -> Tensor:
    """Correlation coefficients at every angle: the reference, which holds all of them.

    Parameters
    ----------
    images
        `(n, L, L)` of the references' dtype.
    centres
        `(n, t, 2)` pixels (x, y) from pixel L//2.

    Returns
    -------
    `(n, t, 1 or 2, k, a)`: straight and mirrored, at the angles (i + ½)·2π/a.
    """
    rings, (n, t) = references.rings, centres.shape[:2]
    samples = polar_samples(images.repeat_interleave(t, 0), rings, centres.flatten(0, 1)).T
    quarters = _angles(_products(ring_spectra(samples, rings), references), rings)
    table = _natural(quarters) * _inverse_deviation(samples, rings)
    if references.mirror:  # mirrored references are turned by half a circle
        table[:, 1] = table[:, 1].roll(rings.n_angles // 2, 0)
    return table.movedim(-1, 0).unflatten(0, (n, t)).movedim(2, -1)


def align(images: Tensor, centres: Tensor, references: References, shifts: Shifts) -> Alignment:
    """Find reference, mirror, angle and shift of the highest correlation coefficient.

    The best point of the grid, then the maximum of the quadratic through its neighbours in angle and both shifts.

    Parameters
    ----------
    images
        `(n, L, L)`.
    centres
        `(n, 2)` whole pixels (x, y) from pixel L//2, around which shifts are tried.
    references
        of the images' dtype and device; float32 on a GPU goes through the Triton kernels.
    """
    if images.is_cuda and images.dtype == torch.float32:
        return align_by_kernels(images, centres, references, shifts)
    scores = best_scores(images, centres, references, shifts)
    best = scores.flatten(1).argmax(1)
    k = references.count
    shift = shifts.table().to(images.device)[best // scores[0, 0].numel()]
    mirror = best // k % references.sides == 1
    return refine_peaks(images, centres + shift, references, best % k, mirror, shifts.free())


def best_scores(images: Tensor, centres: Tensor, references: References, shifts: Shifts) -> Tensor:
    """The best angle's correlation coefficient: `(n, t, 1 or 2, k)`, mirrored ones second."""
    rings, table = references.rings, shifts.table()
    result = images.new_empty((len(table), references.sides, references.count, len(images)))
    for start in range(0, len(images), BLOCK):
        part = slice(start, start + BLOCK)
        columns = _columns(images[part], centres[part])
        for t, (x, y) in enumerate(table.tolist()):
            samples = resampling(rings, x, y, images.dtype, images.device) @ columns
            highest = _highest(_products(ring_spectra(samples, rings), references), rings)
            torch.mul(highest, _inverse_deviation(samples, rings), out=result[t, ..., part])
    return result.movedim(-1, 0)


def refine_peaks(
    images: Tensor, centres: Tensor, references: References, reference: Tensor, mirror: Tensor,
    free: tuple[bool, bool] = (True, True),
) -> Alignment:  # fmt: skip
    """Angle, offset and height of a given reference's peak near a given centre, interpolated.

    Parameters
    ----------
    centres
        `(n, 2)` pixels (x, y) from pixel L//2.
    reference, mirror
        `(n,)`.
    free
        whether the centre may move along x and y.
    """
    rings = references.rings
    unit = 2 * math.pi / rings.n_angles
    centres = centres.double().clone()
    angle, peak = (centres.new_empty(len(images)) for _ in range(2))
    for part in torch.arange(len(images), device=images.device).split(BLOCK):
        own, sides = reference[part], mirror[part]
        for step in range(PASSES):
            samples = polar_samples(images[part], rings, centres[part], neighbours=True)
            if step == 0:
                nearest = _best_angle(samples[:, 1, 1].T, references, own, sides)
            values = _scores(samples.flatten(1, 2), references, own, sides, nearest).unflatten(2, (3, 3))
            moved, peak[part] = quadratic_peak(values, (True, free[1], free[0]))
            centres[part] += moved[:, [2, 1]]
            angle[part] = (nearest + 0.5 + moved[:, 0]) * unit
            nearest = (nearest + moved[:, 0]).round().long() % rings.n_angles
    return Alignment(reference, mirror, angle, centres, peak)


def quadratic_peak(values: Tensor, free: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor]:
    """Maximum of the least-squares quadratic through 3 × 3 × 3 values.

    Parameters
    ----------
    values
        `(n, 3, 3, 3)`.
    free
        the axes along which the maximum is looked for.

    Returns
    -------
    `(n, 3)` float64 place in steps from the middle, at most 1 along each axis, and `(n,)` float64 height.
    """
    matrix, bias = _quadratic(free, values.device)
    coefficients = torch.addmm(bias, values.double().flatten(1), matrix)
    constant, gradient, hessian = coefficients[:, 0], coefficients[:, 1:4], coefficients[:, 4:].unflatten(1, (3, 3))
    # a maximum if minus the Hessian has positive minors; without one, along each axis by itself if it has one there
    adjugate = torch.linalg.cross(hessian.roll(-1, 1), hessian.roll(-2, 1))
    determinant = (hessian[:, 0] * adjugate[:, 0]).sum(1, keepdim=True)
    peaked = (hessian[:, :1, 0] < 0) & (adjugate[:, 2:, 2] > 0) & (determinant < 0)
    diagonal = hessian.diagonal(dim1=1, dim2=2).clamp(max=-torch.finfo(torch.float64).tiny)
    newton = (adjugate * gradient[:, None]).sum(2) / determinant
    step = -torch.where(peaked, newton, gradient / diagonal).clamp(-1, 1)
    curved = torch.where(peaked, (hessian * step[:, None]).sum(2), diagonal * step)
    return step, constant + ((gradient + 0.5 * curved) * step).sum(1)


@functools.lru_cache
def _quadratic(free: tuple[bool, bool, bool], device: torch.device) -> tuple[Tensor, Tensor]:
    """What takes 3 × 3 × 3 values to constant, gradient and Hessian of the quadratic along the free axes.

    `(27, 13)`, and `(13,)` to be added: along the others it falls by itself.
    """
    axes = [axis for axis in range(3) if free[axis]]
    places = torch.cartesian_prod(*[torch.arange(-1.0, 2.0, dtype=torch.float64)] * 3)
    pairs = list(itertools.combinations_with_replacement(axes, 2))
    columns = [torch.ones(27, dtype=torch.float64), *(places[:, i] for i in axes)]
    terms = torch.stack(columns + [places[:, i] * places[:, j] for i, j in pairs], 1)
    taken = [not any(place[axis] for axis in range(3) if axis not in axes) for place in places]
    inverse = torch.zeros(terms.shape[1], 27, dtype=torch.float64)
    inverse[:, taken] = torch.linalg.pinv(terms[taken])
    matrix, bias = torch.zeros(27, 13, dtype=torch.float64), torch.zeros(13, dtype=torch.float64)
    matrix[:, [0, *(1 + axis for axis in axes)]] = inverse[: 1 + len(axes)].T
    for (row, column), values in zip(pairs, inverse[1 + len(axes) :], strict=True):
        matrix[:, 4 + 3 * row + column] += values
        matrix[:, 4 + 3 * column + row] += values
    for axis in set(range(3)) - set(axes):
        bias[4 + 4 * axis] = -1
    return matrix.to(device), bias.to(device)


def _columns(images: Tensor, centres: Tensor) -> Tensor:
    """Images around whole-pixel centres, flattened, side by side `(L², b)`; an image's edge goes on."""
    box = images.shape[-1]
    images = (images - images.mean((1, 2), keepdim=True)) / images.std((1, 2), keepdim=True).clamp(min=1e-30)
    axis = torch.arange(box, device=images.device)
    x, y = ((axis + c[:, None]).clamp(0, box - 1) for c in centres.round().long().unbind(1))
    pixel = (y[:, :, None] * box + x[:, None, :]).flatten(1)
    return images.flatten(1).gather(1, pixel).T.contiguous()


def _inverse_deviation(samples: Tensor, rings: Rings) -> Tensor:
    """`(b,)`: one over the weighted standard deviation of each column; 0 for a flat one."""
    weights = _weights(rings, samples.dtype, samples.device)
    variance = weights @ samples.square() - (weights @ samples).square()
    return torch.where(variance > 0, variance, torch.inf).rsqrt()


@functools.lru_cache(maxsize=16)
def _weights(rings: Rings, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(samples,)`: share of the disc, in the samples' order; they add up to 1."""
    return rings.weights()[rings.points()[0]].to(device, dtype)


@functools.lru_cache(maxsize=16)
def _reference_waves(rings: Rings, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(n, 2·a)` of each length of rings, one below another: what takes weighted samples to transform and profiles."""
    result = []
    for n, _, _ in rings.groups:
        first = (torch.arange(n // 4, dtype=torch.float64) + 0.5) * (2 * math.pi / n)
        theta = torch.cat([first, math.pi - first, math.pi + first, -first])
        m = torch.arange(n // 2, dtype=torch.float64)
        factor = torch.where(m > 0, 2.0, 1.0) / n
        real, imaginary = (theta[:, None] * m).cos() * factor, -(theta[:, None] * m).sin() * factor
        steps = torch.arange(rings.n_angles, dtype=torch.float64) + (0.0 if n == rings.n_angles else 0.5)
        turn = m[:, None] * steps * (2 * math.pi / rings.n_angles)
        profile = real @ turn.cos() - imaginary @ turn.sin()
        beyond = (0, rings.n_angles // 2 - n // 2)
        parts = [torch.nn.functional.pad(part, beyond) for part in (real, imaginary)]
        result.append(torch.cat([*parts, profile], 1))
    return torch.cat(result).to(device, dtype)


def _products(spectra: Tensor, references: References) -> Tensor:
    """Sums over rings of all images with all references: `(2, a/4, 2, sides, k, b)`, real and imaginary parts."""
    b, sides, k = spectra.shape[-1], references.sides, references.count
    result = spectra.new_empty((2, references.rings.n_angles // 4, 2 * sides * k, b))
    for band, q in zip(references.rings.bands, references.spectra, strict=True):
        rows = slice(band.low // 2, band.high // 2)
        for parity in (0, 1):
            out = result[parity, rows]
            torch.bmm(q[0, parity], spectra[0, parity, rows, : band.n_rings], out=out)
            out.baddbmm_(q[1, parity], spectra[1, parity, rows, : band.n_rings])
    return result.unflatten(2, (2, sides, k))


def _waves(products: Tensor, rings: Rings) -> Tensor:
    """`(2, 2, a/4, …)`: sums of cosines and of sines, over even and odd frequencies, at the first quarter's angles."""
    waves = quarter_waves(rings.n_angles, products.dtype, products.device)
    result = products.new_empty((2, 2, *products.shape[1:2], *products.shape[3:]))
    for part in (0, 1):
        for parity in (0, 1):
            torch.mm(waves[part, parity].T, products[parity, :, part].flatten(1), out=result[part, parity].flatten(1))
    return result


def _angles(products: Tensor, rings: Rings) -> Tensor:
    """`(4, a/4, …)`: correlations at θ, π - θ, π + θ and -θ."""
    (even, odd), (sine_even, sine_odd) = _waves(products, rings)
    near, far, s, d = even + odd, even - odd, sine_even + sine_odd, sine_even - sine_odd
    return torch.stack([near - s, far + d, far - d, near + s])


def _natural(quarters: Tensor) -> Tensor:
    """Angles in their order, `(a, …)`."""
    return torch.cat([quarters[0], quarters[1].flip(0), quarters[2], quarters[3].flip(0)])


def _highest(products: Tensor, rings: Rings) -> Tensor:
    """The largest over all angles."""
    (even, odd), (sine_even, sine_odd) = _waves(products, rings)
    near = (sine_even + sine_odd).abs_().add_(even).add_(odd).amax(0)
    return torch.maximum(near, sine_even.sub_(sine_odd).abs_().add_(even.sub_(odd)).amax(0))


def _best_angle(samples: Tensor, references: References, reference: Tensor, mirror: Tensor) -> Tensor:
    """`(b,)`: number of the angle at which each column `(samples, b)` fits its own reference best."""
    rings = references.rings
    products = []
    transform = ring_spectra(samples, rings)
    for band, q in zip(rings.bands, references.spectra, strict=True):
        p = transform[:, :, band.low // 2 : band.high // 2, : band.n_rings].mT[:, :, :, None]
        q = q.unflatten(3, (2, references.sides, references.count))
        own = q[:, :, :, :, mirror.long(), reference]  # (2, 2, m, 2, b, rings)
        products.append((own * p).sum((0, -1)))
    angles = _natural(_angles(torch.cat(products, 1), rings)).argmax(0)
    return (angles + mirror * (rings.n_angles // 2)) % rings.n_angles


def _scores(samples: Tensor, references: References, reference: Tensor, mirror: Tensor, nearest: Tensor) -> Tensor:
    """Correlation coefficients with each image's own reference at its nearest angle and one step to either side.

    Parameters
    ----------
    samples
        `(n, c, samples)`: at c centres.
    nearest
        `(n,)` number of the angle.

    Returns
    -------
    `(n, 3, c)`, summed sample by sample.
    """
    rings = references.rings
    ring, place = _places(rings, samples.device)
    # in half steps: θ - α, and π + α - θ for mirrored images
    alpha = 2 * (nearest[:, None] + torch.arange(-1, 2, device=samples.device))[..., None] + 1
    turned = torch.where(mirror[:, None, None], rings.n_angles + alpha - place, place - alpha) % (2 * rings.n_angles)
    profiles = references.profiles.flatten(1)[reference]
    profiles = profiles.gather(1, (ring * rings.n_angles + turned // 2).flatten(1)).unflatten(1, turned.shape[1:])
    weights = _weights(rings, samples.dtype, samples.device)
    variance = samples.square() @ weights - (samples @ weights).square()
    return (profiles @ samples.mT) * torch.where(variance > 0, variance, torch.inf).rsqrt()[:, None]


@functools.lru_cache(maxsize=16)
def _places(rings: Rings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ring of each sample, and its angle in halves of the step between the angles of a comparison."""
    ring, x, y = rings.points()
    place = (torch.atan2(y, x) * (rings.n_angles / math.pi)).round().long()
    return ring.to(device), place.to(device)


# on a GPU


def polar_references_by_kernels(references: Tensor, rings: Rings) -> tuple[Tensor, Tensor]:
    """:func:`polar_references` in float32 by the Triton kernels; moments in double precision."""
    from torchem.kernels import polar as kernels

    device, k, n_rings, n_angles = references.device, len(references), len(rings.radii), rings.n_angles
    samples = torch.empty((k, rings.n_samples), dtype=torch.float32, device=device)
    kernels.reference_samples[(k,)](
        references.contiguous(), *centred(rings, torch.float32, device), _weights(rings, torch.float64, device),
        samples, rings.n_samples, rings.box, SAMPLES=1024, num_warps=8,
    )  # fmt: skip
    both = torch.empty((2, k, n_rings, n_angles), dtype=torch.float32, device=device)
    kernels.reference_transform[(2 * n_angles // 64, n_rings, -(-k // 16))](
        samples, _ring_table(rings, device), _reference_waves(rings, torch.float32, device), both, k, n_rings,
        rings.n_samples, ANGLES=n_angles, REFERENCES=16, COLUMNS=64, DEPTH=32, num_warps=1,
    )  # fmt: skip
    return both[0].unflatten(2, (2, -1)), both[1]


@functools.lru_cache(maxsize=16)
def _ring_table(rings: Rings, device: torch.device) -> Tensor:
    """`(rings, 4)` int32: its first sample, how far apart its samples lie, their number, the first row of its waves."""
    rows, sample, wave = [], 0, 0
    for n, _, count in rings.groups:
        rows += [(sample + ring, count, n, wave) for ring in range(count)]
        sample, wave = sample + n * count, wave + n
    return torch.tensor(rows, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=16)
def _frequency_tables(rings: Rings, dtype: torch.dtype, device: torch.device) -> tuple[list[int], Tensor]:
    """Numbers of frequencies to choose from, and what takes |transform|² to the energy beyond: `(rings·a, counts)`."""
    most = rings.n_angles // 2
    counts = [SHORTEST // 2 << i for i in range((most // (SHORTEST // 2)).bit_length())]
    beyond = torch.arange(most)[:, None] >= torch.tensor(counts)
    inverse = 0.5 * torch.tensor(rings.lengths) / rings.weights()
    return counts, (inverse[:, None, None, None] * beyond.expand(2, -1, -1)).flatten(0, 2).to(device, dtype)


@dataclass(frozen=True)
class Tables:
    """What the kernels know of rings and the first frequencies, on their device.

    Attributes
    ----------
    radii
        `(rings,)` float32, and ``shares`` of the disc of one sample.
    circles, waves
        by a quarter of a ring's length: cosine and sine of its angles, and :func:`quarter_waves`.
    back_waves
        of the longest rings, angle before frequency // 2.
    first_row, ring_counts
        `(m,)` int32: the first row of each frequency in the spectra, and its number of rings.
    samples
        x, y, place of the ring in a reference's tiles, angle in halves of the step, and share of the disc, of all
        samples, row by row of pixels.
    """

    radii: Tensor
    shares: Tensor
    circles: dict[int, Tensor]
    waves: dict[int, Tensor]
    back_waves: Tensor
    first_row: Tensor
    ring_counts: Tensor
    n_rows: int
    samples: tuple[Tensor, ...]

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def of(rings: Rings, n_frequencies: int, device: torch.device) -> Tables:
        """The tables of one set of rings."""
        counts = torch.cat([torch.full((band.high - band.low,), band.n_rings) for band in rings.bands])[:n_frequencies]
        ends = (2 * counts).cumsum(0)
        angles = {
            n // 4: (torch.arange(n // 4, dtype=torch.float64) + 0.5) * (2 * math.pi / n) for n, _, _ in rings.groups
        }
        _, x, y = rings.points()
        ring, place = _places(rings, torch.device("cpu"))
        order = torch.argsort(y.floor() * rings.box + x)
        shares = rings.weights().float()
        tile = ring // TILE_RINGS * (TILE_RINGS * rings.n_angles) + ring % TILE_RINGS * TILE_ANGLES
        return Tables(
            radii=torch.tensor(rings.radii, dtype=torch.float32, device=device),
            shares=shares.to(device),
            circles={q: torch.stack([a.cos(), a.sin()]).float().to(device) for q, a in angles.items()},
            waves={q: quarter_waves(4 * q, torch.float16, device) for q in angles},
            back_waves=quarter_waves(rings.n_angles, torch.float16, device).mT.contiguous(),
            first_row=(ends - 2 * counts).int().to(device),
            ring_counts=counts.int().to(device),
            n_rows=int(ends[-1]),
            samples=tuple(
                values[order].to(device) for values in (x.float(), y.float(), tile.int(), place.int(), shares[ring])
            ),
        )  # fmt: skip


def align_by_kernels(images: Tensor, centres: Tensor, references: References, shifts: Shifts) -> Alignment:
    """:func:`align` by the Triton kernels: a search in half precision, the best few compared and refined in float32.

    Nothing here waits for the device once the references are ready, which they are made while it is busy with images.
    """
    centres, statistics = centres.double(), torch.var_mean(images, (1, 2))
    best = best_by_kernels(images, centres, references, shifts, statistics)
    # the best few references and sides
    best, which = best.topk(min(CANDIDATES, len(best)), dim=0)
    return peaks_by_kernel(images, statistics[1], centres, references, shifts, best, which)


@functools.lru_cache(maxsize=16)
def _shift_table(shifts: Shifts, device: torch.device) -> Tensor:
    return shifts.table().to(device)


def best_by_kernels(
    images: Tensor, centres: Tensor, references: References, shifts: Shifts, statistics: tuple[Tensor, Tensor]
) -> Tensor:
    """Highest correlation coefficients in half precision, and where: `(k·sides, n)` int64 that sort as they do.

    The value's bits in the order of integers, then 16 bits of the shift's number and 16 of the angle's.
    ``statistics``: variance and mean of each image.
    """
    from torchem.kernels import correlation as kernels
    from torchem.kernels import polar as polar_kernels

    rings, device, sides = references.rings, images.device, references.sides
    images, centres, (variance, mean) = images.contiguous(), centres.contiguous(), statistics
    n, pairs, quarter, box = len(images), sides * references.count, rings.n_angles // 4, rings.box
    best = torch.full((pairs, n), torch.iinfo(torch.int64).min, dtype=torch.int64, device=device)
    n_frequencies, depth, table = references.n_frequencies, references.width, _shift_table(shifts, device)
    tables, t = Tables.of(rings, n_frequencies, device), len(table)

    # images, shifts and pairs of reference and side whose spectra and sums are held at once
    pairs_at_once = min(pairs, sides * REFERENCES_AT_ONCE)
    most = CHUNK_BYTES // (2 * (tables.n_rows + 2 * n_frequencies * pairs_at_once))
    # all parts alike, as each is worked through whole
    blocks = max(1, -(-n // IMAGES))
    parts = -(-blocks // max(1, most // (t * IMAGES)))
    width = -(-blocks // parts) * IMAGES
    t_at_once = max(1, min(t, most // width))
    columns = torch.empty((box * box, width), dtype=torch.float16, device=device)
    # the last frequency's rows are read together with rings that are not there
    all_spectra = torch.empty((tables.n_rows + depth, t_at_once * width), dtype=torch.float16, device=device)
    all_spectra[tables.n_rows :].zero_()
    for start, first in itertools.product(range(0, n, width), range(0, t, t_at_once)):
        if first == 0:
            polar_kernels.image_columns[(-(-box * box // 64), width // 64)](
                images, mean, variance, centres, columns, start, n, width, box, IMAGES=64, PIXELS=64, num_warps=8
            )
        few = table[first : first + t_at_once]
        n_total = len(few) * width
        spectra = all_spectra.flatten()[: len(all_spectra) * n_total].view(-1, n_total)
        if n_total < t_at_once * width:
            spectra[tables.n_rows :].zero_()
        squares = torch.empty((len(rings.radii), n_total), dtype=torch.float32, device=device)
        for length, ring, count in rings.groups:
            frequencies = min(length, 2 * n_frequencies) // 4
            together, deep, warps = _spectra_launch(length, frequencies)
            polar_kernels.polar_spectra[(width // together, len(few), count)](
                columns, few, tables.radii, tables.circles[length // 4], tables.waves[length // 4], tables.first_row,
                spectra, squares, ring, width, n_total, box, QUARTER=length // 4, FREQUENCIES=frequencies,
                DEPTH=min(deep, length // 4), IMAGES=together, num_warps=warps, num_stages=1,
            )  # fmt: skip
        for pair in range(0, pairs, pairs_at_once):
            here = min(pairs_at_once, pairs - pair)
            products = torch.empty((n_frequencies, 2 * here, n_total), dtype=torch.float16, device=device)
            rows = min(SUM_ROWS, max(16, 1 << (2 * here - 1).bit_length()))
            kernels.ring_sums[(-(-2 * here // rows), -(-n_total // SUM_COLUMNS), n_frequencies)](
                references.operand[:, 2 * pair :], spectra, tables.first_row, tables.ring_counts, products, 2 * here,
                2 * pairs, n_total, WIDTH=depth, ROWS=rows, COLUMNS=SUM_COLUMNS, DEPTH=RINGS_DEPTH,
                num_warps=SUM_WARPS, num_stages=SUM_STAGES,
            )  # fmt: skip
            kernels.highest_angles[(n_total // ANGLE_COLUMNS, -(-here // ANGLE_PAIRS))](
                products, tables.back_waves, spectra, squares, tables.shares, best[pair:, start:], len(rings.radii),
                here, first, width, n - start, n, n_total, UNIT, QUARTER=quarter, FREQUENCIES=n_frequencies // 2,
                ANGLES=min(quarter, 64), COLUMNS=ANGLE_COLUMNS, SIDES=sides, PAIRS=ANGLE_PAIRS,
                ANGLE_BITS=rings.n_angles.bit_length() - 1, RINGS=32, num_warps=ANGLE_WARPS,
                num_stages=max(1, min(ANGLE_STAGES, 192 // n_frequencies)),
            )  # fmt: skip
    return best


def _spectra_launch(length: int, frequencies: int) -> tuple[int, int, int]:
    """Images and samples of a step and warps of a program: many frequencies leave registers for fewer of them."""
    if length <= 256:
        return (IMAGES, 32, 2) if frequencies <= 32 else (IMAGES, 64, 4)
    return (IMAGES // 2, 32, 4) if frequencies <= 128 else (IMAGES // 2, 64, 8)


def peaks_by_kernel(
    images: Tensor, means: Tensor, centres: Tensor, references: References, shifts: Shifts, best: Tensor, which: Tensor
) -> Alignment:
    """:func:`refine_peaks` in float32, of the best of each image's candidates.

    Parameters
    ----------
    means
        `(n,)` of the images.
    centres
        `(n, 2)` float64, around which the shifts were tried.
    best, which
        `(candidates, n)` int64, falling: see :func:`best_by_kernels`; and the row there, reference and side.
    """
    from torchem.kernels import correlation as kernels

    rings, tiles, device, n = references.rings, references.tiles, images.device, len(images)
    samples = Tables.of(rings, rings.n_angles // 2, device).samples
    free = shifts.free()
    pair = torch.empty(n, dtype=torch.int64, device=device)
    peaks = torch.empty((n, 4), dtype=torch.float64, device=device)
    kernels.refined_peaks[(n,)](
        images.contiguous(), means, best.contiguous(), which.contiguous(), _shift_table(shifts, device),
        centres.contiguous(), *samples, tiles, _quadratic_rows((True, free[1], free[0]), device), pair, peaks, n,
        len(best), len(samples[0]), tiles[0].numel(), rings.box, MARGIN, SIDES=references.sides, ANGLES=rings.n_angles,
        TILE_RINGS=TILE_RINGS, TILE_ANGLES=TILE_ANGLES, SAMPLES=PEAK_SAMPLES, PASSES=PASSES, num_warps=1,
        maxnreg=PEAK_REGISTERS,
    )  # fmt: skip
    turned, x_and_y, peak = peaks[:, 0], peaks[:, 1:3], peaks[:, 3]
    angle = (turned + 0.5) * (2 * math.pi / rings.n_angles)
    return Alignment(pair // references.sides, pair % references.sides == 1, angle, x_and_y, peak)


@functools.lru_cache(maxsize=16)
def _quadratic_rows(free: tuple[bool, bool, bool], device: torch.device) -> Tensor:
    """:func:`_quadratic` as the kernel takes it: `(13, 32)`, what is added last."""
    matrix, bias = _quadratic(free, device)
    return torch.cat([matrix.T, matrix.new_zeros((13, 4)), bias[:, None]], 1).contiguous()
