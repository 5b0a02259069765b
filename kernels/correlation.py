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


@triton.jit(do_not_specialize=("n_rings", "n_pairs", "first_shift", "n_images", "best_width"))
def highest_angles(
    products, waves, spectra, squares, shares, best, n_rings, n_pairs, first_shift, width, n_images, best_width,
    n_total, unit,
    QUARTER: tl.constexpr, FREQUENCIES: tl.constexpr, ANGLES: tl.constexpr, COLUMNS: tl.constexpr,
    SIDES: tl.constexpr, PAIRS: tl.constexpr, ANGLE_BITS: tl.constexpr, RINGS: tl.constexpr,
):  # fmt: skip
    """Turn sums over rings into correlation coefficients at all angles and keep the highest, over shifts too.

    Program (columns, PAIRS pairs of reference and side).

    Parameters
    ----------
    products
        `(2·FREQUENCIES, 2·n_pairs, n_total)`; rows: reference, real or imaginary, side.
    waves
        `(2, 2, QUARTER, QUARTER)`: cosine or sine, parity, angle, frequency // 2.
    spectra, squares, shares
        sums of p of each ring, every other row (the real parts of frequency 0), `(n_rings, n_total)` sums of p², and
        the shares of the disc of their samples: values are divided by the standard deviation, and by the unit.
    best
        `(n_pairs, best_width)` int64, at the first image of these columns, of which n_images there are: the value's
        bits in the order of integers, then 16 bits of the shift's number and 16 of the angle's.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    image, shift = column % width, column // width + first_shift
    mean, square = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, n_rings, RINGS):
        ring = start + tl.arange(0, RINGS)
        share = tl.load(shares + ring, ring < n_rings, other=0.0)[:, None]
        its, inside = ring.to(tl.int64)[:, None] * n_total, (ring < n_rings)[:, None]
        mean += tl.sum(share * tl.load(spectra + 2 * its + column[None, :], inside, other=0.0), 0)
        square += tl.sum(share * tl.load(squares + its + column[None, :], inside, other=0.0), 0)
    spread = square - mean * mean
    factor = tl.where(spread > 0, tl.rsqrt(tl.maximum(spread, 1e-30)), 0.0) / unit
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
        tl.atomic_max(best + pair * best_width.to(tl.int64) + image, packed, image < n_images, sem="relaxed")


@triton.jit
def _row(line, columns, fx):
    """Values between four pixels of a row."""
    a, b = tl.load(line + columns[0]), tl.load(line + columns[1])
    c, d = tl.load(line + columns[2]), tl.load(line + columns[3])
    return a + fx * (b - a), b + fx * (c - b), c + fx * (d - c)


@triton.jit
def _added(sums, value, weight, low, mid, high):
    """Sums of p, of p² and of p times a reference at three angles."""
    weighted = value * weight
    return (
        sums[0] + weighted, sums[1] + weighted * value, sums[2] + value * low, sums[3] + value * mid,
        sums[4] + value * high,
    )  # fmt: skip


@triton.jit
def _added_row(sums, above, below, fy, level, weight, low, mid, high):
    """The same at a row of three centres, between two rows of pixels."""
    return (
        _added(sums[0], above[0] + fy * (below[0] - above[0]) - level, weight, low, mid, high),
        _added(sums[1], above[1] + fy * (below[1] - above[1]) - level, weight, low, mid, high),
        _added(sums[2], above[2] + fy * (below[2] - above[2]) - level, weight, low, mid, high),
    )


@triton.jit
def _with_coefficients(values, sums, where: tl.constexpr):
    """Put the correlation coefficients of one centre at three angles into values."""
    mean = tl.sum(sums[0], 0)
    variance = tl.sum(sums[1], 0) - mean * mean
    scale = tl.where(variance > 0, tl.rsqrt(tl.maximum(variance, 1e-30)), 0.0)
    place = tl.arange(0, 32)
    values = tl.where(place == where, tl.sum(sums[2], 0) * scale, values)
    values = tl.where(place == where + 9, tl.sum(sums[3], 0) * scale, values)
    return tl.where(place == where + 18, tl.sum(sums[4], 0) * scale, values)


@triton.jit
def _turned(own, row, turn, ANGLES: tl.constexpr, TILE_RINGS: tl.constexpr, TILE_ANGLES: tl.constexpr):
    """Values of a reference's profiles, whose first tiles and rows are given, at angles."""
    turn = turn & (ANGLES - 1)
    return tl.load(own + (row + turn + (turn & -TILE_ANGLES) * (TILE_RINGS - 1)))


@triton.jit
def _around(
    pixels, level, points_x, points_y, ring, place, weights, own, x, y, nearest, mirrored, n_samples, box,
    ANGLES: tl.constexpr, TILE_RINGS: tl.constexpr, TILE_ANGLES: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Correlation coefficients at 3 angles × 3 × 3 centres around a peak, sample by sample: 27 of 32 float32."""
    x, y = x + (box // 2).to(tl.float64), y + (box // 2).to(tl.float64)
    # whole and fraction apart, so that float32 keeps all digits
    whole_x, whole_y = tl.floor(x), tl.floor(y)
    part_x, part_y = (x - whole_x).to(tl.float32), (y - whole_y).to(tl.float32)
    whole_x, whole_y = whole_x.to(tl.int32), whole_y.to(tl.int32)
    middle, step = 2 * nearest + 1, tl.where(mirrored, -1, 1)
    zero = tl.zeros((SAMPLES,), tl.float32)
    none = (zero, zero, zero, zero, zero)
    upper, here, lower = (none, none, none), (none, none, none), (none, none, none)
    for start in range(0, n_samples, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        px, py = tl.load(points_x + sample) + part_x, tl.load(points_y + sample) + part_y
        floor_x, floor_y = tl.floor(px), tl.floor(py)
        fx, fy = px - floor_x, py - floor_y
        left, top = floor_x.to(tl.int32) + whole_x, floor_y.to(tl.int32) + whole_y
        columns = (
            tl.minimum(tl.maximum(left - 1, 0), box - 1), tl.minimum(tl.maximum(left, 0), box - 1),
            tl.minimum(tl.maximum(left + 1, 0), box - 1), tl.minimum(tl.maximum(left + 2, 0), box - 1),
        )  # fmt: skip
        a = _row(pixels + tl.minimum(tl.maximum(top - 1, 0), box - 1) * box, columns, fx)
        b = _row(pixels + tl.minimum(tl.maximum(top, 0), box - 1) * box, columns, fx)
        c = _row(pixels + tl.minimum(tl.maximum(top + 1, 0), box - 1) * box, columns, fx)
        d = _row(pixels + tl.minimum(tl.maximum(top + 2, 0), box - 1) * box, columns, fx)
        weight, row = tl.load(weights + sample), tl.load(ring + sample)
        turn = tl.load(place + sample) - middle
        turn = tl.where(mirrored, ANGLES - turn, turn) >> 1
        low = _turned(own, row, turn + step, ANGLES, TILE_RINGS, TILE_ANGLES)
        mid = _turned(own, row, turn, ANGLES, TILE_RINGS, TILE_ANGLES)
        high = _turned(own, row, turn - step, ANGLES, TILE_RINGS, TILE_ANGLES)
        upper = _added_row(upper, a, b, fy, level, weight, low, mid, high)
        here = _added_row(here, b, c, fy, level, weight, low, mid, high)
        lower = _added_row(lower, c, d, fy, level, weight, low, mid, high)
    values = tl.zeros((32,), tl.float32)
    for i in tl.static_range(3):
        values = _with_coefficients(values, upper[i], i)
        values = _with_coefficients(values, here[i], 3 + i)
        values = _with_coefficients(values, lower[i], 6 + i)
    return values


@triton.jit
def _coefficient(values, quadratic, which: tl.constexpr):
    """One of the quadratic's: values times a row, and what is added at the row's end."""
    place = tl.arange(0, 32)
    row = tl.load(quadratic + which * 32 + place)
    return tl.sum(tl.where(place < 31, values.to(tl.float64), 1.0) * row, 0)


@triton.jit
def _quadratic_peak(values, quadratic):
    """Maximum of the quadratic through 3 × 3 × 3 values: steps along angle, y and x, at most 1, and height."""
    constant = _coefficient(values, quadratic, 0)
    g0, g1, g2 = (
        _coefficient(values, quadratic, 1), _coefficient(values, quadratic, 2), _coefficient(values, quadratic, 3)
    )  # fmt: skip
    h00, h01, h02 = (
        _coefficient(values, quadratic, 4), _coefficient(values, quadratic, 5), _coefficient(values, quadratic, 6)
    )  # fmt: skip
    h11, h12, h22 = (
        _coefficient(values, quadratic, 8), _coefficient(values, quadratic, 9), _coefficient(values, quadratic, 12)
    )  # fmt: skip
    a00, a01, a02 = h11 * h22 - h12 * h12, h12 * h02 - h01 * h22, h01 * h12 - h11 * h02
    a11, a12, a22 = h00 * h22 - h02 * h02, h01 * h02 - h00 * h12, h00 * h11 - h01 * h01
    determinant = h00 * a00 + h01 * a01 + h02 * a02
    # a maximum if minus the Hessian has positive minors; without one, along each axis by itself if it has one there
    peaked = (h00 < 0) & (a22 > 0) & (determinant < 0)
    divisor = tl.where(peaked, determinant, 1.0)
    d0, d1, d2 = tl.minimum(h00, -1e-300), tl.minimum(h11, -1e-300), tl.minimum(h22, -1e-300)
    s0 = -tl.where(peaked, (a00 * g0 + a01 * g1 + a02 * g2) / divisor, g0 / d0)
    s1 = -tl.where(peaked, (a01 * g0 + a11 * g1 + a12 * g2) / divisor, g1 / d1)
    s2 = -tl.where(peaked, (a02 * g0 + a12 * g1 + a22 * g2) / divisor, g2 / d2)
    s0 = tl.minimum(tl.maximum(s0, -1.0), 1.0)
    s1 = tl.minimum(tl.maximum(s1, -1.0), 1.0)
    s2 = tl.minimum(tl.maximum(s2, -1.0), 1.0)
    c0 = tl.where(peaked, h00 * s0 + h01 * s1 + h02 * s2, d0 * s0)
    c1 = tl.where(peaked, h01 * s0 + h11 * s1 + h12 * s2, d1 * s1)
    c2 = tl.where(peaked, h02 * s0 + h12 * s1 + h22 * s2, d2 * s2)
    return s0, s1, s2, constant + (g0 + 0.5 * c0) * s0 + (g1 + 0.5 * c1) * s1 + (g2 + 0.5 * c2) * s2


@triton.jit(do_not_specialize=("n_images", "n_candidates", "n_samples", "size"))
def refined_peaks(
    images, means, best, which, shifts, centres, points_x, points_y, ring, place, weights, profiles, quadratic,
    pair, peaks, n_images, n_candidates, n_samples, size, box, margin,
    SIDES: tl.constexpr, ANGLES: tl.constexpr, TILE_RINGS: tl.constexpr, TILE_ANGLES: tl.constexpr,
    SAMPLES: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Take the best of a few candidates in float32, and interpolate its peak, PASSES times around where it was found.

    Program (image); all of it as :func:`torchem.ops.correlation.refine_peaks`.

    Parameters
    ----------
    means
        `(n,)`: taken off first, so that sums keep their digits.
    best, which
        `(candidates, n)` int64: as ``best`` of :func:`highest_angles`, falling, and the pair. Those that are more than
        the margin below the first are not looked at.
    shifts, centres
        `(t, 2)` and `(n, 2)` float64 pixels (x, y), which add up.
    points_x, …, weights
        samples, in an order in which neighbours meet neighbours, a whole number of SAMPLES.
    profiles
        `(k, size)`: in tiles of some rings and angles, of which ``ring`` names the first and the row for each sample.
    quadratic
        `(13, 32)` float64: what takes 27 values to the quadratic's coefficients, 0, and what is added to them.
    pair, peaks
        `(n,)` int64, and `(n, 4)` float64: number of the angle, x, y, height.
    """
    image = tl.program_id(0).to(tl.int64)
    pixels, level = images + image * box * box, tl.load(means + image)
    start_x, start_y = tl.load(centres + 2 * image), tl.load(centres + 2 * image + 1)
    first = _value(tl.load(best + image))
    x, y, nearest, taken = start_x, start_y, 0, tl.load(which + image)
    values, top = tl.zeros((32,), tl.float32), float("-inf")
    for candidate in range(0, n_candidates):
        packed = tl.load(best + candidate * n_images.to(tl.int64) + image)
        if (_value(packed) >= first - margin) | (candidate == 0):
            its = tl.load(which + candidate * n_images.to(tl.int64) + image)
            shift, angle = ((packed >> 16) & 0xFFFF).to(tl.int32), (packed & 0xFFFF).to(tl.int32)
            its_x, its_y = start_x + tl.load(shifts + 2 * shift), start_y + tl.load(shifts + 2 * shift + 1)
            its_values = _around(
                pixels, level, points_x, points_y, ring, place, weights, profiles + its // SIDES * size, its_x,
                its_y, angle, its % SIDES == 1, n_samples, box, ANGLES, TILE_RINGS, TILE_ANGLES, SAMPLES,
            )  # fmt: skip
            middle = tl.sum(tl.where(tl.arange(0, 32) == 13, its_values, 0.0), 0)
            if (middle > top) | (candidate == 0):
                x, y, nearest, taken, values, top = its_x, its_y, angle, its, its_values, middle
    own, mirrored = profiles + taken // SIDES * size, taken % SIDES == 1
    turned, height = nearest.to(tl.float64), top.to(tl.float64)
    for step in tl.static_range(PASSES):
        if step > 0:
            nearest = tl.floor(turned + 0.5).to(tl.int32) & (ANGLES - 1)
            values = _around(
                pixels, level, points_x, points_y, ring, place, weights, own, x, y, nearest, mirrored, n_samples, box,
                ANGLES, TILE_RINGS, TILE_ANGLES, SAMPLES,
            )  # fmt: skip
        turn, down, right, height = _quadratic_peak(values, quadratic)
        turned, x, y = nearest.to(tl.float64) + turn, x + right, y + down
    tl.store(pair + image, taken)
    tl.store(peaks + 4 * image, turned)
    tl.store(peaks + 4 * image + 1, x)
    tl.store(peaks + 4 * image + 2, y)
    tl.store(peaks + 4 * image + 3, height)


@triton.jit
def _value(packed):
    """The value that :func:`highest_angles` packed."""
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
