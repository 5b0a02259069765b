"""Triton kernels for rotational correlation: the best angle of every image, shift and reference, and peaks in float32.

The correlation of an image at a shift with a reference, straight and mirrored, is a series in the angle: sums over
rings for every frequency (products on tensor cores, written in half precision, some at a time), and values at all
angles (products with waves, four quarters), of which only the highest is kept and none is written.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("n_rows", "all_rows"))
def ring_sums(
    references, spectra, first_row, ring_counts, products, n_rows, all_rows, n_total,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sum over the rings of one frequency: references `(m, all_rows, WIDTH)`, of which n_rows, times its spectra.

    Program (rows, columns, frequency). Beyond the rings of their frequency references are 0: there rows of the next
    frequency are met. products: `(m, n_rows, n_total)`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(2)
    depth = tl.arange(0, DEPTH)
    there = column < n_total
    a = references + (m.to(tl.int64) * all_rows + row)[:, None] * WIDTH + depth[None, :]
    b = spectra + (tl.load(first_row + m) + depth).to(tl.int64)[:, None] * n_total + column[None, :]
    count = 2 * tl.load(ring_counts + m)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, count, DEPTH):
        reference = tl.load(a, (row < n_rows)[:, None], other=0.0)
        total = tl.dot(reference, tl.load(b, there[None, :], other=0.0), total)
        a += DEPTH
        b += DEPTH * n_total.to(tl.int64)
    to = products + (m.to(tl.int64) * n_rows + row)[:, None] * n_total + column[None, :]
    tl.store(to, total.to(products.dtype.element_ty), (row < n_rows)[:, None] & there[None, :])


@triton.jit(do_not_specialize=("n_pairs", "first_shift"))
def highest_angles(
    products, waves, scale, best, n_pairs, first_shift, width, best_width, n_total,
    QUARTER: tl.constexpr, FREQUENCIES: tl.constexpr, ANGLES: tl.constexpr, COLUMNS: tl.constexpr,
    SIDES: tl.constexpr, PAIRS: tl.constexpr, ANGLE_BITS: tl.constexpr,
):  # fmt: skip
    """Turn sums over rings into correlation coefficients at all angles and keep the highest, over shifts too.

    Program (columns, PAIRS pairs of reference and side).

    Parameters
    ----------
    products
        `(2·FREQUENCIES, 2·n_pairs, n_total)`; rows: reference, real or imaginary, side.
    waves
        `(2, 2, QUARTER, QUARTER)`: cosine or sine, parity, angle, frequency // 2.
    scale
        `(n_total,)` what the values are multiplied by.
    best
        `(n_pairs, best_width)` int64, at the first image of these columns: the value's bits in the order of integers,
        then 16 bits of the shift's number and 16 of the angle's.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    image, shift = column % width, column // width + first_shift
    factor = tl.load(scale + column)
    size: tl.constexpr = QUARTER * QUARTER
    frequency = tl.arange(0, FREQUENCIES)
    angle = tl.arange(0, ANGLES)
    one = 2 * n_pairs.to(tl.int64) * n_total
    first = tl.program_id(1) * PAIRS
    for pair in range(first, tl.minimum(first + PAIRS, n_pairs)):
        row = pair // SIDES * (2 * SIDES) + pair % SIDES
        real = products + row * n_total.to(tl.int64) + (2 * frequency).to(tl.int64)[:, None] * one + column[None, :]
        imaginary = real + SIDES * n_total.to(tl.int64)
        p_even, p_odd = tl.load(real), tl.load(real + one)
        q_even, q_odd = tl.load(imaginary), tl.load(imaginary + one)
        top = tl.full((COLUMNS,), -0x80000000, tl.int32)
        for begin in tl.static_range(0, QUARTER, ANGLES):
            wave = waves + (begin + angle)[:, None] * QUARTER + frequency[None, :]
            even = tl.dot(tl.load(wave), p_even)
            odd = tl.dot(tl.load(wave + size), p_odd)
            sine_even = tl.dot(tl.load(wave + 2 * size), q_even)
            sine_odd = tl.dot(tl.load(wave + 3 * size), q_odd)
            s, d = sine_even + sine_odd, sine_even - sine_odd
            # at θ and -θ, and at π - θ and π + θ
            near, far = even + odd + tl.abs(s), even - odd + tl.abs(d)
            number = (begin + angle)[:, None]
            of_near = tl.where(s < 0, number, 4 * QUARTER - 1 - number)
            of_far = tl.where(d > 0, 2 * QUARTER - 1 - number, 2 * QUARTER + number)
            number = tl.where(far > near, of_far, of_near)
            # numbers of angles in the last bits of values that sort as integers
            bits = tl.maximum(near, far).to(tl.int32, bitcast=True)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            top = tl.maximum(top, tl.max(((bits >> ANGLE_BITS) << ANGLE_BITS) | number, 0))
        number = top & ((1 << ANGLE_BITS) - 1)
        if SIDES == 2:  # mirrored references are turned by half a circle
            number = (number + pair % 2 * (2 * QUARTER)) & (4 * QUARTER - 1)
        bits = top ^ ((top >> 31) & 0x7FFFFFFF)
        bits = (bits.to(tl.float32, bitcast=True) * factor).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        packed = (bits.to(tl.int64) << 32) | (shift.to(tl.int64) << 16) | number.to(tl.int64)
        tl.atomic_max(best + pair * best_width.to(tl.int64) + image, packed, sem="relaxed")


@triton.jit
def _row(line, left, right, fx):
    a = tl.load(line + left)
    return a + fx * (tl.load(line + right) - a)


@triton.jit
def _added(sums, value, weight, low, mid, high):
    """Sums of p, of p² and of p times a reference at three angles."""
    weighted = value * weight
    return (
        sums[0] + weighted, sums[1] + weighted * value, sums[2] + value * low, sums[3] + value * mid,
        sums[4] + value * high,
    )  # fmt: skip


@triton.jit
def _store_peak(out, sums, where):
    """Correlation coefficients of a row of three centres at three angles; sums are `(samples, 4)`, out `(3, 9)`."""
    mean = tl.sum(sums[0], 0)
    variance = tl.sum(sums[1], 0) - mean * mean
    scale = tl.where(variance > 0, tl.rsqrt(tl.maximum(variance, 1e-30)), 0.0)
    tl.store(out + where, tl.sum(sums[2], 0) * scale, where < 3)
    tl.store(out + 9 + where, tl.sum(sums[3], 0) * scale, where < 3)
    tl.store(out + 18 + where, tl.sum(sums[4], 0) * scale, where < 3)


@triton.jit(do_not_specialize=("n_samples", "n_rings", "n_candidates"))
def peak_values(
    images, means, points_x, points_y, ring, place, weights, profiles, centres, reference, mirror, nearest, wanted, out,
    n_samples, n_rings, n_candidates, box, TWICE_ANGLES: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Correlation coefficients at 3 angles × 3 × 3 centres around each candidate's peak, sample by sample in float32.

    Program (candidate of an image); centres, reference, … are `(n, candidates)`, out is `(n, candidates, 3, 9)`;
    candidates that are not wanted get minus infinity. Samples lie ring by ring, so that neighbours meet neighbours, and
    are a whole number of SAMPLES; each image's mean is taken off, so that sums keep their digits.
    """
    candidate = tl.program_id(0).to(tl.int64)
    image = candidate // n_candidates
    column = tl.arange(0, 4)
    to = out + candidate * 27
    if tl.load(wanted + candidate) == 0:
        place_32 = tl.arange(0, 32)
        tl.store(to + place_32, tl.full((32,), float("-inf"), tl.float32), place_32 < 27)
    else:
        x = tl.load(centres + candidate * 2) + (box // 2).to(tl.float64)
        y = tl.load(centres + candidate * 2 + 1) + (box // 2).to(tl.float64)
        # whole and fraction apart, so that float32 keeps all digits
        whole_x, whole_y = tl.floor(x), tl.floor(y)
        part_x, part_y = (x - whole_x).to(tl.float32), (y - whole_y).to(tl.float32)
        whole_x, whole_y = whole_x.to(tl.int32), whole_y.to(tl.int32)
        own = profiles + tl.load(reference + candidate).to(tl.int64) * n_rings * TWICE_ANGLES
        mirrored, middle = tl.load(mirror + candidate), 2 * tl.load(nearest + candidate) + 1
        pixels, level = images + image * box * box, tl.load(means + image)
        zero = tl.zeros((SAMPLES, 4), tl.float32)
        upper, here, lower = (
            (zero, zero, zero, zero, zero),
            (zero, zero, zero, zero, zero),
            (zero, zero, zero, zero, zero),
        )
        for start in range(0, n_samples, SAMPLES):
            sample = start + tl.arange(0, SAMPLES)
            px, py = tl.load(points_x + sample) + part_x, tl.load(points_y + sample) + part_y
            floor_x, floor_y = tl.floor(px), tl.floor(py)
            fx, fy = (px - floor_x)[:, None], (py - floor_y)[:, None]
            left = (floor_x.to(tl.int32) + whole_x)[:, None] + column[None, :] - 1
            right = tl.minimum(tl.maximum(left + 1, 0), box - 1)
            left = tl.minimum(tl.maximum(left, 0), box - 1)
            top = (floor_y.to(tl.int32) + whole_y)[:, None]
            a = _row(pixels + tl.minimum(tl.maximum(top - 1, 0), box - 1) * box, left, right, fx)
            b = _row(pixels + tl.minimum(tl.maximum(top, 0), box - 1) * box, left, right, fx)
            c = _row(pixels + tl.minimum(tl.maximum(top + 1, 0), box - 1) * box, left, right, fx)
            d = _row(pixels + tl.minimum(tl.maximum(top + 2, 0), box - 1) * box, left, right, fx)
            weight = tl.load(weights + sample)[:, None]
            line, turn = own + tl.load(ring + sample) * TWICE_ANGLES, tl.load(place + sample) - middle
            turn = tl.where(mirrored != 0, TWICE_ANGLES // 2 - turn, turn)
            step = tl.where(mirrored != 0, -2, 2)
            low = tl.load(line + ((turn + step) & (TWICE_ANGLES - 1)))[:, None]
            mid = tl.load(line + (turn & (TWICE_ANGLES - 1)))[:, None]
            high = tl.load(line + ((turn - step) & (TWICE_ANGLES - 1)))[:, None]
            upper = _added(upper, a + fy * (b - a) - level, weight, low, mid, high)
            here = _added(here, b + fy * (c - b) - level, weight, low, mid, high)
            lower = _added(lower, c + fy * (d - c) - level, weight, low, mid, high)
        _store_peak(to, upper, column)
        _store_peak(to + 3, here, column)
        _store_peak(to + 6, lower, column)
