"""Triton kernel that turns, shifts and mirrors images by cubic splines."""

import triton
import triton.language as tl


@triton.jit
def _weights(f):
    """Of the B-splines on the four pixels around a place, f pixels after the second of them."""
    e = 1 - f
    return e * e * e / 6, 2 / 3 - f * f * (2 - f) / 2, 2 / 3 - e * e * (2 - e) / 2, f * f * f / 6


@triton.jit
def _along(line, column, box, weights):
    """A row's share: four coefficients from a column on; the row goes on periodically."""
    total = tl.load(line + (column - 1 + box) % box) * weights[0]
    total += tl.load(line + (column + box) % box) * weights[1]
    total += tl.load(line + (column + 1 + box) % box) * weights[2]
    return total + tl.load(line + (column + 2 + box) % box) * weights[3]


@triton.jit
def spline_values(coefficients, cosines, sines, signs, shifts_x, shifts_y, out, box, PIXELS: tl.constexpr):
    """Values of `(n, L, L)` splines where the pixels of the aligned images come from; 0 beyond an image.

    Program (image, PIXELS pixels). cosines, …: `(n,)`; signs are -1 for mirrored images.
    """
    image = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    cosine, sine = tl.load(cosines + image), tl.load(sines + image)
    x = tl.load(signs + image) * (pixel % box - box // 2).to(tl.float32) - tl.load(shifts_x + image)
    y = (pixel // box - box // 2).to(tl.float32) - tl.load(shifts_y + image)
    from_x = cosine * x - sine * y + (box // 2).to(tl.float32)
    from_y = sine * x + cosine * y + (box // 2).to(tl.float32)
    last = box - 0.5
    inside = (from_x >= -0.5) & (from_x <= last) & (from_y >= -0.5) & (from_y <= last)
    # what is beyond an image is read at its first pixel
    from_x, from_y = tl.where(inside, from_x, 0.0), tl.where(inside, from_y, 0.0)
    floor_x, floor_y = tl.floor(from_x), tl.floor(from_y)
    column, row = floor_x.to(tl.int32), floor_y.to(tl.int32)
    across, down = _weights(from_x - floor_x), _weights(from_y - floor_y)
    own = coefficients + image.to(tl.int64) * box * box
    total = _along(own + (row - 1 + box) % box * box, column, box, across) * down[0]
    total += _along(own + (row + box) % box * box, column, box, across) * down[1]
    total += _along(own + (row + 1 + box) % box * box, column, box, across) * down[2]
    total += _along(own + (row + 2 + box) % box * box, column, box, across) * down[3]
    to = out + image.to(tl.int64) * box * box + pixel
    tl.store(to, tl.where(inside, total, 0.0), pixel < box * box)
