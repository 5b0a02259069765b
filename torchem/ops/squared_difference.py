r"""Scores of images against shifted projections: minus half the noise-weighted squared distance.

With everything divided by sigma, :math:`-\tfrac12\|X_t - CP\|^2 = -\tfrac12\|X\|^2 + \Re\sum (C X_t) P^* -
\tfrac12 \sum C^2 |P|^2`: a matrix product, a smaller one, and a constant of the image, which is left out here
(Zhang et al. 2018, eq. 5.1; RELION's getAllSquaredDifferences).

:func:`log_weights` does a whole grid with its priors, by Triton kernels on a GPU. In half precision its norms are
those of the rounded projections: the score is then exact for a slightly different reference, and only noise ×
rounding is lost.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchem.runtime.cpu import side_by_side

# log weights that a CPU works on at once, each on a core of its own: they stay in its caches
BLOCK = 2**19
# nats under the largest weight where exp stops: a CPU takes seven times as long for subnormal numbers
NOTHING = -80.0


@dataclass(frozen=True)
class Precision:
    """How a real operand is split into terms, and how many of their products are taken."""

    dtype: torch.dtype
    image_terms: int
    projection_terms: int
    products: int
    mode: str = "tf32"  # of the tensor cores; ieee: FP32 units


PRECISIONS = {
    "fp16": Precision(torch.float16, 1, 1, 1),
    "split": Precision(torch.float16, 2, 1, 2),
    "three": Precision(torch.float16, 2, 2, 3),
    "tf32": Precision(torch.float32, 1, 1, 1),
    "fp32": Precision(torch.float32, 1, 1, 1, "ieee"),
    "fp64": Precision(torch.float64, 1, 1, 1, "ieee"),  # by PyTorch, on the FP64 tensor cores
}
# The largest Σ|C·P/σ|² for which each keeps log weights within 20 of the best to 0.02 (rms). Rounded projections cost
# noise × rounding, as the square root; an image rounded anew at every shift, and squared projections, cost signal ×
# rounding, in proportion, so these are split first. Sums in float32 lose 0.03 and more from 10⁵ on.
LADDER = {"fp16": 400.0, "split": 2500.0, "three": 3e4, "fp64": float("inf")}
CPU_LADDER = {"fp32": 1e4, "fp64": float("inf")}


@dataclass(frozen=True)
class Tiling:
    """Sizes of a Triton program: rows (shifted images), columns (orientations), depth, columns written at once.

    ``columns`` are two or four times ``part``, as a tile may be halved.
    """

    rows: int
    columns: int
    depth: int
    part: int
    warps: int = 8
    stages: int = 3
    resident: int = 1  # programs on a processor at once


@dataclass
class Projections:
    """Projections made ready for :func:`log_weights`, once for all images.

    Attributes
    ----------
    values
        `(k·r, p)` complex, as given, class by class.
    terms
        `(k·stride, terms·2·half)` rounded, whitened and padded for the kernels; None for PyTorch.
    factor
        `(p,)` what images must be multiplied by in return.
    squares
        `(k·stride, n·half)` FP16: |terms|² in as many terms n as images have, for norms by a matrix product; None where
        norms are summed in double.
    unit
        `()` what such a product must be multiplied by.
    """

    values: Tensor
    n_classes: int
    precision: str
    backend: str
    whitened: bool
    terms: Tensor | None = None
    factor: Tensor | None = None
    squares: Tensor | None = None
    unit: Tensor | None = None

    @property
    def per_class(self) -> int:
        return len(self.values) // self.n_classes

    @property
    def stride(self) -> int:
        """Columns of a class, padded."""
        return -(-self.per_class // 16) * 16

    @property
    def half(self) -> int:
        """Real values of an operand, padded; as many imaginary ones."""
        return -(-self.values.shape[1] // 64) * 64


@dataclass
class LogWeights:
    """Log weights of every image, shift and orientation, and their sums by tile.

    Attributes
    ----------
    values
        `(n, t, k·r)`.
    tile_max, tile_sum
        `(n, t, k·tiles)`: largest value of ``tile`` orientations of a class, and sum of exp(value - largest).
    """

    values: Tensor
    tile_max: Tensor
    tile_sum: Tensor
    tile: int

    def log_total(self) -> Tensor:
        """`(n,)` float64: log of the sum of all weights of each image."""
        return torch.logsumexp((self.tile_max.double() + self.tile_sum.double().log()).flatten(1), dim=1)


def score(
    images: Tensor, weights: Tensor, projections: Tensor, phases: Tensor, power: Tensor | None = None
) -> Tensor:
    """Score every image against every projection at every shift.

    Parameters
    ----------
    images
        `(n, p)` complex: half-transforms times scale·CTF/σ² (normalised correlation: times scale·CTF).
    weights
        `(n, p)` (scale·CTF)²/σ² (normalised correlation: (scale·CTF)²).
    projections
        `(r, p)` complex: CTF-free central slices.
    phases
        `(t, p)` complex: phase ramps of the shifts applied to the image.
    power
        `(n,)` Σ|X|²: given, the score is the normalised cross-correlation instead.

    Returns
    -------
    `(n, r, t)` real: log-likelihood up to a constant of the image, or the normalised cross-correlation.
    """
    n, t = len(images), len(phases)
    shifted = torch.view_as_real(images[:, None] * phases).reshape(n * t, -1)
    cross = (shifted @ torch.view_as_real(projections).flatten(1).T).reshape(n, t, -1)
    norm = weights @ projections.abs().square().T
    if power is None:
        return cross.sub_(0.5 * norm[:, None]).transpose(1, 2)
    return cross.div_((norm * power[:, None]).sqrt()[:, None]).transpose(1, 2)


def score_pairs(
    images: Tensor, weights: Tensor, projections: Tensor, phases: Tensor, power: Tensor | None = None
) -> Tensor:
    """Score image m against its own projections at every shift: :func:`score` for given pairs only.

    Parameters
    ----------
    images, weights
        `(m, p)`: the image of each pair, as in :func:`score`.
    projections
        `(m, c, p)` complex: the c projections of each pair.
    phases, power
        `(t, p)`; `(m,)` or None.

    Returns
    -------
    `(m, c, t)` real.
    """
    product = projections * images.conj()[:, None]
    cross = torch.view_as_real(product).flatten(-2) @ torch.view_as_real(phases).flatten(1).T
    norm = torch.einsum("mcp,mp->mc", torch.view_as_real(projections).square().sum(-1), weights)
    if power is None:
        return cross.sub_(0.5 * norm[..., None])
    return cross.div_((norm * power[:, None]).sqrt()[..., None])


def choose_precision(largest_power: float, ladder: dict[str, float] = LADDER) -> str:
    """The cheapest precision that is good enough for all projections up to Σ|C·P/σ|² = ``largest_power``."""
    if not largest_power >= 0:
        raise ValueError(f"the largest power is {largest_power}")
    return next(precision for precision, limit in ladder.items() if largest_power <= limit)


def prepare_projections(
    projections: Tensor,
    precision: str = "fp32",
    whitening: Tensor | None = None,
    n_classes: int = 1,
    backend: str | None = None,
) -> Projections:
    """Round and pad projections for :func:`log_weights`.

    Parameters
    ----------
    projections
        `(k·r, p)` complex: CTF-free central slices, class by class.
    precision
        a key of ``PRECISIONS``, for the Triton kernels; PyTorch computes in the dtype of the projections (fp64: in
        double).
    whitening
        `(p,)` about 1/σ, 0 where weights are 0; needed for log-likelihoods by the kernels, None for correlations.
    backend
        "triton", "matmul" or "reference"; by default Triton for float32 on a GPU, else matrix products.
    """
    if projections.ndim != 2 or not projections.is_complex():
        raise ValueError(f"projections are {tuple(projections.shape)} {projections.dtype}, not (r, p) complex")
    if len(projections) % n_classes:
        raise ValueError(f"{len(projections)} projections are not {n_classes} classes of as many each")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if precision == "fp64":
        projections, backend = projections.to(torch.complex128), "matmul"
    if backend is None:
        backend = "triton" if projections.is_cuda and projections.dtype == torch.complex64 else "matmul"
    if backend not in ("triton", "matmul", "reference"):
        raise ValueError(f"backend is {backend!r}; it must be triton, matmul or reference")
    if backend != "triton":
        return Projections(projections, n_classes, precision, backend, whitening is not None)
    if whitening is None:
        # a power of two, so that FP16 overflows nowhere
        peak = torch.view_as_real(projections).abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        scale = (1 / _power_of_two(peak.float())).expand(projections.shape[1])
    else:
        scale = whitening.float()
    factor = torch.where(scale > 0, 1 / scale, 0.0)
    result = Projections(projections, n_classes, precision, backend, whitening is not None, None, factor)
    how = PRECISIONS[precision]
    n, p, r = how.projection_terms, projections.shape[1], result.per_class
    terms = projections.new_zeros((n_classes, result.stride, n, 2, result.half), dtype=how.dtype)
    for k in range(n_classes):
        for rows in torch.arange(r).split(8192):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            planes = torch.view_as_real(projections[k * r : (k + 1) * r][part]).movedim(-1, 1).float() * scale
            if precision == "tf32":  # half of the last kept bit is added, the rest cut off
                planes = ((planes.contiguous().view(torch.int32) + 4096) & -8192).view(torch.float32)
            high = planes.to(how.dtype)
            terms[k, part, 0, :, :p] = high
            if n == 2:
                terms[k, part, 1, :, :p] = (planes - high.float()).to(how.dtype)
    result.terms = terms.flatten(2).flatten(0, 1)
    if n == 1 and how.mode != "ieee":
        result.squares, scale = _squares(result.terms, how.image_terms)
        result.unit = (0.5 if result.whitened else p) / scale
    return result


def _squares(terms: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """|terms|² times a power of two as n FP16 terms side by side, highest first, `(k·stride, n·half)`; that power."""
    parts = terms.split(8192)
    peak = torch.stack([extreme for part in parts for extreme in part.aminmax()]).abs().amax().float()
    # sums of two squares reach at most 2^15
    scale = 2.0**14 / _power_of_two(peak.clamp(min=2.0**-40)).square()
    squares = terms.new_empty((len(terms), n * terms.shape[1] // 2), dtype=torch.float16)
    for part, out in zip(parts, squares.split(8192), strict=True):
        rest = part.unflatten(1, (2, -1)).float().square().sum(1) * scale
        for term in out.chunk(n, dim=1):
            rest -= term.copy_(rest)
    return squares, scale


def _power_of_two(x: Tensor) -> Tensor:
    """The least one not below a positive float32, of its exponent's bits: PyTorch compiles exp2 at run time."""
    below = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(below < x, 2 * below, below)


def log_weights(
    images: Tensor,
    weights: Tensor,
    projections: Projections,
    phases: Tensor,
    orientation_prior: Tensor | None = None,
    offset_prior: Tensor | None = None,
    power: Tensor | None = None,
    constant: Tensor | None = None,
    tiling: Tiling | None = None,
) -> LogWeights:
    """Score every image against every projection at every shift and add the log priors.

    Parameters
    ----------
    images, weights, phases
        as in :func:`score`; complex64 and float32 for the kernels.
    orientation_prior, offset_prior
        `(k·r,)` and `(n, k, t)`: log priors, added to log-likelihoods.
    power
        `(n,)` Σ|X|²: given, the score is the normalised cross-correlation instead, without priors.
    constant
        `(n,)` float64, -½Σ|X|²/σ²: added to the log-likelihoods, whose large terms then cancel before they are
        rounded to float32. Needed at Σ|C·P/σ|² of 10⁵ and more.
    tiling
        sizes of the Triton programs, to compare.

    Returns
    -------
    :class:`LogWeights`
    """
    n, t, p = len(images), len(phases), images.shape[1]
    shapes = {
        "weights": (weights, (n, p)), "projections": (projections.values, (len(projections.values), p)),
        "phases": (phases, (t, p)), "power": (power, (n,)), "constant": (constant, (n,)),
        "orientation_prior": (orientation_prior, (len(projections.values),)),
        "offset_prior": (offset_prior, (n, projections.n_classes, t)),
    }  # fmt: skip
    for name, (value, shape) in shapes.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}; with images {tuple(images.shape)} it must be {shape}")
    if power is None and (orientation_prior is None or offset_prior is None):
        raise ValueError("log-likelihoods need orientation_prior and offset_prior")
    if power is not None and not (orientation_prior is None and offset_prior is None and constant is None):
        raise ValueError("a correlation (power given) takes no priors and no constant")
    arguments = (images, weights, projections, phases, orientation_prior, offset_prior, power, constant)
    if projections.backend == "triton":
        return _by_kernels(*arguments, tiling)
    if projections.precision == "fp64" and images.dtype == torch.complex64:
        return _by_pytorch_in_double(*arguments)
    return _by_pytorch(*arguments)


def _by_pytorch(
    images: Tensor, weights: Tensor, projections: Projections, phases: Tensor, orientation_prior: Tensor | None,
    offset_prior: Tensor | None, power: Tensor | None, constant: Tensor | None,
) -> LogWeights:  # fmt: skip
    p, k, r, (n, t) = projections.values, projections.n_classes, projections.per_class, (len(images), len(phases))
    values = torch.empty((n, t, k * r), dtype=weights.dtype, device=weights.device)
    tile_max, tile_sum = (torch.empty((n, t, k), dtype=weights.dtype, device=weights.device) for _ in range(2))
    columns = torch.view_as_real(p).flatten(1)
    magnitudes = torch.view_as_real(p).square().sum(-1)

    def some(part: slice) -> None:
        value, tops = values[part], tile_max[part]
        shifted = images[part, None] * phases
        if projections.backend == "reference":
            torch.sum((shifted[:, :, None] * p.conj()).real, -1, out=value)
            norm = (weights[part, None] * magnitudes).sum(-1)
        else:
            torch.mm(torch.view_as_real(shifted).reshape(-1, columns.shape[1]), columns.T, out=value.view(-1, k * r))
            norm = weights[part] @ magnitudes.T
        if power is None:
            assert orientation_prior is not None and offset_prior is not None
            value -= (0.5 * norm).sub_(orientation_prior.to(norm.dtype))[:, None]
        else:
            value /= (norm * power[part, None]).sqrt_()[:, None]
        tiles = value.unflatten(2, (k, r))
        if offset_prior is not None:
            tiles += offset_prior[part].to(value.dtype).transpose(1, 2)[..., None]
        if constant is not None:
            tiles += constant[part].to(value.dtype)[:, None, None, None]
        torch.amax(tiles, -1, out=tops)
        safe = torch.where(tops == -torch.inf, 0.0, tops)
        torch.sum((tiles - safe[..., None]).clamp_(min=NOTHING).exp_(), -1, out=tile_sum[part])

    # on a CPU a few images in each core's caches
    most = n if values.is_cuda else max(1, BLOCK // (t * k * r))
    side_by_side(some, [slice(start, start + most) for start in range(0, n, max(most, 1))])
    return LogWeights(values, tile_max, tile_sum, r)


def _by_pytorch_in_double(
    images: Tensor, weights: Tensor, projections: Projections, phases: Tensor, orientation_prior: Tensor | None,
    offset_prior: Tensor | None, power: Tensor | None, constant: Tensor | None,
) -> LogWeights:  # fmt: skip
    """A few images after another, which bounds the memory."""
    most = max(1, 2**26 // (len(phases) * len(projections.values)))
    parts = [
        _by_pytorch(
            images[i : i + most].to(torch.complex128), weights[i : i + most].double(), projections,
            phases.to(torch.complex128), orientation_prior,
            *(None if x is None else x[i : i + most] for x in (offset_prior, power, constant)),
        )
        for i in range(0, len(images), most)
    ]  # fmt: skip
    values, tile_max, tile_sum = (
        torch.cat([getattr(part, name).float() for part in parts]) for name in ("values", "tile_max", "tile_sum")
    )
    return LogWeights(values, tile_max, tile_sum, parts[0].tile)


def _by_kernels(
    images: Tensor, weights: Tensor, projections: Projections, phases: Tensor, orientation_prior: Tensor | None,
    offset_prior: Tensor | None, power: Tensor | None, constant: Tensor | None, tiling: Tiling | None,
) -> LogWeights:  # fmt: skip
    from triton.tools.tensor_descriptor import TensorDescriptor

    from torchem.kernels import squared_difference as kernels

    if projections.whitened == (power is not None):
        raise ValueError("projections for log-likelihoods need a whitening, those for correlations must have none")
    how = PRECISIONS[projections.precision]
    n, t, p = len(images), len(phases), images.shape[1]
    k, r, stride, half = projections.n_classes, projections.per_class, projections.stride, projections.half
    rows, device, terms = n * t, images.device, projections.terms
    assert terms is not None and projections.factor is not None
    processors = torch.cuda.get_device_properties(device).multi_processor_count if images.is_cuda else 3
    tiling = tiling or _tiling(how, rows, k, r, processors)
    exact = how.products == 3 or how.mode == "ieee"
    if constant is not None:
        constant = constant.double().contiguous()
    if orientation_prior is not None and offset_prior is not None:
        orientation_prior = orientation_prior.float().contiguous()
        offset_prior = offset_prior.float().transpose(0, 1).contiguous()

    shifted = torch.empty((rows, how.image_terms * 2 * half), dtype=how.dtype, device=device)
    split = None if exact else torch.empty((2 * n, how.image_terms * half), dtype=torch.float16, device=device)
    blocks = half // 64
    weight_programs = 0 if exact else -(-n // 32) * blocks
    kernels.prepare[(weight_programs + -(-n // 4) * -(-t // 8) * blocks,)](
        torch.view_as_real(images.contiguous()), weights.contiguous(), torch.view_as_real(phases.contiguous()),
        projections.factor, power, shifted, split, n, t, p, half // 64, weight_programs,
        TERMS=how.image_terms, TF32=projections.precision == "tf32", CORRELATION=power is not None,
        WEIGHTS=32, IMAGES=4, SHIFTS=8, PIXELS=64, num_warps=4,
    )  # fmt: skip
    if split is None:
        norms = _exact_norms(weights, projections, power, constant)
    else:
        assert projections.squares is not None
        norms = _product(split, projections.squares)

    class_tiles = -(-r // tiling.columns)
    tiles = -(-rows // tiling.rows) * class_tiles * k
    programs = min(tiles, processors * tiling.resident)
    rest = tiles % programs  # few are cut in halves, many fill a round of their own
    summed = tiling.columns // 2
    values = torch.empty((rows, k, stride), device=device)
    tile_max = torch.empty((n, t, k * -(-r // summed)), device=device)
    tile_sum = torch.empty_like(tile_max)
    kernels.log_weights[(programs,)](
        TensorDescriptor.from_tensor(shifted, [tiling.rows, tiling.depth]),
        TensorDescriptor.from_tensor(terms, [tiling.columns, tiling.depth]),
        TensorDescriptor.from_tensor(terms, [summed, tiling.depth]),
        norms, projections.unit, constant, orientation_prior, offset_prior,
        TensorDescriptor.from_tensor(values, [tiling.rows, 1, tiling.part]), tile_max, tile_sum,
        rows, t, half, k, r, stride // 16, tiles - rest if 2 * rest <= programs else tiles,
        PRODUCTS=how.products, PRECISION=how.mode, CORRELATION=power is not None, CONSTANT=constant is not None,
        ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, PART=tiling.part,
        FEW_IMAGES=min(n, (tiling.rows - 1) // t + 2) <= 16,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return LogWeights(values[..., :r].reshape(n, t, k * r), tile_max, tile_sum, summed)


def _tiling(how: Precision, rows: int, n_classes: int, per_class: int, processors: int) -> Tiling:
    """Tiles that fill the tensor cores; smaller ones where there are few, or where sums are kept in two terms."""
    if how.mode == "ieee":
        return Tiling(64, 64, 32, 32)
    depth = 128 // how.dtype.itemsize
    if -(-rows // 128) * -(-per_class // 256) * n_classes < processors:
        return Tiling(64, 128, depth, 64, warps=4, resident=2)
    return Tiling(128, 128 if how.products == 3 else 256, depth, 64, stages=4)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of FP16 operands in float32."""
    return torch.mm(a, b.T, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.T.float()


def _exact_norms(weights: Tensor, projections: Projections, power: Tensor | None, constant: Tensor | None) -> Tensor:
    """`(n, k·stride)`: what the kernel takes as norms, summed in double."""
    assert projections.terms is not None and projections.factor is not None
    w = weights.double()
    if power is None:
        w = w * projections.factor.double().square()
    n_terms = PRECISIONS[projections.precision].projection_terms
    norms = torch.empty((len(weights), len(projections.terms)), device=weights.device)
    for start in range(0, norms.shape[1], 4096):
        planes = projections.terms[start : start + 4096].unflatten(1, (n_terms, 2, -1)).double().sum(1)
        norm = w @ planes.square().sum(1)[:, : w.shape[1]].T
        if power is not None:
            norm *= w.shape[1]
        else:
            norm *= 0.5
            if constant is not None:
                norm -= (constant + (-2 * constant).float().double())[:, None]
        norms[:, start : start + 4096] = norm
    return norms


def plain_squared_difference(
    images: Tensor, ctf: Tensor, projections: Tensor, phases: Tensor, tiled: bool = True
) -> Tensor:
    """Minus half of Σ|X - C·P|²/σ² term by term in float32, without tensor cores (Zhang et al. 2018), to compare.

    Parameters
    ----------
    images, ctf
        `(n, p)`: complex64 X/σ and float32 C/σ.
    projections, phases
        `(r, p)`, `(t, p)` complex64.
    tiled
        share what was read between the pairs of a tile; else read everything again for every pair.

    Returns
    -------
    `(n, t, r)` float32.
    """
    from torchem.kernels import squared_difference as kernels

    n, t, r, p = len(images), len(phases), len(projections), images.shape[1]
    if not tiled:
        out = torch.empty((n, t, r), device=images.device)
        kernels.plain_untiled[(r, n * t)](
            torch.view_as_real(images.contiguous()), ctf.contiguous(), torch.view_as_real(phases.contiguous()),
            torch.view_as_real(projections.contiguous()), out, r, t, p, PIXELS=128, num_warps=4,
        )  # fmt: skip
        return out
    rows, columns, depth = (-(-x // y) for x, y in ((n * t, 16), (r, 16), (p, 4)))

    def transposed(x: Tensor, width: int) -> Tensor:
        padded = torch.zeros((depth * 4, width * 16), device=images.device)
        padded[:p, : len(x)] = x.T
        return padded

    shifted = (images[:, None] * phases).flatten(0, 1)
    out = torch.empty((n * t, columns * 16), device=images.device)
    kernels.plain_tiled[(-(-n * t // 128), -(-r // 128))](
        transposed(shifted.real, rows), transposed(shifted.imag, rows), transposed(ctf.repeat_interleave(t, 0), rows),
        transposed(projections.real, columns), transposed(projections.imag, columns), out,
        n * t, depth * 4, rows, columns, ROWS=128, COLUMNS=128, DEPTH=4, num_warps=8, maxnreg=128,
    )  # fmt: skip
    return out[:, :r].unflatten(0, (n, t))
