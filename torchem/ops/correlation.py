r"""Rotational correlation of images with references, straight and mirrored, at every shift: the best of each image.

With p the polar image around centre + s, q a polar reference (zero mean, unit variance) and μ the share of the disc of
a sample, the correlation coefficient at the angle α is

.. math:: C(s, α) = \frac{1}{σ_p(s)} \sum_r μ_r \sum_i p_s(r, θ_i)\, q(r, θ_i - α)
          = \frac{1}{σ_p(s)} \Re \sum_{m \ge 0} ε_m e^{imα} \sum_r \frac{μ_r}{n_r} P_{rm} Q_{rm}^*,

ε₀ = 1 and 2 otherwise; a mirrored reference q(π - φ) takes (-1)^m Q_{rm} for Q_{rm}^*. Both are normalised over the
disc, weighted by radius, at every shift (Yang et al. 2012, ISAC), so references of unequal energy compete fairly.
EMAN2's convention: aligned = mirror_x(rotate by α, then shift), which looks like the reference.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchem.ops.polar import Rings, polar_samples, quarter_waves, resampling, ring_spectra

# images of one block of the matrix products on a CPU, and of a peak's refinement
BLOCK = 128
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
    """Polar references made ready for :func:`align`.

    Attributes
    ----------
    spectra
        for each band of the rings `(2, 2, m, 2·sides·k, rings)`: what takes real and imaginary parts of P, for even and
        odd frequencies, to the real and then the imaginary parts of Σ ε μ/n P Q*, and with mirrors of Σ ε μ/n P Q.
    profiles
        `(k, rings, 2·a)`: μ q at multiples of half the step between angles, from frequencies below n_r/2.
    """

    rings: Rings
    count: int
    mirror: bool
    spectra: list[Tensor]
    profiles: Tensor

    @property
    def sides(self) -> int:
        return 2 if self.mirror else 1


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


def prepare_references(references: Tensor, rings: Rings, mirror: bool = True) -> References:
    """Sample, normalise and transform references `(k, L, L)`, to be compared straight and, if so, mirrored."""
    k = len(references)
    samples = polar_samples(references, rings, references.new_zeros((k, 2))).T
    weights = _weights(rings, samples.dtype, samples.device)
    samples = samples - weights @ samples
    power = weights @ samples.square()
    # an empty reference stays empty, and correlates with nothing
    samples = samples * torch.where(power > 0, power, torch.ones_like(power)).rsqrt()
    ring_weight = (rings.weights() / torch.tensor(rings.lengths)).to(samples)
    turns = torch.arange(2 * rings.n_angles, dtype=torch.float64, device=samples.device) * (math.pi / rings.n_angles)
    profiles = samples.new_zeros((k, len(rings.radii), len(turns)))
    transform = ring_spectra(samples, rings)
    spectra = []
    for band in rings.bands:
        q = transform[:, :, band.low // 2 : band.high // 2, : band.n_rings] * (2 * ring_weight[: band.n_rings, None])
        if band.low == 0:
            q[:, 0, 0] /= 2
        real, imaginary = q.mT  # (2, m, k, rings)
        # columns that real and imaginary parts meet, and rows of real and imaginary, straight and mirrored results
        of_real = [real, real, -imaginary, imaginary][:: 1 if mirror else 2]
        of_imaginary = [imaginary, -imaginary, real, real][:: 1 if mirror else 2]
        spectra.append(torch.stack([torch.cat(of_real, 2), torch.cat(of_imaginary, 2)]))
        m = torch.arange(band.low, band.high, dtype=torch.float64, device=samples.device).reshape(-1, 2).T
        angle = m[..., None] * turns
        for wave, part in ((angle.cos(), real), (angle.sin().neg(), imaginary)):
            profiles[:, : band.n_rings] += torch.einsum("pmkr,pma->kra", part, wave.to(samples))
    return References(rings, k, mirror, spectra, profiles)


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
        of the images' dtype and device.
    """
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
            samples = resampling(rings, x, y, images.dtype) @ columns
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
    values = values.double()
    axes = [axis for axis in range(3) if free[axis]]
    # constant, gradient, upper triangle of half the Hessian
    coefficients = values.flatten(1) @ _quadratic(tuple(axes)).to(values.device).T
    d = len(axes)
    gradient = coefficients[:, 1 : 1 + d]
    hessian = values.new_zeros((len(values), d, d))
    row, column = torch.triu_indices(d, d, device=values.device)
    hessian[:, row, column] = coefficients[:, 1 + d :]
    hessian = hessian + hessian.mT
    # where it has no maximum, along each axis by itself if it has one there
    diagonal = hessian.diagonal(dim1=1, dim2=2).clamp(max=-torch.finfo(torch.float64).tiny)
    curved = torch.linalg.eigvalsh(hessian)[:, -1] < 0
    hessian = torch.where(curved[:, None, None], hessian, torch.diag_embed(diagonal))
    step = -torch.linalg.solve(hessian, gradient[..., None])[..., 0]
    step = step.clamp(-1, 1)
    peak = coefficients[:, 0] + (gradient * step).sum(1) + 0.5 * (step[:, None] @ hessian @ step[..., None]).flatten()
    result = values.new_zeros((len(values), 3))
    result[:, axes] = step
    return result, peak


@functools.lru_cache
def _quadratic(axes: tuple[int, ...]) -> Tensor:
    """What takes 3 × 3 × 3 values to the coefficients of the quadratic along some axes, through the middle."""
    places = torch.cartesian_prod(*[torch.arange(-1.0, 2.0, dtype=torch.float64)] * 3)
    row, column = torch.triu_indices(len(axes), len(axes))
    x = places[:, list(axes)]
    terms = torch.cat([torch.ones(27, 1, dtype=torch.float64), x, x[:, row] * x[:, column]], 1)
    taken = [not any(place[axis] for axis in range(3) if axis not in axes) for place in places]
    inverse = torch.zeros(terms.shape[1], 27, dtype=torch.float64)
    inverse[:, taken] = torch.linalg.pinv(terms[taken])
    return inverse


def _columns(images: Tensor, centres: Tensor) -> Tensor:
    """Images around whole-pixel centres, flattened, side by side `(L², b)`; an image's edge goes on."""
    n, box = len(images), images.shape[-1]
    images = (images - images.mean((1, 2), keepdim=True)) / images.std((1, 2), keepdim=True).clamp(min=1e-30)
    axis = torch.arange(box, device=images.device)
    x, y = ((axis + c[:, None]).clamp(0, box - 1) for c in centres.round().long().unbind(1))
    if bool((centres != 0).any()):
        images = images[torch.arange(n, device=images.device)[:, None, None], y[:, :, None], x[:, None, :]]
    return images.flatten(1).T.contiguous()


def _inverse_deviation(samples: Tensor, rings: Rings) -> Tensor:
    """`(b,)`: one over the weighted standard deviation of each column; 0 for a flat one."""
    weights = _weights(rings, samples.dtype, samples.device)
    variance = weights @ samples.square() - (weights @ samples).square()
    return torch.where(variance > 0, variance, torch.inf).rsqrt()


@functools.lru_cache(maxsize=16)
def _weights(rings: Rings, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(samples,)`: share of the disc, in the samples' order; they add up to 1."""
    return rings.weights()[rings.points()[0]].to(device, dtype)


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
            torch.mm(
                waves[part, parity].T, products[parity, :, part].flatten(1), out=result[part, parity].flatten(1)
            )
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


def _scores(
    samples: Tensor, references: References, reference: Tensor, mirror: Tensor, nearest: Tensor
) -> Tensor:
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
    profiles = profiles.gather(1, (ring * (2 * rings.n_angles) + turned).flatten(1)).unflatten(1, turned.shape[1:])
    weights = _weights(rings, samples.dtype, samples.device)
    variance = samples.square() @ weights - (samples @ weights).square()
    return (profiles @ samples.mT) * torch.where(variance > 0, variance, torch.inf).rsqrt()[:, None]


@functools.lru_cache(maxsize=16)
def _places(rings: Rings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ring of each sample, and its angle in halves of the step between the angles of a comparison."""
    ring, x, y = rings.points()
    place = (torch.atan2(y, x) * (rings.n_angles / math.pi)).round().long()
    return ring.to(device), place.to(device)
