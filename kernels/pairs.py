"""Pairs of an image and an orientation: cut the slice out of a Fourier volume, score it, or add the image to a volume.

One program works on BLOCK_M pairs, pixel tile by pixel tile; a slice lives in registers only. Tiles are pixels × pairs:
the pairs that a warp then works on side by side have much the same orientation, and read much the same memory. Complex
arrays come as int64 (real part in the low, imaginary in the high half), so that a value is one load. Volumes are
centred halves x >= 0 of `(D, D, D//2 + 1)`, several of them one after the other. In half precision a volume holds each
value beside its neighbour in x, so that an interpolation takes four loads, not eight.
"""

import triton
import triton.language as tl


@triton.jit
def _complex(packed):
    """Real and imaginary part of a complex number loaded as int64."""
    real = packed.to(tl.int32).to(tl.float32, bitcast=True)
    imaginary = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return real, imaginary


@triton.jit
def _cell(kx, ky, matrices, orientation, half):
    """First corner of the cell in which each slice pixel lies, its place in it, and -1 where turned to x >= 0."""
    at = matrices + orientation[None, :] * 6
    x = tl.load(at) * kx[:, None] + tl.load(at + 1) * ky[:, None]
    y = tl.load(at + 2) * kx[:, None] + tl.load(at + 3) * ky[:, None]
    z = tl.load(at + 4) * kx[:, None] + tl.load(at + 5) * ky[:, None]
    sign = tl.where(x < 0, -1.0, 1.0)
    x, y, z = x * sign, y * sign, z * sign
    floor_x, floor_y, floor_z = tl.floor(x), tl.floor(y), tl.floor(z)
    width = half + 1
    plane = width * (2 * half + 1)
    corner = floor_x.to(tl.int32) + (floor_y.to(tl.int32) + half) * width + (floor_z.to(tl.int32) + half) * plane
    return corner, x - floor_x, y - floor_y, z - floor_z, sign


@triton.jit
def _half(packed):
    """A number loaded as 16 bits."""
    return packed.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _between(volume, corner, tx, inside, PAIRED: tl.constexpr):
    """Values between two neighbours in x; PAIRED volumes hold both neighbours, in half precision, in one place."""
    packed = tl.load(volume + corner, mask=inside, other=0)
    if PAIRED:
        a_real, a_imaginary = _half(packed), _half(packed >> 16)
        b_real, b_imaginary = _half(packed >> 32), _half(packed >> 48)
    else:
        a_real, a_imaginary = _complex(packed)
        b_real, b_imaginary = _complex(tl.load(volume + corner + 1, mask=inside, other=0))
    return a_real + tx * (b_real - a_real), a_imaginary + tx * (b_imaginary - a_imaginary)


@triton.jit
def _slice(volume, corner, tx, ty, tz, sign, half, inside, PAIRED: tl.constexpr):
    """Trilinear values of the volume, conjugated where the point was turned."""
    width = half + 1
    plane = width * (2 * half + 1)
    a_real, a_imaginary = _between(volume, corner, tx, inside, PAIRED)
    b_real, b_imaginary = _between(volume, corner + width, tx, inside, PAIRED)
    c_real, c_imaginary = _between(volume, corner + plane, tx, inside, PAIRED)
    d_real, d_imaginary = _between(volume, corner + plane + width, tx, inside, PAIRED)
    low_real, low_imaginary = a_real + ty * (b_real - a_real), a_imaginary + ty * (b_imaginary - a_imaginary)
    high_real, high_imaginary = c_real + ty * (d_real - c_real), c_imaginary + ty * (d_imaginary - c_imaginary)
    real = low_real + tz * (high_real - low_real)
    imaginary = low_imaginary + tz * (high_imaginary - low_imaginary)
    return real, imaginary * sign


@triton.jit(do_not_specialize=["n_pairs", "n_pixels", "n_shifts", "half"])
def score_pairs_kernel(
    volumes, unit, first, matrices, orientation, which, kx, ky, images, weights, phases, cross, norm,
    n_pairs, n_pixels, n_shifts, half, r_max2,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, PAIRED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """cross[i, t] = Re sum X phi_t P*, norm[i] = sum W |P|^2, of image which[i] at matrices[orientation[i]]."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = pair < n_pairs
    turn = tl.load(orientation + pair, mask=present, other=0)
    image = tl.load(which + pair, mask=present, other=0)
    volume = volumes + tl.load(first + turn)[None, :]
    shift = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for start in range(0, n_pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        valid = pixel < n_pixels
        x = tl.load(kx + pixel, mask=valid, other=0.0)
        y = tl.load(ky + pixel, mask=valid, other=0.0)
        inside = (valid & (x * x + y * y <= r_max2))[:, None] & present[None, :]
        corner, tx, ty, tz, sign = _cell(x, y, matrices, turn, half)
        real, imaginary = _slice(volume, corner, tx, ty, tz, sign, half, inside, PAIRED)
        at = pixel[:, None] + image[None, :] * n_pixels
        image_real, image_imaginary = _complex(tl.load(images + at, mask=inside, other=0))
        square += tl.load(weights + at, mask=inside, other=0.0) * (real * real + imaginary * imaginary)
        known = (shift < n_shifts)[:, None] & valid[None, :]
        ramp = tl.load(phases + shift[:, None] * n_pixels + pixel[None, :], mask=known, other=0)
        ramp_real, ramp_imaginary = _complex(ramp)
        product = real * image_real + imaginary * image_imaginary
        total = tl.dot(ramp_real, product, total, input_precision=DOT)
        product = imaginary * image_real - real * image_imaginary
        total = tl.dot(ramp_imaginary, product, total, input_precision=DOT)
    # volumes hold multiples of this unit
    one = tl.load(unit)
    known = (shift < n_shifts)[:, None] & present[None, :]
    tl.store(cross + pair[None, :] * n_shifts + shift[:, None], total * one, mask=known)
    if tl.program_id(1) == 0:
        tl.store(norm + pair, tl.sum(square, 0) * one * one, mask=present)


@triton.jit
def _spread(sums, corner, tx, ty, tz, real, imaginary, weight, unit, half, inside, FIXED: tl.constexpr):
    """Share (real, imaginary, weight, nothing) of each pixel between the corners of its cell."""
    values = tl.join(tl.join(real, weight), tl.join(imaginary, tl.zeros_like(weight)))
    values = tl.reshape(values, (real.shape[0], real.shape[1], 4))
    width = half + 1
    plane = width * (2 * half + 1)
    eight, four = tl.arange(0, 8), tl.arange(0, 4)
    upper_x, upper_y, upper_z = eight & 1, (eight >> 1) & 1, eight >> 2
    share = tl.where(upper_x == 1, tx[:, :, None], 1 - tx[:, :, None])
    share *= tl.where(upper_y == 1, ty[:, :, None], 1 - ty[:, :, None])
    share *= tl.where(upper_z == 1, tz[:, :, None], 1 - tz[:, :, None])
    values = share[:, :, :, None] * values[:, :, None, :]
    there = corner[:, :, None] + (upper_x + upper_y * width + upper_z * plane)
    there = sums + there[:, :, :, None] * 4 + four
    inside = tl.broadcast_to(inside[:, :, None, None], values.shape)
    if FIXED:
        tl.atomic_add(there, (values * unit).to(tl.int64), mask=inside & (four < 3), sem="relaxed")
    else:
        tl.atomic_add(there, values, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["n_slices", "n_pixels", "half"])
def insert_slices_kernel(
    first, matrices, kx, ky, values, weights, sums, fixed_point, n_slices, n_pixels, half, r_max2,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Add slices and their weights to the volumes that they were cut from."""
    number = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = number < n_slices
    turn = tl.where(present, number, 0)
    base = tl.load(first + turn)[None, :]
    unit = tl.load(fixed_point)
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = pixel < n_pixels
    x = tl.load(kx + pixel, mask=valid, other=0.0)
    y = tl.load(ky + pixel, mask=valid, other=0.0)
    inside = (valid & (x * x + y * y <= r_max2))[:, None] & present[None, :]
    corner, tx, ty, tz, sign = _cell(x, y, matrices, turn, half)
    at = pixel[:, None] + turn[None, :] * n_pixels
    real, imaginary = _complex(tl.load(values + at, mask=inside, other=0))
    weight = tl.load(weights + at, mask=inside, other=0.0)
    _spread(sums, corner + base, tx, ty, tz, real, imaginary * sign, weight, unit, half, inside, FIXED)


@triton.jit(do_not_specialize=["n_pairs", "n_pixels", "n_shifts", "half"])
def add_pairs_kernel(
    volumes, first, matrices, orientation, which, kx, ky, aligned, ctf2, numerator, denominator, scale, strong,
    phases, probability, sums, figures, residual, fixed_points,
    n_pairs, n_pixels, n_shifts, half, r_max2,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Add pairs with the probabilities of their shifts to the sums; what noise, norm and scale need on the way.

    With Q = sum_t w_t phi_t and A = Re C X Q P*, B = sum_t w_t |C P|^2: figures[i] are the sums over pixels of
    s^2 B - 2 s A, A where strong, B where strong; residual[p] is the first of them summed over pairs.
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = pair < n_pairs
    turn = tl.load(orientation + pair, mask=present, other=0)
    image = tl.load(which + pair, mask=present, other=0)
    base = tl.load(first + turn)[None, :]
    volume_unit = tl.load(fixed_points)
    residual_unit = tl.load(fixed_points + 1)
    own_scale = tl.load(scale + image, mask=present, other=0.0)[None, :]
    weight = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, n_shifts, BLOCK_T):
        shift = begin + tl.arange(0, BLOCK_T)
        known = (shift < n_shifts)[:, None] & present[None, :]
        weight += tl.sum(tl.load(probability + pair[None, :] * n_shifts + shift[:, None], mask=known, other=0.0), 0)
    norm = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    strong_a = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    strong_b = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for start in range(0, n_pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        valid = pixel < n_pixels
        # the mean phase ramp of each pair
        ramp_real = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
        ramp_imaginary = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
        for begin in range(0, n_shifts, BLOCK_T):
            shift = begin + tl.arange(0, BLOCK_T)
            known = (shift < n_shifts)[:, None] & present[None, :]
            w = tl.load(probability + pair[None, :] * n_shifts + shift[:, None], mask=known, other=0.0)
            known = valid[:, None] & (shift < n_shifts)[None, :]
            ramp = tl.load(phases + shift[None, :] * n_pixels + pixel[:, None], mask=known, other=0)
            phase_real, phase_imaginary = _complex(ramp)
            ramp_real = tl.dot(phase_real, w, ramp_real, input_precision="ieee")
            ramp_imaginary = tl.dot(phase_imaginary, w, ramp_imaginary, input_precision="ieee")
        x = tl.load(kx + pixel, mask=valid, other=0.0)
        y = tl.load(ky + pixel, mask=valid, other=0.0)
        inside = (valid & (x * x + y * y <= r_max2))[:, None] & present[None, :]
        corner, tx, ty, tz, sign = _cell(x, y, matrices, turn, half)
        real, imaginary = _slice(volumes + base, corner, tx, ty, tz, sign, half, inside, False)

        at = pixel[:, None] + image[None, :] * n_pixels
        x_real, x_imaginary = _complex(tl.load(aligned + at, mask=inside, other=0))
        shifted_real = x_real * ramp_real - x_imaginary * ramp_imaginary
        shifted_imaginary = x_real * ramp_imaginary + x_imaginary * ramp_real
        a = shifted_real * real + shifted_imaginary * imaginary
        b = tl.load(ctf2 + at, mask=inside, other=0.0) * (real * real + imaginary * imaginary) * weight[None, :]
        difference = own_scale * (own_scale * b - 2 * a)
        norm += difference
        chosen = tl.load(strong + pixel, mask=valid, other=0.0)[:, None]
        strong_a += a * chosen
        strong_b += b * chosen
        if FIXED:
            whole = (difference * residual_unit).to(tl.int64)
            tl.atomic_add(residual + pixel, tl.sum(whole, 1), mask=valid, sem="relaxed")
        else:
            tl.atomic_add(residual + pixel, tl.sum(difference, 1).to(tl.float64), mask=valid, sem="relaxed")

        x_real, x_imaginary = _complex(tl.load(numerator + at, mask=inside, other=0))
        shifted_real = x_real * ramp_real - x_imaginary * ramp_imaginary
        shifted_imaginary = (x_real * ramp_imaginary + x_imaginary * ramp_real) * sign
        d = tl.load(denominator + at, mask=inside, other=0.0) * weight[None, :]
        _spread(
            sums, corner + base, tx, ty, tz, shifted_real, shifted_imaginary, d, volume_unit, half, inside, FIXED
        )
    tl.store(figures + pair * 3, tl.sum(norm, 0), mask=present)
    tl.store(figures + pair * 3 + 1, tl.sum(strong_a, 0), mask=present)
    tl.store(figures + pair * 3 + 2, tl.sum(strong_b, 0), mask=present)
