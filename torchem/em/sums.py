"""The weighted sums of one half, and the two ways to make them from the fine weights of a batch.

Both return what noise, norm and scale need, so that no residual image is ever made (Scheres 2012, eqs. 3-7).
Fine weights come as `(b, o, j)`: b blocks, one a significant coarse sample, of o orientation × j translation
children.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchem.em.images import ImageBatch
from torchem.em.model import Model
from torchem.em.references import References
from torchem.imaging.projection import volume_shape
from torchem.ops.pairs import Operands, add_pairs
from torchem.ops.slices import Slices

# values in a row of a matrix in half precision, or a multiple of them, that products are fast for
WHOLE = 8


@dataclass
class Sums:
    """Weighted sums of one half over its particles; volumes in the run's precision, the rest double."""

    data: Tensor  # (k, D, D, D//2 + 1) complex
    weight: Tensor
    noise: list[Tensor]  # an optics group (box//2 + 1,)
    noise_weight: Tensor  # (optics groups,)
    scale_xa: Tensor  # (groups,)
    scale_aa: Tensor
    group_weight: Tensor  # (groups,)
    offset_square: Tensor  # ()
    class_offset: Tensor  # (k, 2); of 2D references
    pdf_direction: Tensor  # (k, d)
    totals: Tensor  # over particles: (their number, norm, Pmax, log-likelihood)
    small: Tensor  # all but the volumes, one after the other in memory

    @staticmethod
    def zeros(model: Model, n_directions: int, r_max: int, padding: int) -> "Sums":
        k, references = model.n_classes, model.references
        shape = (k, *volume_shape(r_max, padding, model.ndim))

        groups, optics_groups = len(model.scale), len(model.sigma2_noise)
        shells = [len(s) for s in model.sigma2_noise]
        sizes = [*shells, optics_groups, groups, groups, groups, 1, 2 * k, k * n_directions, 4]
        small = torch.zeros(sum(sizes), dtype=torch.float64, device=references.device)
        *noise, noise_weight, xa, aa, group_weight, offset_square, class_offset, pdf, totals = small.split(sizes)
        return Sums(
            data=torch.zeros(shape, dtype=references.dtype.to_complex(), device=references.device),
            weight=torch.zeros(shape, dtype=references.dtype, device=references.device),
            noise=noise, noise_weight=noise_weight, scale_xa=xa, scale_aa=aa, group_weight=group_weight,
            offset_square=offset_square[0], class_offset=class_offset.view(k, 2),
            pdf_direction=pdf.view(k, n_directions), totals=totals, small=small,
        )  # fmt: skip

    def with_particles_of(self, other: "Sums") -> "Sums":
        """What is summed over the particles of both halves, but for the volumes, which stay this half's."""

        def both(one: Any, two: Any) -> Any:
            return [a + b for a, b in zip(one, two, strict=True)] if isinstance(one, list) else one + two

        mine = {name: value for name, value in vars(self).items() if name not in ("data", "weight")}
        return replace(self, **{name: both(value, getattr(other, name)) for name, value in mine.items()})

    def tensors(self) -> list[Tensor]:
        """All of it, for summing over ranks."""
        return [self.data, self.weight, self.small]


def operands(batch: ImageBatch, inverse_sigma2: Tensor, scale: Tensor, strong: Tensor) -> Operands:
    """What the images of a batch are multiplied by on their way into the sums.

    Parameters
    ----------
    inverse_sigma2, scale
        `(p,)` 1/σ², and `(n, 1)` the particles' scales.
    strong
        `(shells,)` bool: where in the reference's spectrum the scale may be learnt from.
    """
    weights = (scale * inverse_sigma2).mul_(batch.back_ctf)
    return Operands(
        aligned=batch.masked * batch.ctf,
        ctf2=batch.ctf.square(),
        numerator=batch.unmasked * weights,
        denominator=weights.mul_(scale).mul_(batch.ctf),
        scale=scale[:, 0],
        strong=strong[batch.geometry.shell].to(batch.ctf.dtype),
    )


def add_rows(
    sums: Sums, references: References, batch: ImageBatch, operands: Operands, phases: Tensor, rows: Tensor,
    orientation: Tensor, shift: Tensor, kept: Tensor, chunk_elements: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add the kept weights pair by pair, a pair being one particle at one fine orientation: for sparse support.

    Parameters
    ----------
    phases
        `(t·j, p)` of all fine translations.
    rows, orientation, shift
        `(b,)` particle, coarse orientation and coarse translation of each block.
    kept
        `(b, o, j)` weights, 0 where not significant.

    Returns
    -------
    `(p,)` and `(n, 3)`, see :func:`torchem.ops.pairs.add_pairs`.
    """
    o, j = kept.shape[1:]
    n_pixels, n_shifts = batch.geometry.n_pixels, len(phases) // j
    residual = torch.zeros(n_pixels, dtype=torch.float64, device=rows.device)
    figures = torch.zeros((len(batch), 3), dtype=torch.float64, device=rows.device)
    block, child = torch.nonzero(kept.amax(2), as_tuple=True)
    # pairs of neighbouring orientations are added at about the same time, to the same part of the volume
    n = len(batch)
    key, pair = _unique((orientation[block] * o + child) * n + rows[block])
    step = max(1, chunk_elements // (2 * len(phases)))
    for start in range(0, len(key), step):
        mine = key[start : start + step]
        of, at, turn = block, pair, child
        if len(mine) < len(key):
            here = torch.nonzero((pair >= start) & (pair < start + step))[:, 0]
            of, at, turn = block[here], pair[here] - start, child[here]
        probability = torch.zeros((len(mine), n_shifts, j), dtype=kept.dtype, device=rows.device)
        probability[at, shift[of]] = kept[of, turn]
        slices, which = references.slices_of(batch.geometry, mine // n, n_pixels, fine=True)
        some = add_pairs(
            slices, which, mine % n, probability.flatten(1), phases, operands, sums.data, sums.weight, chunk_elements
        )
        residual += some[0]
        figures += some[1]
    return residual, figures


def in_steps(numbers: Tensor, n: int, step: int) -> list[tuple[int, int, int]]:
    """Of an ascending list of numbers below n: 0, step, 2·step …, and where those up to the next one begin and end."""
    if n <= step:
        return [(0, 0, len(numbers))]
    ends = torch.searchsorted(numbers, torch.arange(0, n + step, step, device=numbers.device)).tolist()
    return [(number * step, *part) for number, part in enumerate(pairwise(ends))]


def _halves(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Real values for :func:`_product` and what its result is to be multiplied by: on a GPU rounded to half precision.

    Very many terms can bear it. The largest is put at 2^14, so that far below, too, half precision keeps its digits.
    The last axis is filled up with zeros to `width`.
    """
    if not values.is_cuda or values.dtype != torch.float32:
        return torch.nn.functional.pad(values, (0, width - values.shape[-1])), values.new_ones(())
    lowest, highest = values.aminmax()
    unit = torch.maximum(-lowest, highest).clamp(min=1e-30) / 2.0**14
    halves = values.new_zeros((*values.shape[:-1], width), dtype=torch.float16)
    torch.div(values, unit, out=halves[..., : values.shape[-1]])
    return halves, unit


def _unique(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Different ones of some numbers >= 0, ascending, and which of them each is."""
    if numbers.is_cuda or (most := int(numbers.max()) + 1) > 8 * len(numbers):
        return torch.unique(numbers, return_inverse=True)
    # without sorting, which takes a CPU longer than everything else
    present = torch.zeros(most, dtype=torch.bool, device=numbers.device)
    present[numbers] = True
    return torch.nonzero(present)[:, 0], (torch.cumsum(present, 0) - 1)[numbers]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of half precision summed and returned in single."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.float16 else a @ b


def add_dense(
    sums: Sums, references: References, batch: ImageBatch, operands: Operands, phases: Tensor, rows: Tensor,
    orientation: Tensor, shift: Tensor, kept: Tensor, slices: Slices, slab: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add the kept weights as matrix products over all fine orientations: for wide support.

    With W (n·t·j, r·o): numerators are Wᵀ·X_t, denominators Wᵀ·(C²/σ²), and Σ_r w·P is W·P.

    Parameters
    ----------
    slices
        of every fine orientation.
    slab
        particles whose weights are held at once.

    Other parameters and returns as in :func:`add_rows`.
    """
    o, j = kept.shape[1:]
    n, n_pixels, n_fine = len(batch), batch.geometry.n_pixels, len(slices)
    residual = torch.zeros(n_pixels, dtype=torch.float64, device=rows.device)
    figures = torch.zeros((n, 3), dtype=torch.float64, device=rows.device)
    # rows of whole 16 bytes: matrix products of others take twice as long
    width = 2 * n_pixels + (-2 * n_pixels) % WHOLE
    cut = slices.cut()
    flat_slices, slice_unit = _halves(torch.view_as_real(cut).flatten(1), width)
    slice_power = torch.view_as_real(cut).square().sum(-1)
    kept_halves, kept_unit = _halves(kept, j)
    numerators = torch.zeros((n_fine, width), dtype=kept.dtype, device=rows.device)
    denominators = torch.zeros((n_fine, n_pixels), dtype=kept.dtype, device=rows.device)

    def add(part: slice, begin: int, end: int) -> None:
        m = part.stop - part.start
        row, where = rows[begin:end] - part.start, orientation[begin:end]
        w = kept_halves.new_zeros((m, len(phases) // j, j, n_fine // o, o))
        w[row, shift[begin:end], :, where] = kept_halves[begin:end].transpose(1, 2)
        w = w.view(m * len(phases), n_fine)
        by_orientation = kept.new_zeros((m * (n_fine // o), o))
        by_orientation = by_orientation.index_add_(0, row * (n_fine // o) + where, kept[begin:end].sum(2)).view(m, -1)
        shifted = (operands.numerator[part, None] * phases).flatten(0, 1)
        shifted, unit = _halves(torch.view_as_real(shifted).flatten(1), width)
        numerators.addcmul_(_product(w.T, shifted), kept_unit * unit)
        denominators.addmm_(by_orientation.T, operands.denominator[part])
        mean_slice = _product(w, flat_slices).view(m, len(phases), -1, 2)
        mean_slice = torch.view_as_complex(mean_slice)[..., :n_pixels]
        # Re Σ_t X_t* · mean slice, without the images at every shift
        turned_back = mean_slice.mul_(phases.conj()).sum(1) * (kept_unit * slice_unit)
        a = (operands.aligned[part] * turned_back.conj()).real
        b = by_orientation @ slice_power * operands.ctf2[part]
        scale = operands.scale[part, None]
        difference = scale * (scale * b - 2 * a)
        residual.add_(difference.sum(0, dtype=torch.float64))
        figures[part] = torch.stack((difference.sum(1), a @ operands.strong, b @ operands.strong), 1).double()

    for start, begin, end in in_steps(rows, n, slab):
        add(slice(start, min(start + slab, n)), begin, end)
    numerators = torch.view_as_complex(numerators.unflatten(1, (-1, 2)))[:, :n_pixels]
    slices.insert(sums.data, sums.weight, numerators, denominators)
    return residual, figures
