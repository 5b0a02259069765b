"""Triton kernels for polar resampling and the transform along the rings, without the polar image in memory.

Images lie side by side, `(pixels, images)`, so that a sample is interpolated for many of them by one wide load, and the
transform of a ring is a product of waves with samples on tensor cores: four products of a quarter, of what is even and
odd under reversal and under reflection.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("start", "n_images"))
def image_columns(
    images, mean, variance, centres, columns, start, n_images, width, box, IMAGES: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """Write `(L², width)` normalised pixels around whole-pixel centres `(n, 2)` float64; an image's edge goes on.

    Images from ``start``, 0 where there is none. Program (pixels, images).
    """
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    image = start + column
    there = image < n_images
    left = tl.floor(tl.load(centres + 2 * image, there, other=0) + 0.5).to(tl.int32)[:, None]
    up = tl.floor(tl.load(centres + 2 * image + 1, there, other=0) + 0.5).to(tl.int32)[:, None]
    x = tl.minimum(tl.maximum((pixel % box)[None, :] + left, 0), box - 1)
    y = tl.minimum(tl.maximum((pixel // box)[None, :] + up, 0), box - 1)
    inside = (pixel < box * box)[None, :]
    value = tl.load(images + image.to(tl.int64)[:, None] * (box * box) + y * box + x, there[:, None] & inside, other=0)
    scale = tl.where(there, tl.rsqrt(tl.maximum(tl.load(variance + image, there, other=0), 1e-30)), 0.0)
    value = (value - tl.load(mean + image, there, other=0)[:, None]) * scale[:, None]
    to = columns + pixel.to(tl.int64)[None, :] * width + column[:, None]
    tl.store(to, value.to(columns.dtype.element_ty), inside)


@triton.jit
def _samples(columns, x, y, image, width, box):
    """Bilinear values `(samples, image)` at pixels x, y, in the images' own precision; an image's edge goes on."""
    x = tl.minimum(tl.maximum(x, 0.0), box - 1.0)
    y = tl.minimum(tl.maximum(y, 0.0), box - 1.0)
    left = tl.minimum(x.to(tl.int32), box - 2)
    top = tl.minimum(y.to(tl.int32), box - 2)
    kind = columns.dtype.element_ty
    fx, fy = x - left, y - top
    corner = columns + (top * box + left).to(tl.int64)[:, None] * width + image[None, :]
    below = box.to(tl.int64) * width
    # four shares, not three steps, whose halves compilers pair so that they are taken apart and put together again
    value = tl.load(corner) * ((1 - fx) * (1 - fy)).to(kind)[:, None]
    value += tl.load(corner + width) * (fx * (1 - fy)).to(kind)[:, None]
    value += tl.load(corner + below) * ((1 - fx) * fy).to(kind)[:, None]
    return value + tl.load(corner + below + width) * (fx * fy).to(kind)[:, None]


@triton.jit(do_not_specialize=("start",))
def polar_spectra(
    columns, shifts, radii, circle, waves, first_row, spectra, squares, start, width, n_total, box,
    QUARTER: tl.constexpr, FREQUENCIES: tl.constexpr, DEPTH: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Spectra of one ring of 4·QUARTER samples, of IMAGES images at one shift, and its sums of p².

    Program (images, shift, ring of a group). Nothing is masked, so that loads are wide: images are padded to whole
    programs, DEPTH divides the quarter.

    Parameters
    ----------
    shifts
        `(t, 2)` float64 x and y.
    circle
        `(2, QUARTER)` float32 cosine and sine of the angles of the first quarter.
    waves
        `(2, 2, QUARTER, QUARTER)`: cosine or sine, parity, frequency // 2, angle; FREQUENCIES of each are taken.
    first_row
        of each frequency in ``spectra``.
    spectra
        `(rows, n_total)`, for each frequency real and imaginary parts ring by ring; a column an image and shift, shift
        by shift.
    squares
        `(n_rings, n_total)` float32.
    start
        number of the group's first ring.
    """
    image = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    ring = start + tl.program_id(2)
    radius = tl.load(radii + ring)
    frequency = tl.arange(0, FREQUENCIES)
    kind = waves.dtype.element_ty
    size: tl.constexpr = QUARTER * QUARTER
    shift = tl.program_id(1)
    x = tl.load(shifts + 2 * shift).to(tl.float32) + box // 2
    y = tl.load(shifts + 2 * shift + 1).to(tl.float32) + box // 2
    real_even = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    real_odd = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    imaginary_even = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    imaginary_odd = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    power = tl.zeros((DEPTH, IMAGES), tl.float32)
    for begin in tl.static_range(0, QUARTER, DEPTH):
        angle = begin + tl.arange(0, DEPTH)
        c = radius * tl.load(circle + angle)
        s = radius * tl.load(circle + QUARTER + angle)
        # at θ, π - θ, π + θ, -θ
        p0 = _samples(columns, x + c, y + s, image, width, box)
        p1 = _samples(columns, x - c, y + s, image, width, box)
        p2 = _samples(columns, x - c, y - s, image, width, box)
        p3 = _samples(columns, x + c, y - s, image, width, box)
        s0, s1, s2, s3 = p0.to(tl.float32), p1.to(tl.float32), p2.to(tl.float32), p3.to(tl.float32)
        power += s0 * s0 + s1 * s1 + s2 * s2 + s3 * s3
        near, far = p0 + p3, p1 + p2
        below, beyond = p3 - p0, p1 - p2
        wave = waves + frequency[:, None] * QUARTER + angle[None, :]
        real_even = tl.dot(tl.load(wave), (near + far).to(kind), real_even)
        real_odd = tl.dot(tl.load(wave + size), (near - far).to(kind), real_odd)
        # the reflection changes the sign of sines of even frequencies
        imaginary_even = tl.dot(tl.load(wave + 2 * size), (below + beyond).to(kind), imaginary_even)
        imaginary_odd = tl.dot(tl.load(wave + 3 * size), (below - beyond).to(kind), imaginary_odd)
    column = shift.to(tl.int64) * width + image
    tl.store(squares + ring.to(tl.int64) * n_total + column, tl.sum(power, 0))
    for parity in tl.static_range(2):
        row = tl.load(first_row + 2 * frequency + parity) + 2 * ring
        to = spectra + row.to(tl.int64)[:, None] * n_total + column[None, :]
        imaginary = to + n_total
        if parity == 0:
            tl.store(to, real_even.to(kind))
            tl.store(imaginary, imaginary_even.to(kind))
        else:
            tl.store(to, real_odd.to(kind))
            tl.store(imaginary, imaginary_odd.to(kind))


@triton.jit(do_not_specialize=("n_samples",))
def reference_samples(references, pixels, shares, weights, samples, n_samples, box, SAMPLES: tl.constexpr):
    """Sample references `(k, L, L)` on their rings, normalise and weigh; an empty one stays empty. Program (reference).

    Parameters
    ----------
    pixels, shares
        `(n_samples, 4)` int64 and float32: what a sample is interpolated from.
    weights
        `(n_samples,)` float64, which add up to 1: in double precision the variance loses no digits to a high mean.
    samples
        `(k, n_samples)` float32.
    """
    reference = tl.program_id(0).to(tl.int64)
    image, to = references + reference * box * box, samples + reference * n_samples
    total, squares = tl.zeros((SAMPLES,), tl.float64), tl.zeros((SAMPLES,), tl.float64)
    for start in range(0, n_samples, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        there = sample < n_samples
        value = tl.zeros((SAMPLES,), tl.float32)
        for corner in tl.static_range(4):
            pixel = tl.load(image + tl.load(pixels + 4 * sample + corner, there, other=0), there, other=0.0)
            value += pixel * tl.load(shares + 4 * sample + corner, there, other=0.0)
        tl.store(to + sample, value, there)
        weighted = value * tl.load(weights + sample, there, other=0.0)
        total += weighted
        squares += weighted * value
    mean = tl.sum(total, 0)
    variance = tl.sum(squares, 0) - mean * mean
    factor = tl.where(variance > 0, 1 / tl.sqrt(tl.maximum(variance, 1e-300)), 0.0)
    tl.debug_barrier()
    for start in range(0, n_samples, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        there = sample < n_samples
        value = (tl.load(to + sample, there, other=0.0) - mean) * (factor * tl.load(weights + sample, there, other=0.0))
        tl.store(to + sample, value.to(tl.float32), there)


@triton.jit(do_not_specialize=("n_references", "n_rings", "n_samples"))
def reference_transform(
    samples, rows, waves, both, n_references, n_rings, n_samples,
    ANGLES: tl.constexpr, REFERENCES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Transform one ring of some references. Program (columns of waves, ring, references).

    Parameters
    ----------
    rows
        `(n_rings, 4)` int32: the ring's first sample, how far apart they lie, their number, the first row of its waves.
    waves
        `(…, 2·ANGLES)`: what takes samples of a ring to its transform, real and imaginary parts, and to its profile.
    both
        `(2, k, n_rings, ANGLES)`: transforms, and profiles.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ring = tl.program_id(1)
    reference = (tl.program_id(2) * REFERENCES + tl.arange(0, REFERENCES)).to(tl.int64)[:, None]
    there = reference < n_references
    first, apart = tl.load(rows + 4 * ring), tl.load(rows + 4 * ring + 1)
    length, wave = tl.load(rows + 4 * ring + 2), tl.load(rows + 4 * ring + 3)
    result = tl.zeros((REFERENCES, COLUMNS), tl.float32)
    for start in range(0, length, DEPTH):
        i = start + tl.arange(0, DEPTH)
        value = tl.load(samples + reference * n_samples + (first + i * apart)[None, :], there, other=0.0)
        own = tl.load(waves + (wave + i)[:, None] * (2 * ANGLES) + column[None, :])
        result = tl.dot(value, own, result, input_precision="ieee")
    half = tl.program_id(0) * COLUMNS // ANGLES
    to = both + ((half * n_references.to(tl.int64) + reference) * n_rings + ring) * ANGLES
    tl.store(to + (column % ANGLES)[None, :], result, there)
