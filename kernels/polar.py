"""Triton kernel for polar resampling and the transform along the rings, without the polar image in memory.

Images lie side by side, `(pixels, images)`, so that a sample is interpolated for 64 of them by coalesced loads, and the
transform of a ring is a product of waves with samples on tensor cores: four products of a quarter, of what is even and
odd under reversal and under reflection.
"""

import triton
import triton.language as tl


@triton.jit
def _samples(columns, points_x, points_y, place, x, y, reach, width, box, image):
    """Bilinear values `(place, image)` of samples around one centre; an image's edge goes on."""
    px = tl.load(points_x + place) + x
    py = tl.load(points_y + place) + y
    px = tl.minimum(tl.maximum(px, 0.0), reach)
    py = tl.minimum(tl.maximum(py, 0.0), reach)
    left = tl.minimum(px.to(tl.int32), box - 2)
    top = tl.minimum(py.to(tl.int32), box - 2)
    fx = (px - left.to(tl.float32))[:, None]
    fy = (py - top.to(tl.float32))[:, None]
    at = columns + (top * box + left).to(tl.int64)[:, None] * width + image[None, :]
    step = box.to(tl.int64) * width
    a = tl.load(at).to(tl.float32)
    b = tl.load(at + width).to(tl.float32)
    c = tl.load(at + step).to(tl.float32)
    d = tl.load(at + step + width).to(tl.float32)
    upper = a + fx * (b - a)
    lower = c + fx * (d - c)
    return upper + fy * (lower - upper)


@triton.jit(do_not_specialize=("first_sample", "first_ring", "n_rings", "quarter16", "all_rings", "n_rows", "width64"))
def polar_spectra(
    columns, points_x, points_y, shifts, waves, rows, weights, spectra, moments,
    first_sample, first_ring, n_rings, quarter16, all_rings, n_rows, quarter_rows, width64, box,
    IMAGES: tl.constexpr, DEPTH: tl.constexpr, FREQUENCIES: tl.constexpr,
):  # fmt: skip
    """Spectra of one ring at one shift, of IMAGES images; and its share of their weighted mean and mean square.

    Program (shift × ring, images, frequencies); all rings here have 4·quarter samples. Images are padded to whole
    programs, DEPTH and FREQUENCIES divide the quarter: nothing is masked, so that loads are wide.
    """
    # handed over divided, so that the compiler sees that wide loads are aligned
    quarter, width = quarter16 * 16, width64 * 64
    image = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    shift = tl.program_id(0) // n_rings
    ring = tl.program_id(0) % n_rings
    first = tl.program_id(2) * FREQUENCIES
    centre = (box // 2).to(tl.float32)
    x = tl.load(shifts + 2 * shift) + centre
    y = tl.load(shifts + 2 * shift + 1) + centre
    reach = (box - 1).to(tl.float32)
    frequency = first + tl.arange(0, FREQUENCIES)
    square = quarter * quarter

    cosine_even = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    cosine_odd = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    sine_even = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    sine_odd = tl.zeros((FREQUENCIES, IMAGES), tl.float32)
    total = tl.zeros((IMAGES,), tl.float32)
    power = tl.zeros((IMAGES,), tl.float32)
    for start in range(0, quarter, DEPTH):
        theta = start + tl.arange(0, DEPTH)
        place = first_sample + theta * n_rings + ring
        step = quarter * n_rings
        a = _samples(columns, points_x, points_y, place, x, y, reach, width, box, image)
        d = _samples(columns, points_x, points_y, place + 3 * step, x, y, reach, width, box, image)
        total += tl.sum(a + d, 0)
        power += tl.sum(a * a + d * d, 0)
        near, near_odd = a + d, d - a
        b = _samples(columns, points_x, points_y, place + step, x, y, reach, width, box, image)
        c = _samples(columns, points_x, points_y, place + 2 * step, x, y, reach, width, box, image)
        total += tl.sum(b + c, 0)
        power += tl.sum(b * b + c * c, 0)
        far, far_odd = b + c, b - c
        wave = waves + frequency[:, None] * quarter + theta[None, :]
        half = tl.load(wave)
        cosine_even = tl.dot(half, (near + far).to(tl.float16), cosine_even)
        half = tl.load(wave + square)
        cosine_odd = tl.dot(half, (near - far).to(tl.float16), cosine_odd)
        half = tl.load(wave + 2 * square)
        sine_even = tl.dot(half, (near_odd + far_odd).to(tl.float16), sine_even)
        half = tl.load(wave + 3 * square)
        sine_odd = tl.dot(half, (near_odd - far_odd).to(tl.float16), sine_odd)

    number = first_ring + ring
    base = spectra + shift.to(tl.int64) * n_rows * width + image[None, :]
    row = tl.load(rows + frequency) + number
    tl.store(base + row.to(tl.int64)[:, None] * width, cosine_even.to(tl.float16))
    row = tl.load(rows + quarter_rows + frequency) + number
    tl.store(base + row.to(tl.int64)[:, None] * width, cosine_odd.to(tl.float16))
    row = tl.load(rows + 2 * quarter_rows + frequency) + number
    tl.store(base + row.to(tl.int64)[:, None] * width, sine_even.to(tl.float16))
    row = tl.load(rows + 3 * quarter_rows + frequency) + number
    tl.store(base + row.to(tl.int64)[:, None] * width, sine_odd.to(tl.float16))
    if first == 0:
        weight = tl.load(weights + number)
        at = moments + ((shift * all_rings + number) * 2).to(tl.int64) * width + image
        tl.store(at, weight * total)
        tl.store(at + width, weight * power)
