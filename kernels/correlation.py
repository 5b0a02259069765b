"""Triton kernels for rotational correlation: the best angle of every image, shift and reference, and peaks in float32.

The correlation of an image at a shift with a reference, straight and mirrored, is a series in the angle: sums over
rings for every frequency (small products, batched over frequencies), turned into values at all angles by products with
waves (four quarters), of which only the largest is written. Neither series nor values are ever in memory.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("n_rows", "quarter16", "rings16", "n_tiles", "padded4", "width64"))
def best_angles(
    spectra, rows, ring_counts, references, waves, scale, values, angles,
    n_rows, quarter16, rings16, n_tiles, width64, padded4,
    SIDES: tl.constexpr, IMAGES: tl.constexpr, REFERENCES: tl.constexpr, FREQUENCIES: tl.constexpr,
    RINGS: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    """Largest correlation coefficient over the angles, and the number of its angle.

    Program (tile of images and references, shift). references: `(2, quarter, padded, 2, rings)`, values and angles:
    `(t, padded, SIDES, width)`. Images, references and rings are padded to whole tiles (references by 0), FREQUENCIES
    and ANGLES divide the quarter: nothing is masked, so that loads are wide. Of FREQUENCIES together the first has the
    most rings, the others' references are 0 there.
    """
    ROWS: tl.constexpr = IMAGES * REFERENCES * SIDES
    # handed over divided, so that the compiler sees that wide loads are aligned
    quarter, all_rings, padded, width = quarter16 * 16, rings16 * 16, padded4 * 4, width64 * 64
    tile = tl.program_id(0)
    shift = tl.program_id(1).to(tl.int64)
    image = tile // n_tiles * IMAGES + tl.arange(0, IMAGES)
    first_reference = tile % n_tiles * REFERENCES
    here = spectra + shift * n_rows * width
    column = first_reference * 2 + tl.arange(0, 2 * REFERENCES)
    frequency = tl.arange(0, FREQUENCIES)
    ring = tl.arange(0, RINGS)
    n_angles = 4 * quarter

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    number = tl.zeros((ROWS,), tl.int32)
    for start in range(0, quarter, ANGLES):
        angle = start + tl.arange(0, ANGLES)
        near = tl.zeros((ROWS, ANGLES), tl.float32)
        far = tl.zeros((ROWS, ANGLES), tl.float32)
        s = tl.zeros((ROWS, ANGLES), tl.float32)
        d = tl.zeros((ROWS, ANGLES), tl.float32)
        for parity in tl.static_range(2):
            cosine = tl.zeros((ROWS, ANGLES), tl.float32)
            sine = tl.zeros((ROWS, ANGLES), tl.float32)
            for low in range(0, quarter, FREQUENCIES):
                n_rings = tl.load(ring_counts + low)
                line = tl.load(rows + parity * quarter + low + frequency)
                other = tl.load(rows + (2 + parity) * quarter + low + frequency)
                of_real = tl.zeros((FREQUENCIES, IMAGES, 2 * REFERENCES), tl.float32)
                of_imaginary = tl.zeros((FREQUENCIES, IMAGES, 2 * REFERENCES), tl.float32)
                for inner in range(0, n_rings, RINGS):
                    r = inner + ring
                    at = (line[:, None, None] + r[None, None, :]).to(tl.int64) * width + image[None, :, None]
                    p_real = tl.load(here + at)
                    at = (other[:, None, None] + r[None, None, :]).to(tl.int64) * width + image[None, :, None]
                    p_imaginary = tl.load(here + at)
                    at = (parity * quarter + low + frequency)[:, None, None] * (2 * padded) + column[None, None, :]
                    q = tl.load(references + at * all_rings + r[None, :, None])
                    of_real = tl.dot(p_real, q, of_real)
                    of_imaginary = tl.dot(p_imaginary, q, of_imaginary)
                rr, ri = tl.split(of_real.reshape(FREQUENCIES, IMAGES, REFERENCES, 2))
                ir, ii = tl.split(of_imaginary.reshape(FREQUENCIES, IMAGES, REFERENCES, 2))
                if SIDES == 2:
                    real = tl.join(rr + ii, rr - ii).permute(1, 2, 3, 0)
                    imaginary = tl.join(ir - ri, ir + ri).permute(1, 2, 3, 0)
                else:
                    real = (rr + ii).permute(1, 2, 0)
                    imaginary = (ir - ri).permute(1, 2, 0)
                real = real.reshape(ROWS, FREQUENCIES).to(tl.float16)
                imaginary = imaginary.reshape(ROWS, FREQUENCIES).to(tl.float16)
                wave = waves + (parity * quarter + low + frequency)[:, None] * quarter + angle[None, :]
                cosine = tl.dot(real, tl.load(wave), cosine)
                wave += 2 * quarter * quarter
                sine = tl.dot(imaginary, tl.load(wave), sine)
            if parity == 0:
                near, far, s, d = cosine, cosine, sine, sine
            else:
                near, far, s, d = near + cosine, far - cosine, s + sine, d - sine
        # θ and -θ; π - θ and π + θ
        first = near + tl.abs(s)
        second = far + tl.abs(d)
        first_number = tl.where(s < 0, angle[None, :], n_angles - 1 - angle[None, :])
        second_number = tl.where(d < 0, n_angles // 2 + angle[None, :], n_angles // 2 - 1 - angle[None, :])
        value = tl.maximum(first, second)
        which = tl.where(first >= second, first_number, second_number)
        highest, place = tl.max(value, 1, return_indices=True)
        its = tl.sum(tl.where(place[:, None] == tl.arange(0, ANGLES)[None, :], which, 0), 1)
        number = tl.where(highest > top, its, number)
        top = tl.maximum(top, highest)

    row = tl.arange(0, ROWS)
    its_image = tile // n_tiles * IMAGES + row // (REFERENCES * SIDES)
    reference = first_reference + row // SIDES % REFERENCES
    side = row % SIDES
    # mirrored references are turned by half a circle
    number = (number + side * (n_angles // 2)) % n_angles
    factor = tl.load(scale + shift * width + its_image)
    out = ((shift * padded + reference) * SIDES + side) * width + its_image
    tl.store(values + out, top * factor)
    tl.store(angles + out, number.to(tl.int16))


@triton.jit(do_not_specialize=("n_samples", "n_rings", "n_angles", "n_candidates"))
def peak_values(
    images, points_x, points_y, ring, place, weights, profiles, centres, reference, mirror, nearest, wanted, out,
    n_samples, n_rings, n_angles, n_candidates, box, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Correlation coefficients at 3 angles × 3 × 3 centres around each candidate's peak, sample by sample in float32.

    Program (candidate of an image); centres, reference, … are `(n, candidates)`, out is `(n, candidates, 3, 9)`;
    candidates that are not wanted get minus infinity.
    """
    candidate = tl.program_id(0).to(tl.int64)
    image = candidate // n_candidates
    near = tl.arange(0, 16)
    turn = tl.arange(0, 4)
    target = out + candidate * 27 + turn[:, None] * 9 + near[None, :]
    keep = (turn < 3)[:, None] & (near < 9)[None, :]
    if tl.load(wanted + candidate) == 0:
        tl.store(target, tl.full((4, 16), float("-inf"), tl.float32), keep)
    else:
        middle = box // 2
        x = tl.load(centres + candidate * 2) + ((near % 3 - 1) + middle).to(tl.float64)
        y = tl.load(centres + candidate * 2 + 1) + ((near // 3 - 1) + middle).to(tl.float64)
        # whole and fraction apart, so that float32 keeps all digits
        whole_x, whole_y = tl.floor(x), tl.floor(y)
        part_x, part_y = (x - whole_x).to(tl.float32), (y - whole_y).to(tl.float32)
        whole_x, whole_y = whole_x.to(tl.int32), whole_y.to(tl.int32)
        own = profiles + tl.load(reference + candidate) * n_rings * (2 * n_angles)
        mirrored = tl.load(mirror + candidate)
        pixels = images + image * box * box
        total = tl.zeros((16, SAMPLES), tl.float32)
        power = tl.zeros((16, SAMPLES), tl.float32)
        low = tl.zeros((16, SAMPLES), tl.float32)
        mid = tl.zeros((16, SAMPLES), tl.float32)
        high = tl.zeros((16, SAMPLES), tl.float32)
        for start in range(0, n_samples, SAMPLES):
            sample = start + tl.arange(0, SAMPLES)
            inside = sample < n_samples
            px = tl.load(points_x + sample, inside, other=0.0)[None, :] + part_x[:, None]
            py = tl.load(points_y + sample, inside, other=0.0)[None, :] + part_y[:, None]
            floor_x, floor_y = tl.floor(px), tl.floor(py)
            fx, fy = px - floor_x, py - floor_y
            left, upper = floor_x.to(tl.int32) + whole_x[:, None], floor_y.to(tl.int32) + whole_y[:, None]
            right = tl.minimum(tl.maximum(left + 1, 0), box - 1)
            lower = tl.minimum(tl.maximum(upper + 1, 0), box - 1)
            left = tl.minimum(tl.maximum(left, 0), box - 1)
            upper = tl.minimum(tl.maximum(upper, 0), box - 1)
            known = inside[None, :] & (near < 9)[:, None]
            a = tl.load(pixels + upper * box + left, known, other=0.0)
            b = tl.load(pixels + upper * box + right, known, other=0.0)
            c = tl.load(pixels + lower * box + left, known, other=0.0)
            d = tl.load(pixels + lower * box + right, known, other=0.0)
            a += fx * (b - a)
            c += fx * (d - c)
            value = a + fy * (c - a)
            weighted = value * tl.load(weights + sample, inside, other=0.0)[None, :]
            total += weighted
            power += weighted * value
            line = tl.load(ring + sample, inside, other=0) * (2 * n_angles)
            its = tl.load(place + sample, inside, other=0)
            for i in tl.static_range(3):
                now = 2 * (tl.load(nearest + candidate) + i - 1) + 1
                turned = tl.where(mirrored != 0, n_angles + now - its, its - now)
                # the remainder of what may be negative
                turned = (turned + 8 * n_angles) % (2 * n_angles)
                q = tl.load(own + line + turned, inside, other=0.0)[None, :]
                if i == 0:
                    low += value * q
                elif i == 1:
                    mid += value * q
                else:
                    high += value * q
        mean = tl.sum(total, 1)
        variance = tl.sum(power, 1) - mean * mean
        deviation = tl.where(variance > 0, tl.rsqrt(tl.maximum(variance, 1e-30)), 0.0)
        line = out + candidate * 27 + near
        tl.store(line, tl.sum(low, 1) * deviation, near < 9)
        tl.store(line + 9, tl.sum(mid, 1) * deviation, near < 9)
        tl.store(line + 18, tl.sum(high, 1) * deviation, near < 9)
