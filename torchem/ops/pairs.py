"""Given pairs of an image and an orientation: their scores, and their share of the weighted sums, slices included.

Both work wherever few orientations of each image matter: in local searches and in the fine pass. On a GPU a slice is
cut in the kernel that uses it and never stored (:mod:`torchem.kernels.pairs`, single precision, 3D references);
elsewhere slices that several images share are cut once. With X an image, P a slice and phi the ramp of a shift,
everything weighted as the caller says (Scheres 2012, eqs. 3-7).
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from torchem.ops.slices import FIXED_POINT, Slices, accumulators, add_accumulated, packed
from torchem.ops.squared_difference import score_pairs as score_cut_pairs
from torchem.runtime.cpu import side_by_side

# values of the pairs that a CPU works on at once, each on a core of its own: they stay in its caches
BLOCK = 2**18
# the same of the slices that weighted sums are gathered in
ADDED_BLOCK = 2**19


def score_pairs(
    slices: Slices, orientation: Tensor, which: Tensor, images: Tensor, weights: Tensor, phases: Tensor,
    power: Tensor | None, chunk_elements: int, half: bool = False,
) -> Tensor:  # fmt: skip
    """Score pairs of an image and a slice at every shift: Re Σ X φ P* - ½ Σ W |P|², or normalised correlation.

    Parameters
    ----------
    slices
        u orientations.
    orientation, which
        `(m,)` int64: slice and image of each pair.
    images, weights, power
        `(n, p)` complex, `(n, p)`, `(n,)` or None, as in :func:`torchem.ops.squared_difference.score`.
    phases
        `(t, p)` complex.
    chunk_elements
        largest number of complex values in a temporary of the reference.
    half
        on a GPU, take the slices from volumes rounded to half precision: 1.3 times as fast, and the score of a slightly
        different reference (see :data:`torchem.ops.squared_difference.LADDER`).

    Returns
    -------
    `(m, t)` real.
    """
    if slices.on_gpu:
        cross, norm = _score_on_gpu(slices, orientation, which, images, weights, phases, half)
        if power is None:
            return cross.sub_(0.5 * norm[:, None])
        return cross.div_((norm * power[which]).sqrt()[:, None])
    if not weights.is_cuda:
        return _score_on_cpu(slices, orientation, which, images, weights, phases, power, chunk_elements)
    return _score_by_slice(slices, orientation, which, images, weights, phases, power, chunk_elements)


def _score_by_slice(
    slices: Slices, orientation: Tensor, which: Tensor, images: Tensor, weights: Tensor, phases: Tensor,
    power: Tensor | None, chunk_elements: int,
) -> Tensor:  # fmt: skip
    """Many pairs at once, for a GPU where there is no kernel: in double precision, and for 2D references."""
    scores = torch.empty((len(which), len(phases)), dtype=weights.dtype, device=weights.device)
    # neighbours share a slice
    order = torch.argsort(orientation, stable=True)
    for chunk in order.split(max(1, chunk_elements // images.shape[1])):
        unique, inverse = torch.unique_consecutive(orientation[chunk], return_inverse=True)
        mine = which[chunk]
        scores[chunk] = score_cut_pairs(
            images[mine], weights[mine], slices[unique].cut()[inverse][:, None], phases,
            None if power is None else power[mine],
        )[:, 0]  # fmt: skip
    return scores


def _score_on_cpu(
    slices: Slices, orientation: Tensor, which: Tensor, images: Tensor, weights: Tensor, phases: Tensor,
    power: Tensor | None, chunk_elements: int,
) -> Tensor:  # fmt: skip
    """Image by image: a matrix product of its slices with its shifts."""
    m, n_pixels = len(which), images.shape[1]
    scores = torch.empty((m, len(phases)), dtype=weights.dtype)
    twice = weights.repeat_interleave(2, dim=1)  # real and imaginary part
    # slices that are used again are cut once, others when they are needed, to stay in a core's caches
    again = 1.3 * len(slices) < m and len(slices) * n_pixels <= 8 * chunk_elements
    table = slices.cut() if again else None
    order = torch.argsort(which, stable=True)

    def score_some(part: tuple[int, int, int]) -> None:
        image, start, stop = part
        pairs = order[start:stop]
        if table is None:
            cut = slices[orientation[pairs]].cut()
        else:
            pairs = _rounded_up(pairs)
            cut = table[orientation[pairs]]
        own = torch.view_as_real(cut).flatten(1)
        cross = own @ torch.view_as_real(images[image] * phases).flatten(1).T
        norm = own.square_() @ twice[image]
        if power is None:
            scores[pairs] = cross.sub_(0.5 * norm[:, None])
        else:
            scores[pairs] = cross.div_((norm * power[image]).sqrt()[:, None])

    side_by_side(score_some, _by_image(which[order], _at_once(images, chunk_elements)))
    return scores


def _rounded_up(pairs: Tensor) -> Tensor:
    """A number of pairs that is often the same, the last one repeated: oneDNN compiles a product for every size."""
    return torch.cat((pairs, pairs[-1:].expand(-len(pairs) % 32)))


def _by_image(which: Tensor, most: int) -> list[tuple[int, int, int]]:
    """Image, begin and end of runs of up to `most` pairs of one image in an ascending list of images."""
    image, counts = (x.tolist() for x in torch.unique_consecutive(which, return_counts=True))
    return [
        (i, start, min(start + most, end))
        for i, count, end in zip(image, counts, accumulate(counts), strict=True)
        for start in range(end - count, end, most)
    ]


def _at_once(images: Tensor, chunk_elements: int) -> int:
    """How many pairs are worked on at once: on a CPU as many as stay in its caches."""
    most = chunk_elements if images.is_cuda else min(chunk_elements, BLOCK)
    return max(1, most // images.shape[1])


@dataclass(frozen=True)
class Operands:
    """What the images `(n, p)` are multiplied by on their way into the sums, and what is asked of the residuals."""

    aligned: Tensor  # C·X, masked
    ctf2: Tensor  # C²
    numerator: Tensor  # S·C/σ²·X, unmasked
    denominator: Tensor  # (S·C)²/σ²
    scale: Tensor  # (n,) S
    strong: Tensor  # (p,) 1 where the scale may be learnt from, 0 elsewhere


def add_pairs(
    slices: Slices, orientation: Tensor, which: Tensor, probability: Tensor, phases: Tensor, operands: Operands,
    data: Tensor, weight: Tensor, chunk_elements: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add pairs to the sums, each at its shifts' probabilities, and sum what noise, norm and scale need.

    The shifts of a pair collapse into one ramp Q = Σ_t w φ_t: numerators gain S·C/σ²·X Q, denominators
    (S·C)²/σ² Σ w. With A = Re Σ_t w (C·P)* X φ_t = Re C·X Q P* and B = Σ_t w |C·P|², the power of what is left of an
    image is |X|² + S²B - 2SA.

    Parameters
    ----------
    slices, orientation, which, phases
        as in :func:`score_pairs`.
    probability
        `(m, t)`.
    data, weight
        `(k, …)` accumulators, changed in place.

    Returns
    -------
    `(p,)` S²B - 2SA of all pairs; `(n, 3)` its sum over pixels by image, and those of A and B where ``strong``; double.
    """
    if slices.on_gpu:
        return _add_on_gpu(slices, orientation, which, probability, phases, operands, data, weight)
    n, n_pixels = operands.ctf2.shape
    ramps = torch.view_as_real(phases).flatten(1)
    if not weight.is_cuda and len(which) > n * len(phases):
        return _add_on_cpu(slices, orientation, which, probability, phases, operands, data, weight, chunk_elements)
    residual = torch.zeros(n_pixels, dtype=torch.float64, device=which.device)
    figures = torch.zeros((n, 3), dtype=torch.float64, device=which.device)
    chosen = torch.stack((torch.ones_like(operands.strong), operands.strong), 1)

    def add_some(pairs: Tensor) -> tuple[Tensor, ...]:
        unique, inverse = torch.unique_consecutive(orientation[pairs], return_inverse=True)
        mine, w = which[pairs], probability[pairs]
        total = w.sum(1, keepdim=True)
        ramp = torch.view_as_complex((w @ ramps).unflatten(1, (n_pixels, 2)))
        cut, scale = slices[unique].cut()[inverse], operands.scale[mine, None]
        a = (cut.conj() * operands.aligned[mine] * ramp).real
        b = torch.view_as_real(cut).square().sum(-1) * operands.ctf2[mine] * total
        difference = scale * (scale * b - 2 * a)
        by_pair = torch.stack((difference.sum(1), *(a @ chosen).T[1:], *(b @ chosen).T[1:]), 1)
        # pairs of one orientation are added up before anything is scattered
        added = torch.zeros((len(unique), 2 * n_pixels), dtype=w.dtype, device=w.device)
        added.index_add_(0, inverse, torch.view_as_real(ramp * operands.numerator[mine]).flatten(1))
        added_weight = torch.zeros((len(unique), n_pixels), dtype=w.dtype, device=w.device)
        added_weight.index_add_(0, inverse, operands.denominator[mine] * total)
        return unique, added, added_weight, difference.sum(0, dtype=torch.float64), by_pair.double()

    order = torch.argsort(orientation, stable=True)
    at_once = _at_once(operands.ctf2, chunk_elements)
    for chunk in order.split(max(at_once, chunk_elements // n_pixels)):
        parts = side_by_side(add_some, chunk.split(at_once))
        unique, added, added_weight, by_pixel, by_pair = (torch.cat(part) for part in zip(*parts, strict=True))
        slices[unique].insert(data, weight, torch.view_as_complex(added.unflatten(1, (-1, 2))), added_weight)
        residual += by_pixel.view(-1, n_pixels).sum(0)
        figures.index_add_(0, which[chunk], by_pair)
    return residual, figures


def _add_on_cpu(
    slices: Slices, orientation: Tensor, which: Tensor, probability: Tensor, phases: Tensor, operands: Operands,
    data: Tensor, weight: Tensor, chunk_elements: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For images with more orientations than shifts: matrix products of each image's weights.

    With W (m, t) of one image, numerators are W·(S·C/σ²·X φ), and Σ w P is Wᵀ·P.
    """
    n, n_pixels = operands.ctf2.shape
    # every thread has as much to do as any other
    n_slices, most = len(slices), max(1, ADDED_BLOCK // n_pixels)
    at_once = -(-n_slices // (-(-n_slices // (most * torch.get_num_threads())) * torch.get_num_threads()))
    order = torch.argsort(orientation // at_once * n + which, stable=True)
    ends = torch.bincount(orientation // at_once, minlength=-(-n_slices // at_once)).cumsum(0).tolist()
    chosen = torch.stack((torch.ones_like(operands.strong), operands.strong), 1).double()

    def add_some(part: int) -> tuple[Tensor, ...]:
        mine = order[ends[part - 1] if part else 0 : ends[part]]
        here = slices[part * at_once : (part + 1) * at_once]
        cut = torch.view_as_real(here.cut()).flatten(1)
        added, totals = torch.zeros_like(cut), cut.new_zeros((len(here), n))
        a, b = (torch.zeros((n, n_pixels), dtype=torch.float64) for _ in range(2))
        for image, start, stop in _by_image(which[mine], len(mine)):
            pairs = _rounded_up(mine[start:stop])
            place, w = orientation[pairs] - part * at_once, probability[pairs]
            w[stop - start :] = 0
            numerator, aligned = (
                torch.view_as_real(x[image] * phases).flatten(1) for x in (operands.numerator, operands.aligned)
            )
            added.index_add_(0, place, w @ numerator)
            own, total = cut[place], w.sum(1)
            totals[:, image].index_add_(0, place, total)
            a[image] = (w.T @ own).mul_(aligned).sum(0).view(-1, 2).sum(1)
            b[image] = (total @ own.square_()).view(-1, 2).sum(1)
        b *= operands.ctf2
        scale = operands.scale[:, None]
        difference = scale * (scale * b - 2 * a)
        figures = torch.cat((difference.sum(1, keepdim=True), a @ chosen[:, 1:], b @ chosen[:, 1:]), 1)
        return added, totals @ operands.denominator, difference.sum(0), figures

    residual = torch.zeros(n_pixels, dtype=torch.float64)
    figures = torch.zeros((n, 3), dtype=torch.float64)
    for parts in torch.arange(len(ends)).split(max(1, chunk_elements // (at_once * n_pixels))):
        added, weights, by_pixel, by_image = zip(*side_by_side(add_some, parts.tolist()), strict=True)
        here = slices[int(parts[0]) * at_once : (int(parts[-1]) + 1) * at_once]
        here.insert(data, weight, torch.view_as_complex(torch.cat(added).unflatten(1, (-1, 2))), torch.cat(weights))
        residual += torch.stack(by_pixel).sum(0)
        figures += torch.stack(by_image).sum(0)
    return residual, figures


def _paired(volumes: Tensor) -> tuple[Tensor, Tensor]:
    """Volumes in half precision, each value and its neighbour in x as one int64, and the unit they are multiples of."""
    values = torch.view_as_real(volumes)
    # of half precision's range only the top is used up: small values keep their digits
    unit = torch.linalg.vector_norm(values, torch.inf).clamp(min=1e-30) / 2.0**14
    pairs = values.new_zeros((*volumes.shape, 4), dtype=torch.float16)
    torch.div(values, unit, out=pairs[..., :2])
    pairs[..., :-1, 2:] = pairs[..., 1:, :2]
    return pairs.view(torch.int64)[..., 0], unit[None]


def _score_on_gpu(
    slices: Slices, orientation: Tensor, which: Tensor, images: Tensor, weights: Tensor, phases: Tensor, half: bool
) -> tuple[Tensor, Tensor]:
    from torchem.kernels.pairs import score_pairs_kernel

    m, n_shifts = len(which), len(phases)
    volumes, unit = _paired(slices.volumes) if half else (packed(slices.volumes), weights.new_ones(1))
    cross = torch.empty((m, n_shifts), dtype=torch.float32, device=which.device)
    norm = torch.empty(m, dtype=torch.float32, device=which.device)
    # measured best on an H100: 59 G pixels/s for 9 shifts, 72 for 36, from volumes in half precision (single: 47, 55)
    block_t, dot = (16, "ieee") if n_shifts <= 16 else (64, "tf32x3")
    if m:
        score_pairs_kernel[(-(-m // 64), -(-n_shifts // block_t))](
            volumes, unit, *slices.cells(), orientation, which, slices.kx, slices.ky, packed(images),
            weights.contiguous(), packed(phases), cross, norm, m, images.shape[1], n_shifts,
            slices.volumes.shape[1] // 2, float(slices.r_max**2), BLOCK_M=64, BLOCK_P=16, BLOCK_T=block_t, PAIRED=half,
            DOT=dot, num_warps=4, num_stages=1,
        )  # fmt: skip
    return cross, norm


def _add_on_gpu(
    slices: Slices, orientation: Tensor, which: Tensor, probability: Tensor, phases: Tensor, operands: Operands,
    data: Tensor, weight: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from torchem.kernels.pairs import add_pairs_kernel

    m, device = len(which), which.device
    n, n_pixels = operands.ctf2.shape
    sums = accumulators(weight)
    fixed = sums.dtype == torch.int64
    residual = torch.zeros(n_pixels, dtype=torch.int64 if fixed else torch.float64, device=device)
    by_pair = torch.empty((m, 3), dtype=torch.float32, device=device)
    unit = _fixed_points(slices, operands) if fixed else weight.new_ones(2)
    if m:
        add_pairs_kernel[(-(-m // 16),)](
            packed(slices.volumes), *slices.cells(), orientation, which, slices.kx, slices.ky,
            packed(operands.aligned), operands.ctf2.contiguous(), packed(operands.numerator),
            operands.denominator.contiguous(), operands.scale.contiguous(), operands.strong.contiguous(),
            packed(phases), probability.contiguous(), sums, by_pair, residual, unit, m, n_pixels, len(phases),
            slices.volumes.shape[1] // 2, float(slices.r_max**2), BLOCK_M=16, BLOCK_P=16, BLOCK_T=16, FIXED=fixed,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    add_accumulated(data, weight, sums, unit[0])
    if fixed:
        residual = residual.double() / unit[1]
    figures = torch.zeros((n, 3), dtype=torch.float64, device=device)
    return residual, figures.index_add_(0, which, by_pair.double())


def _fixed_points(slices: Slices, operands: Operands) -> Tensor:
    """How many units of the fixed point numbers a 1 is, in the volumes and in the residuals."""
    largest = torch.view_as_real(slices.volumes).abs().amax() * 2
    scale = operands.scale.abs().amax()
    volume = torch.maximum(torch.view_as_real(operands.numerator).abs().amax() * 2, operands.denominator.amax())
    residual = scale * largest * (
        scale * largest * operands.ctf2.amax() + 4 * torch.view_as_real(operands.aligned).abs().amax()
    )
    return FIXED_POINT / torch.stack((volume, residual)).clamp(min=1e-30)
