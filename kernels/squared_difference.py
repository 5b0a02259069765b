"""Triton kernels for scores of shifted images against projections: half squared distances by matrix products.

Layouts: a row of an operand is [real parts | imaginary parts], each padded to ``half`` values; operands in two terms
hold them side by side, images as [low | high], projections as [high | low]. Projections, their norms and the result
are numbered class by class, each class padded to ``stride`` orientations, a multiple of 16 handed over divided by 16
so that the compiler sees that wide stores are aligned. All sizes are run-time integers.
"""

import triton
import triton.language as tl

# leaves of a float32 the 11 significant bits of TF32; half of the last of them
_TF32 = tl.constexpr(-8192)
_TF32_HALF = tl.constexpr(4096)


@triton.jit
def _phase_shift(
    images, phases, factor, power, shifted,
    n_rows, n_shifts, n_pixels, half, program,
    TERMS: tl.constexpr, TF32: tl.constexpr, CORRELATION: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Write ROWS × PIXELS phase-shifted values of both parts into the image operand."""
    pixel_blocks = tl.cdiv(half, PIXELS)
    row = program // pixel_blocks * ROWS + tl.arange(0, ROWS)
    pixel = program % pixel_blocks * PIXELS + tl.arange(0, PIXELS)
    image, shift = row // n_shifts, row % n_shifts
    valid = pixel < n_pixels
    inside = (row < n_rows)[:, None] & valid[None, :]
    x = images + 2 * (image.to(tl.int64)[:, None] * n_pixels + pixel[None, :])
    ramp = phases + 2 * (shift[:, None] * n_pixels + pixel[None, :])
    x_re, x_im = tl.load(x, inside, other=0.0), tl.load(x + 1, inside, other=0.0)
    f_re, f_im = tl.load(ramp, inside, other=0.0), tl.load(ramp + 1, inside, other=0.0)
    if CORRELATION:
        scale = tl.rsqrt(tl.load(power + image, row < n_rows, other=1.0).to(tl.float32) / n_pixels)[:, None]
    else:
        scale = tl.load(factor + pixel, valid, other=0.0)[None, :]
    out = shifted + row.to(tl.int64)[:, None] * (2 * TERMS * half) + pixel[None, :]
    keep = (row < n_rows)[:, None] & (pixel < half)[None, :]
    for part in tl.static_range(2):
        if part == 0:
            value = (x_re * f_re - x_im * f_im) * scale
        else:
            value = (x_re * f_im + x_im * f_re) * scale
        if TF32:  # the tensor cores would cut, not round
            value = ((value.to(tl.int32, bitcast=True) + _TF32_HALF) & _TF32).to(tl.float32, bitcast=True)
        high = value.to(shifted.dtype.element_ty)
        tl.store(out + (2 * TERMS - 2 + part) * half, high, keep)
        if TERMS == 2:
            tl.store(out + part * half, (value - high.to(tl.float32)).to(shifted.dtype.element_ty), keep)


@triton.jit
def _norms(
    weights, factor, constant, projections, norms, n_images, n_pixels, half, n_columns, program,
    CORRELATION: tl.constexpr, CONSTANT: tl.constexpr, ORIENTATIONS: tl.constexpr, IMAGES: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Write a tile of ½ΣC²|P|² of the rounded projections (correlation: 1/sqrt of norm × power)."""
    image_blocks = tl.cdiv(n_images, IMAGES)
    image = program % image_blocks * IMAGES + tl.arange(0, IMAGES)
    row = program // image_blocks * ORIENTATIONS
    of_image = image < n_images
    total = tl.zeros((ORIENTATIONS, IMAGES), tl.float32)
    for start in range(0, half, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        valid = pixel < n_pixels
        w = tl.load(
            weights + image.to(tl.int64)[:, None] * n_pixels + pixel[None, :],
            of_image[:, None] & valid[None, :], other=0.0,
        )  # fmt: skip
        if not CORRELATION:
            scale = tl.load(factor + pixel, valid, other=0.0)
            w = w * (scale * scale)[None, :]
        p_re = projections.load([row, start]).to(tl.float32)
        p_im = projections.load([row, half + start]).to(tl.float32)
        square = p_re * p_re + p_im * p_im
        # three TF32 products of high and low terms: good to 2^-22
        high = (square.to(tl.int32, bitcast=True) & _TF32).to(tl.float32, bitcast=True)
        w_high = (w.to(tl.int32, bitcast=True) & _TF32).to(tl.float32, bitcast=True)
        part = tl.dot(square - high, w_high.T, input_precision="tf32")
        part = tl.dot(high, (w - w_high).T, part, input_precision="tf32")
        # the tensor cores truncate: sums are kept short there and added here
        total += tl.dot(high, w_high.T, part, input_precision="tf32", max_num_imprecise_acc=PIXELS)
    orientation = row + tl.arange(0, ORIENTATIONS)
    if CORRELATION:
        value = tl.rsqrt(total * n_pixels)
    else:
        value = 0.5 * total
        if CONSTANT:  # float64; see log_weights
            c = tl.load(constant + image, of_image, other=0.0)
            value += (-c - (-2 * c).to(tl.float32)).to(tl.float32)[None, :]
    out = norms + image.to(tl.int64)[None, :] * n_columns + orientation[:, None]
    tl.store(out, value, of_image[None, :] & (orientation < n_columns)[:, None])


@triton.jit(do_not_specialize=("n_images", "n_rows", "n_shifts", "n_pixels", "half", "columns16", "norm_programs"))
def prepare(
    images, weights, phases, factor, power, constant, projections, shifted, norms,
    n_images, n_rows, n_shifts, n_pixels, half, columns16, norm_programs,
    TERMS: tl.constexpr, TF32: tl.constexpr, CORRELATION: tl.constexpr,
    CONSTANT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ORIENTATIONS: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Everything that the product needs, in one launch: the first programs make norms, the others shifted images."""
    program = tl.program_id(0)
    if program < norm_programs:
        _norms(
            weights, factor, constant, projections, norms, n_images, n_pixels, half, columns16 * 16, program,
            CORRELATION, CONSTANT, ORIENTATIONS, IMAGES, PIXELS,
        )  # fmt: skip
    else:
        _phase_shift(
            images, phases, factor, power, shifted, n_rows, n_shifts, n_pixels, half, program - norm_programs,
            TERMS, TF32, CORRELATION, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=("n_rows", "n_shifts", "half", "n_classes", "per_class", "stride16", "n_programs"))
def log_weights(
    shifted, projections, norms, constant, orientation_prior, offset_prior, out, tile_max, tile_sum,
    n_rows, n_shifts, half, n_classes, per_class, stride16, n_programs,
    PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, CORRELATION: tl.constexpr, CONSTANT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Tiles of the product with its epilogue: norms, log priors, and each tile row's maximum and sum."""
    stride = stride16 * 16
    steps = 2 * half // DEPTH
    row_tiles = tl.cdiv(n_rows, ROWS)
    class_tiles = tl.cdiv(per_class, COLUMNS)
    tiles = row_tiles * class_tiles * n_classes
    for tile in tl.range(tl.program_id(0), tiles, n_programs, flatten=FLATTEN):
        # groups of 16 row tiles share the projections, and each other's images, in L2
        group = tile // (16 * class_tiles * n_classes)
        group_rows = tl.minimum(row_tiles - group * 16, 16)
        within = tile - group * (16 * class_tiles * n_classes)
        first_row = (group * 16 + within % group_rows) * ROWS
        column_tile = within // group_rows
        k = column_tile // class_tiles
        first = column_tile % class_tiles * COLUMNS

        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        low = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(PRODUCTS * steps):
            # low × high; of three products high × low; high × high
            a_step = tl.where(step >= 2 * steps, step - steps, step)
            b_step = tl.where(step >= (PRODUCTS - 1) * steps, step - (PRODUCTS - 1) * steps, step)
            a = shifted.load([first_row, a_step * DEPTH])
            b = projections.load([k * stride + first, b_step * DEPTH])
            if PRODUCTS == 3 or PRECISION == "ieee":
                # sums in two terms: float32 alone would lose what matters beside ‖P/σ‖² = 10^6
                part = tl.dot(a, b.T, input_precision=PRECISION, max_num_imprecise_acc=DEPTH)
                new = total + part
                low += part - (new - total)
                total = new
            else:
                total = tl.dot(a, b.T, total, input_precision=PRECISION)

        row = first_row + tl.arange(0, ROWS)
        of_row = row < n_rows
        image, shift = (row // n_shifts).to(tl.int64), row % n_shifts
        if not CORRELATION:
            offset = tl.load(offset_prior + (image * n_classes + k) * n_shifts + shift, of_row, other=0.0)
        if CONSTANT:
            base = (-2 * tl.load(constant + image, of_row, other=0.0)).to(tl.float32)
            total -= base[:, None]
        if PRODUCTS == 3 or PRECISION == "ieee":
            total += low
        line = k.to(tl.int64) * stride
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        # the tile in parts, so that norms and results do not crowd out the registers
        PARTS: tl.constexpr = COLUMNS // PART
        if PARTS == 1:
            parts = (total,)
        else:
            left, right = total.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
            if PARTS == 2:
                parts = (left, right)
            else:
                a0, a1 = left.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1).split()
                a2, a3 = right.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1).split()
                parts = (a0, a1, a2, a3)
        for i in tl.static_range(PARTS):
            column = first + i * PART + tl.arange(0, PART)
            # to the padded width, whose alignment the compiler knows
            inside = of_row[:, None] & (column < stride)[None, :]
            norm = tl.load(norms + image[:, None] * (n_classes * stride) + line + column[None, :], inside, other=0.0)
            if CORRELATION:
                value = parts[i] * norm
            else:
                prior = tl.load(orientation_prior + k * per_class + column, column < per_class, other=float("-inf"))
                value = (parts[i] - norm) + (offset[:, None] + prior[None, :])
            tl.store(out + row.to(tl.int64)[:, None] * (n_classes * stride) + line + column[None, :], value, inside)
            counted = tl.where((column < per_class)[None, :], value, float("-inf"))
            new_top = tl.maximum(top, tl.max(counted, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            mass = mass * tl.exp(top - safe) + tl.sum(tl.exp(counted - safe[:, None]), 1)
            top = new_top
        place = row.to(tl.int64) * (n_classes * class_tiles) + column_tile
        tl.store(tile_max + place, top, of_row)
        tl.store(tile_sum + place, mass, of_row)


@triton.jit(do_not_specialize=("n_rows", "n_pixels", "rows16", "columns16"))
def plain_tiled(
    image_real, image_imaginary, ctf, projection_real, projection_imaginary, out,
    n_rows, n_pixels, rows16, columns16,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Minus half of Σ|x - cp|² on FP32 units, a tile of images sharing a tile of projections (Zhang et al., §3)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    width, length = rows16.to(tl.int64) * 16, columns16.to(tl.int64) * 16
    of_row, of_column = row < width, column < length
    # a product of zeros on FP32 units: its result is laid out 4 × 4 a thread, which the sums below then share
    zeros = tl.zeros((ROWS, 16), tl.float32)
    total = tl.dot(zeros, tl.zeros((16, COLUMNS), tl.float32), input_precision="ieee")
    for start in tl.range(0, n_pixels, DEPTH, num_stages=3):
        for i in tl.static_range(DEPTH):
            x = (start + i) * width + row
            p = (start + i) * length + column
            c = tl.load(ctf + x, of_row, other=0.0)[:, None]
            real = tl.load(image_real + x, of_row, other=0.0)[:, None]
            imaginary = tl.load(image_imaginary + x, of_row, other=0.0)[:, None]
            real -= c * tl.load(projection_real + p, of_column, other=0.0)[None, :]
            imaginary -= c * tl.load(projection_imaginary + p, of_column, other=0.0)[None, :]
            total += real * real
            total += imaginary * imaginary
    keep = (row < n_rows)[:, None] & (column < length)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * length + column[None, :], -0.5 * total, keep)


@triton.jit(do_not_specialize=("n_columns", "n_shifts", "n_pixels"))
def plain_untiled(
    images, ctf, phases, projections, out, n_columns, n_shifts, n_pixels, PIXELS: tl.constexpr
):  # fmt: skip
    """The same, one pair of image and projection a program, which reads everything again."""
    column, row = tl.program_id(0), tl.program_id(1)
    image, shift = row // n_shifts, row % n_shifts
    total = tl.zeros((PIXELS,), tl.float32)
    for start in range(0, n_pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        valid = pixel < n_pixels
        x = images + 2 * (image.to(tl.int64) * n_pixels + pixel)
        ramp = phases + 2 * (shift * n_pixels + pixel)
        p = projections + 2 * (column.to(tl.int64) * n_pixels + pixel)
        x_re, x_im = tl.load(x, valid, other=0.0), tl.load(x + 1, valid, other=0.0)
        f_re, f_im = tl.load(ramp, valid, other=0.0), tl.load(ramp + 1, valid, other=0.0)
        c = tl.load(ctf + image.to(tl.int64) * n_pixels + pixel, valid, other=0.0)
        real = x_re * f_re - x_im * f_im - c * tl.load(p, valid, other=0.0)
        imaginary = x_re * f_im + x_im * f_re - c * tl.load(p + 1, valid, other=0.0)
        total += real * real + imaginary * imaginary
    tl.store(out + row.to(tl.int64) * n_columns + column, -0.5 * tl.sum(total, 0))
