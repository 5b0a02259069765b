"""Triton kernels for scores of shifted images against projections: half squared distances by matrix products.

Layouts: a row of an operand is [real parts | imaginary parts], each padded to ``half`` values; operands in two terms
hold them side by side, images as [low | high], projections as [high | low]. Norms are a row for each image; unless
summed in double, the rows of high and then of low weights, to be added. Projections, their norms and the result are
numbered class by class, each class padded to ``stride`` orientations, a multiple of 16. It is handed over divided by
16, and ``half`` by 64, so that the compiler sees that wide loads and stores are aligned. All sizes are run-time
integers.
"""

import triton
import triton.language as tl

# leaves of a float32 the 11 significant bits of TF32; half of the last of them
_TF32 = tl.constexpr(-8192)
_TF32_HALF = tl.constexpr(4096)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _phase_shift(
    images, phases, factor, power, shifted,
    n_images, n_shifts, n_pixels, half, program,
    TERMS: tl.constexpr, TF32: tl.constexpr, CORRELATION: tl.constexpr,
    IMAGES: tl.constexpr, SHIFTS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Write PIXELS phase-shifted values of both parts of IMAGES at SHIFTS into the image operand."""
    pixel_blocks = tl.cdiv(half, PIXELS)
    blocks = tl.cdiv(n_shifts, SHIFTS) * pixel_blocks
    image = program // blocks * IMAGES + tl.arange(0, IMAGES)
    shift = program % blocks // pixel_blocks * SHIFTS + tl.arange(0, SHIFTS)
    pixel = program % pixel_blocks * PIXELS + tl.arange(0, PIXELS)
    of_image, of_shift, valid = image < n_images, shift < n_shifts, pixel < n_pixels
    x = images + 2 * (image.to(tl.int64)[:, None] * n_pixels + pixel[None, :])[:, :, None] + tl.arange(0, 2)
    ramp = phases + 2 * (shift[:, None] * n_pixels + pixel[None, :])[:, :, None] + tl.arange(0, 2)
    x_re, x_im = tl.load(x, (of_image[:, None] & valid[None, :])[:, :, None], other=0.0).split()
    f_re, f_im = tl.load(ramp, (of_shift[:, None] & valid[None, :])[:, :, None], other=0.0).split()
    if CORRELATION:
        scale = tl.rsqrt(tl.load(power + image, of_image, other=1.0).to(tl.float32) / n_pixels)[:, None]
    else:
        scale = tl.load(factor + pixel, valid, other=0.0)[None, :]
    x_re, x_im = (x_re * scale)[:, None, :], (x_im * scale)[:, None, :]
    f_re, f_im = f_re[None, :, :], f_im[None, :, :]
    row = image.to(tl.int64)[:, None] * n_shifts + shift[None, :]
    out = shifted + row[:, :, None] * (2 * TERMS * half) + pixel[None, None, :]
    keep = (of_image[:, None] & of_shift[None, :])[:, :, None] & (pixel < half)[None, None, :]
    for part in tl.static_range(2):
        if part == 0:
            value = x_re * f_re - x_im * f_im
        else:
            value = x_re * f_im + x_im * f_re
        if TF32:  # the tensor cores would cut, not round
            value = ((value.to(tl.int32, bitcast=True) + _TF32_HALF) & _TF32).to(tl.float32, bitcast=True)
        high = value.to(shifted.dtype.element_ty)
        tl.store(out + (2 * TERMS - 2 + part) * half, high, keep)
        if TERMS == 2:
            tl.store(out + part * half, (value - high.to(tl.float32)).to(shifted.dtype.element_ty), keep)


@triton.jit
def _split_weights(
    weights, factor, split, n_images, n_pixels, half, program,
    TERMS: tl.constexpr, CORRELATION: tl.constexpr, IMAGES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Write PIXELS weights of IMAGES, for whitened projections, as the high and low rows of the norms' product."""
    pixel_blocks = tl.cdiv(half, PIXELS)
    image = program // pixel_blocks * IMAGES + tl.arange(0, IMAGES)
    pixel = program % pixel_blocks * PIXELS + tl.arange(0, PIXELS)
    valid = pixel < n_pixels
    of_image = (image < n_images)[:, None]
    w = tl.load(weights + image.to(tl.int64)[:, None] * n_pixels + pixel[None, :], of_image & valid[None, :], other=0.0)
    if not CORRELATION:
        scale = tl.load(factor + pixel, valid, other=0.0)
        w *= (scale * scale)[None, :]
    high = w.to(split.dtype.element_ty)
    low = (w - high.to(tl.float32)).to(split.dtype.element_ty)
    out = split + image.to(tl.int64)[:, None] * (TERMS * half) + pixel[None, :]
    keep = of_image & (pixel < half)[None, :]
    lower = n_images.to(tl.int64) * (TERMS * half)
    for term in tl.static_range(TERMS):  # of the squared projections
        tl.store(out + term * half, high, keep)
        tl.store(out + lower + term * half, low, keep)


@triton.jit(do_not_specialize=("n_images", "n_shifts", "n_pixels", "half64", "weight_programs"))
def prepare(
    images, weights, phases, factor, power, shifted, split,
    n_images, n_shifts, n_pixels, half64, weight_programs,
    TERMS: tl.constexpr, TF32: tl.constexpr, CORRELATION: tl.constexpr,
    WEIGHTS: tl.constexpr, IMAGES: tl.constexpr, SHIFTS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Left operands of both products, in one launch: the first programs split weights, the others shift images."""
    program, half = tl.program_id(0), half64 * 64
    if split is not None:  # exact norms need no weights from here
        if program < weight_programs:
            _split_weights(
                weights, factor, split, n_images, n_pixels, half, program, TERMS, CORRELATION, WEIGHTS, PIXELS
            )  # fmt: skip
    if program >= weight_programs:
        _phase_shift(
            images, phases, factor, power, shifted, n_images, n_shifts, n_pixels, half, program - weight_programs,
            TERMS, TF32, CORRELATION, IMAGES, SHIFTS, PIXELS,
        )  # fmt: skip


@triton.jit
def _leading(x):
    """The 11 leading bits, of infinity those of a large number: two such terms are beyond what float32 holds."""
    return (tl.minimum(x, 3e38).to(tl.int32, bitcast=True) & _TF32).to(tl.float32, bitcast=True)


@triton.jit
def _in_parts(x, PARTS: tl.constexpr):
    """Blocks of neighbouring columns."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if PARTS == 1:
        parts = (x,)
    else:
        left, right = x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        if PARTS == 2:
            parts = (left, right)
        else:
            a, b = left.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1).split()
            c, d = right.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1).split()
            parts = (a, b, c, d)
    return parts


@triton.jit
def _place(tile, row_tiles, column_tiles):
    """Row and column of a tile: groups of 16 rows share the projections, and each other's images, in L2."""
    group = tile // (16 * column_tiles)
    group_rows = tl.minimum(row_tiles - group * 16, 16)
    within = tile - group * (16 * column_tiles)
    return group * 16 + within % group_rows, within // group_rows


@triton.jit
def _score_tile(
    shifted, projections, norms, unit, constant, orientation_prior, offset_prior, out, tile_max, tile_sum,
    first_row, k, first, n_rows, n_shifts, half, n_classes, per_class, stride,
    PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, CORRELATION: tl.constexpr, CONSTANT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr, SUMMED: tl.constexpr,
    FEW_IMAGES: tl.constexpr,
):  # fmt: skip
    """A tile of the product with its epilogue: norms, log priors, and maxima and sums of SUMMED columns of each row."""
    steps = 2 * half // DEPTH
    EXACT: tl.constexpr = PRODUCTS == 3 or PRECISION == "ieee"
    ADDED: tl.constexpr = FEW_IMAGES and not (CORRELATION or EXACT)  # norms and priors are one more step
    PARTS: tl.constexpr = COLUMNS // PART
    width = n_classes.to(tl.int64) * stride
    below = n_rows // n_shifts * width  # from norms by high weights to those by low ones
    line = norms + k.to(tl.int64) * stride
    row = first_row + tl.arange(0, ROWS)
    of_row = row < n_rows
    if FEW_IMAGES:
        its = first_row // n_shifts + tl.arange(0, 16)
        starts = its * n_shifts
        column = first + tl.arange(0, COLUMNS)
        # to the padded width, whose alignment the compiler knows
        inside = (starts < tl.minimum(first_row + ROWS, n_rows))[:, None] & (column < stride)[None, :]
        place = line + its.to(tl.int64)[:, None] * width + column[None, :]
    if ADDED:  # arrive while the product is made
        rest, rest_low = tl.load(place, inside, other=0.0), tl.load(place + below, inside, other=0.0)
        prior = tl.load(orientation_prior + k * per_class + column, column < per_class, other=float("-inf"))
        scale = tl.load(unit)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    low = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(PRODUCTS * steps):
        # low × high; of three products high × low; high × high
        a_step = tl.where(step >= 2 * steps, step - steps, step)
        b_step = tl.where(step >= (PRODUCTS - 1) * steps, step - (PRODUCTS - 1) * steps, step)
        a = shifted.load([first_row, a_step * DEPTH])
        b = projections.load([k * stride + first, b_step * DEPTH])
        if EXACT:
            # sums in two terms: float32 alone would lose what matters beside ‖P/σ‖² = 10^6
            part = tl.dot(a, b.T, input_precision=PRECISION, max_num_imprecise_acc=DEPTH)
            new = total + part
            low += part - (new - total)
            total = new
        else:
            total = tl.dot(a, b.T, total, input_precision=PRECISION)

    if CORRELATION:
        offset = tl.zeros((ROWS,), tl.float32)
    else:
        offset = tl.load(offset_prior + k.to(tl.int64) * n_rows + row, of_row, other=0.0)
    if CONSTANT:
        c = tl.load(constant + row // n_shifts, of_row, other=0.0)
        base = (-2 * c).to(tl.float32)
        total -= base[:, None]
    if EXACT:
        total += low
    if FEW_IMAGES:
        # the tensor cores bring norms to their rows: loads would force another layout upon the tile
        of_image = (row[:, None] >= starts[None, :]) & (row[:, None] < (starts + n_shifts)[None, :])
        one = tl.where(of_image, 1.0, 0.0)
        if ADDED:
            rest = (rest + rest_low) * scale - prior[None, :]
            if CONSTANT:
                of_its = tl.load(constant + its, starts < n_rows, other=0.0)
                rest -= (of_its + (-2 * of_its).to(tl.float32).to(tl.float64)).to(tl.float32)[:, None]
            for _ in tl.static_range(2):
                high = _leading(rest)
                total = tl.dot(-one, high, total, input_precision="tf32")
                rest -= high
        else:
            rest = tl.load(place, inside, other=0.0)
            if not EXACT:
                rest += tl.load(place + below, inside, other=0.0)
            norm_parts = _in_parts(rest, PARTS)
    # the tile in parts, so that norms and results do not crowd out the registers
    parts = _in_parts(total, PARTS)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(PARTS):
        value = parts[i]
        column = first + i * PART + tl.arange(0, PART)
        if ADDED:
            value += offset[:, None]
        else:
            if FEW_IMAGES:
                norm = tl.zeros((ROWS, PART), tl.float32)
                rest = norm_parts[i]
                for _ in tl.static_range(3 if EXACT else 2):
                    high = _leading(rest)
                    norm = tl.dot(one, high, norm, input_precision="tf32")
                    rest -= high
            else:
                place = line + (row // n_shifts).to(tl.int64)[:, None] * width + column[None, :]
                inside = of_row[:, None] & (column < stride)[None, :]
                norm = tl.load(place, inside, other=0.0)
                if not EXACT:
                    norm += tl.load(place + below, inside, other=0.0)
            if not EXACT:
                norm *= tl.load(unit)
            if CORRELATION:
                value *= tl.rsqrt(norm)
            else:
                if CONSTANT and not EXACT:
                    norm -= (c + base.to(tl.float64)).to(tl.float32)[:, None]
                prior = tl.load(orientation_prior + k * per_class + column, column < per_class, other=float("-inf"))
                value = (value - norm) + (offset[:, None] + prior[None, :])
        out.store([first_row, k, first + i * PART], value.reshape(ROWS, 1, PART))
        if CORRELATION:
            value = tl.where((column < per_class)[None, :], value, float("-inf"))
        new_top = tl.maximum(top, tl.max(value, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top) * _LOG2_E
        mass = mass * tl.exp2(top * _LOG2_E - safe) + tl.sum(tl.exp2(value * _LOG2_E - safe[:, None]), 1)
        top = new_top
        if (i + 1) * PART % SUMMED == 0:
            class_tiles = tl.cdiv(per_class, SUMMED)
            tile = (first + i * PART) // SUMMED
            place = row.to(tl.int64) * (n_classes * class_tiles) + k * class_tiles + tile
            keep = row < tl.where(tile < class_tiles, n_rows, 0)
            tl.store(tile_max + place, top, keep)
            tl.store(tile_sum + place, mass, keep)
            top = tl.full((ROWS,), float("-inf"), tl.float32)
            mass = tl.zeros((ROWS,), tl.float32)


@triton.jit(do_not_specialize=("n_rows", "n_shifts", "half", "n_classes", "per_class", "stride16", "n_whole"))
def log_weights(
    shifted, projections, half_projections, norms, unit, constant, orientation_prior, offset_prior, out,
    tile_max, tile_sum, n_rows, n_shifts, half, n_classes, per_class, stride16, n_whole,
    PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, CORRELATION: tl.constexpr, CONSTANT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr, FEW_IMAGES: tl.constexpr,
):  # fmt: skip
    """All tiles, one after another in each program: ``n_whole`` of them whole, before these the others in halves."""
    HALF: tl.constexpr = COLUMNS // 2
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    stride = stride16 * 16
    row_tiles = tl.cdiv(n_rows, ROWS)
    class_tiles = tl.cdiv(per_class, COLUMNS)
    column_tiles = class_tiles * n_classes
    for piece in tl.range(program, 2 * (row_tiles * column_tiles - n_whole), n_programs):
        row_tile, column_tile = _place(n_whole + piece // 2, row_tiles, column_tiles)
        _score_tile(
            shifted, half_projections, norms, unit, constant, orientation_prior, offset_prior, out, tile_max, tile_sum,
            row_tile * ROWS, column_tile // class_tiles, column_tile % class_tiles * COLUMNS + piece % 2 * HALF,
            n_rows, n_shifts, half, n_classes, per_class, stride,
            PRODUCTS, PRECISION, CORRELATION, CONSTANT, ROWS, HALF, DEPTH, PART, HALF, FEW_IMAGES,
        )  # fmt: skip
    for tile in tl.range(program, n_whole, n_programs):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles)
        _score_tile(
            shifted, projections, norms, unit, constant, orientation_prior, offset_prior, out, tile_max, tile_sum,
            row_tile * ROWS, column_tile // class_tiles, column_tile % class_tiles * COLUMNS,
            n_rows, n_shifts, half, n_classes, per_class, stride,
            PRODUCTS, PRECISION, CORRELATION, CONSTANT, ROWS, COLUMNS, DEPTH, PART, HALF, FEW_IMAGES,
        )  # fmt: skip


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
