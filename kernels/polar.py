"""Triton kernels for polar resampling and the transform along the rings, without the polar image in memory.

Images lie side by side, `(pixels, images)`, so that a sample is interpolated for many of them by one wide load, and the
transform of a ring is a product of waves with samples on tensor cores: four products of a quarter, of what is even and
odd under reversal and under reflection.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("n_images",))
def image_columns(
    images, mean, scale, centres, columns, n_images, width, box, IMAGES: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """Write `(L², width)` normalised pixels around the images' own whole-pixel centres `(n, 2)` int32; an edge goes on.

    Program (pixels, images); 0 where there is no image.
    """
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    image = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    there = image < n_images
    left = tl.load(centres + 2 * image, there, other=0)[:, None]
    up = tl.load(centres + 2 * image + 1, there, other=0)[:, None]
    x = tl.minimum(tl.maximum((pixel % box)[None, :] + left, 0), box - 1)
    y = tl.minimum(tl.maximum((pixel // box)[None, :] + up, 0), box - 1)
    inside = (pixel < box * box)[None, :]
    value = tl.load(images + image.to(tl.int64)[:, None] * (box * box) + y * box + x, there[:, None] & inside, other=0)
    value = (value - tl.load(mean + image, there, other=0)[:, None]) * tl.load(scale + image, there, other=0)[:, None]
    to = columns + pixel.to(tl.int64)[None, :] * width + image[:, None]
    tl.store(to, value.to(columns.dtype.element_ty), inside)


@triton.jit
def _samples(columns, x, y, image, width, box):
    """Bilinear values `(samples, image)` at pixels x, y, in the images' own precision; an image's edge goes on."""
    x = tl.minimum(tl.maximum(x, 0.0), box - 1.0)
    y = tl.minimum(tl.maximum(y, 0.0), box - 1.0)
    left = tl.minimum(x.to(tl.int32), box - 2)
    top = tl.minimum(y.to(tl.int32), box - 2)
    kind = columns.dtype.element_ty
    fx, fy = (x - left).to(kind)[:, None], (y - top).to(kind)[:, None]
    corner = columns + (top * box + left).to(tl.int64)[:, None] * width + image[None, :]
    below = box.to(tl.int64) * width
    a = tl.load(corner)
    b = tl.load(corner + width)
    c = tl.load(corner + below)
    d = tl.load(corner + below + width)
    upper = a + fx * (b - a)
    lower = c + fx * (d - c)
    return upper + fy * (lower - upper)


@triton.jit(do_not_specialize=("start", "n_rings"))
def polar_spectra(
    columns, shifts, radii, circle, waves, first_row, spectra, moments,
    start, n_rings, width, n_total, box,
    QUARTER: tl.constexpr, FREQUENCIES: tl.constexpr, DEPTH: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Spectra of one ring of 4·QUARTER samples, of IMAGES images at one shift, and its sums of p and p².

    Program (images, shift, ring of a group). Nothing is masked, so that loads are wide: images are padded to whole
    programs, DEPTH divides the quarter.

    Parameters
    ----------
    shifts
        `(t, 2)` float32 x and y.
    circle
        `(2, QUARTER)` float32 cosine and sine of the angles of the first quarter.
    waves
        `(2, 2, QUARTER, QUARTER)`: cosine or sine, parity, frequency // 2, angle; FREQUENCIES of each are taken.
    first_row
        of each frequency in ``spectra``.
    spectra
        `(rows, n_total)`, for each frequency real and imaginary parts ring by ring; a column an image and shift, shift
        by shift.
    moments
        `(2, n_rings, n_total)` float32.
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
    x = tl.load(shifts + 2 * shift) + box // 2
    y = tl.load(shifts + 2 * shift + 1) + box // 2
    real_even = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    real_odd = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    imaginary_even = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    imaginary_odd = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    total = tl.zeros((IMAGES,), tl.float32)
    squares = tl.zeros((IMAGES,), tl.float32)
    for begin in tl.static_range(0, QUARTER, DEPTH):
        angle = begin + tl.arange(0, DEPTH)
        c = radius * tl.load(circle + angle)
        s = radius * tl.load(circle + QUARTER + angle)
        # at θ, π - θ, π + θ, -θ
        p0 = _samples(columns, x + c, y + s, image, width, box)
        p1 = _samples(columns, x - c, y + s, image, width, box)
        p2 = _samples(columns, x - c, y - s, image, width, box)
        p3 = _samples(columns, x + c, y - s, image, width, box)
        total += tl.sum((p0 + p3).to(tl.float32) + (p1 + p2).to(tl.float32), 0)
        s0, s1, s2, s3 = p0.to(tl.float32), p1.to(tl.float32), p2.to(tl.float32), p3.to(tl.float32)
        squares += tl.sum(s0 * s0 + s1 * s1 + s2 * s2 + s3 * s3, 0)
        near, far = p0 + p3, p1 + p2
        below, beyond = p3 - p0, p1 - p2
        wave = waves + frequency[:, None] * QUARTER + angle[None, :]
        real_even = tl.dot(tl.load(wave), (near + far).to(kind), real_even)
        real_odd = tl.dot(tl.load(wave + size), (near - far).to(kind), real_odd)
        # the reflection changes the sign of sines of even frequencies
        imaginary_even = tl.dot(tl.load(wave + 2 * size), (below + beyond).to(kind), imaginary_even)
        imaginary_odd = tl.dot(tl.load(wave + 3 * size), (below - beyond).to(kind), imaginary_odd)
    column = shift.to(tl.int64) * width + image
    tl.store(moments + ring.to(tl.int64) * n_total + column, total)
    tl.store(moments + (n_rings + ring).to(tl.int64) * n_total + column, squares)
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
