"""The weighted sums of one half, and the two ways to make them from the fine weights of a batch.

Both add numerators and denominators of one orientation before anything is scattered into a volume, and return
per particle and shell what noise, norm and scale need: Σ w Re((CP)* X_t) and Σ w |CP|² (Scheres 2012, eqs. 3-7).
Fine weights come as `(b, o, j)`: b blocks, one a significant coarse sample, of o orientation × j translation
children.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchem.em.images import ImageBatch
from torchem.em.model import Model
from torchem.em.references import References
from torchem.imaging.projection import volume_shape
from torchem.ops.slices import backproject


@dataclass
class Sums:
    """Weighted sums of one half over its particles; volumes in the run's precision, the rest double."""

    data: Tensor  # (k, D, D, D//2 + 1) complex
    weight: Tensor
    noise: list[Tensor]  # an optics group (box//2 + 1,)
    noise_weight: Tensor  # (optics groups,)
    norm: Tensor  # ()
    scale_xa: Tensor  # (groups,)
    scale_aa: Tensor
    group_weight: Tensor  # (groups,)
    offset_square: Tensor  # ()
    class_offset: Tensor  # (k, 2)
    pdf_direction: Tensor  # (k, d)
    pmax: Tensor  # ()
    log_likelihood: Tensor  # ()
    particles: Tensor  # ()

    @staticmethod
    def zeros(model: Model, n_directions: int, r_max: int, padding: int) -> "Sums":
        k, references = model.n_classes, model.references
        shape = (k, *volume_shape(r_max, padding, model.ndim))

        def zero(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=references.device)

        return Sums(
            data=torch.zeros(shape, dtype=references.dtype.to_complex(), device=references.device),
            weight=torch.zeros(shape, dtype=references.dtype, device=references.device),
            noise=[torch.zeros_like(s) for s in model.sigma2_noise],
            noise_weight=zero(len(model.sigma2_noise)),
            norm=zero(), scale_xa=zero(len(model.scale)), scale_aa=zero(len(model.scale)),
            group_weight=zero(len(model.scale)), offset_square=zero(), class_offset=zero(k, 2),
            pdf_direction=zero(k, n_directions), pmax=zero(), log_likelihood=zero(), particles=zero(),
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """Every tensor, for summing over ranks."""
        return [t for value in vars(self).values() for t in (value if isinstance(value, list) else [value])]


@dataclass
class Operands:
    """What the images of a batch are multiplied by on their way into the sums, each `(n, p)`."""

    aligned: Tensor  # C·X, masked
    ctf2: Tensor  # C²
    numerator: Tensor  # S·C/σ²·X, unmasked
    denominator: Tensor  # (S·C)²/σ²
    shells: Tensor  # (p, box//2 + 1) sums pixels by shell

    @staticmethod
    def of(batch: ImageBatch, inverse_sigma2: Tensor, scale: Tensor) -> "Operands":
        return Operands(
            aligned=batch.masked * batch.ctf,
            ctf2=batch.ctf.square(),
            numerator=batch.unmasked * (batch.back_ctf * scale * inverse_sigma2),
            denominator=batch.ctf * batch.back_ctf * scale.square() * inverse_sigma2,
            shells=batch.geometry.pixels.shell_matrix(batch.geometry.size, batch.ctf.dtype),
        )


def add_rows(
    sums: Sums, references: References, batch: ImageBatch, operands: Operands, phases: Tensor, rows: Tensor,
    orientation: Tensor, shift: Tensor, kept: Tensor, chunk_elements: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add the kept weights row by row, a row being one particle at one fine orientation: for sparse support.

    A row's shifts collapse into one phase ramp Q = Σ_t w·φ_t, a matrix product with the phases all particles share.

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
    `(n, shells)` Σ w Re((CP)* X_t) and Σ w |CP|², double.
    """
    o, j = kept.shape[1:]
    n, n_pixels, n_shifts = len(batch), batch.geometry.n_pixels, len(phases) // j
    ramps = torch.view_as_real(phases).flatten(1)
    xa = torch.zeros((n, operands.shells.shape[1]), dtype=torch.float64, device=rows.device)
    aa = torch.zeros_like(xa)
    # rows of (fine orientation, particle), ascending
    block, child = torch.nonzero(kept.sum(2), as_tuple=True)
    key = (orientation[block] * o + child) * n + rows[block]
    order = torch.argsort(key, stable=True)
    block, child = block[order], child[order]
    key, row = torch.unique_consecutive(key[order], return_inverse=True)
    first = torch.searchsorted(row, torch.arange(len(key) + 1, device=row.device))
    step = max(1, chunk_elements // n_pixels)
    for start in range(0, len(key), step):
        fine, which = key[start : start + step] // n, key[start : start + step] % n
        entries = slice(int(first[start]), int(first[min(start + step, len(key))]))
        w = torch.zeros((len(fine), n_shifts, j), dtype=kept.dtype, device=rows.device)
        w[row[entries] - start, shift[block[entries]]] = kept[block[entries], child[entries]]
        w = w.flatten(1)
        weight = w.sum(1, keepdim=True)
        ramp = torch.view_as_complex((w @ ramps).unflatten(1, (n_pixels, 2)))
        unique, inverse = torch.unique_consecutive(fine, return_inverse=True)
        slices = references.slices(batch.geometry, unique, n_pixels, fine=True)[inverse]
        product = slices.conj() * operands.aligned[which] * ramp
        xa.index_add_(0, which, (product.real @ operands.shells).double())
        square = torch.view_as_real(slices).square().sum(-1) * operands.ctf2[which] * weight
        aa.index_add_(0, which, (square @ operands.shells).double())
        added = torch.zeros((len(unique), 2 * n_pixels), dtype=kept.dtype, device=rows.device)
        added.index_add_(0, inverse, torch.view_as_real(ramp * operands.numerator[which]).flatten(1))
        added_weight = torch.zeros((len(unique), n_pixels), dtype=kept.dtype, device=rows.device)
        added_weight.index_add_(0, inverse, operands.denominator[which] * weight)
        _insert(sums, references, batch, unique, torch.view_as_complex(added.unflatten(1, (-1, 2))), added_weight)
    return xa, aa


def add_dense(
    sums: Sums, references: References, batch: ImageBatch, operands: Operands, phases: Tensor, rows: Tensor,
    orientation: Tensor, shift: Tensor, kept: Tensor, slices: Tensor, slab: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add the kept weights as matrix products over all fine orientations: for wide support.

    With W (n·t·j, r·o): numerators are Wᵀ·X_t, denominators Wᵀ·(C²/σ²), and Σ_r w·P is W·P.

    Parameters
    ----------
    slices
        `(r·o, p)` of every fine orientation.
    slab
        particles whose weights are held at once.

    Other parameters and returns as in :func:`add_rows`.
    """
    o, j = kept.shape[1:]
    n, n_pixels, n_fine = len(batch), batch.geometry.n_pixels, len(slices)
    xa = torch.zeros((n, operands.shells.shape[1]), dtype=torch.float64, device=rows.device)
    aa = torch.zeros_like(xa)
    flat_slices = torch.view_as_real(slices).flatten(1)
    slice_power = torch.view_as_real(slices).square().sum(-1)
    numerators = torch.zeros((n_fine, 2 * n_pixels), dtype=kept.dtype, device=rows.device)
    denominators = torch.zeros((n_fine, n_pixels), dtype=kept.dtype, device=rows.device)
    starts = torch.searchsorted(rows, torch.arange(0, n + slab, slab, device=rows.device)).tolist()
    for number, (begin, end) in enumerate(pairwise(starts)):
        part = slice(number * slab, min((number + 1) * slab, n))
        m = part.stop - part.start
        w = torch.zeros((m, len(phases) // j, j, n_fine // o, o), dtype=kept.dtype, device=rows.device)
        w[rows[begin:end] - part.start, shift[begin:end], :, orientation[begin:end]] = kept[begin:end].transpose(1, 2)
        w = w.reshape(m, len(phases), n_fine)
        by_orientation = w.sum(1)  # (m, r·o)
        w = w.reshape(m * len(phases), n_fine)
        shifted = operands.numerator[part, None] * phases  # (m, t·j, p)
        numerators.addmm_(w.T, torch.view_as_real(shifted).reshape(len(w), -1))
        denominators.addmm_(by_orientation.T, operands.denominator[part])
        mean_slice = torch.view_as_complex((w @ flat_slices).reshape(m, len(phases), n_pixels, 2))
        product = (operands.aligned[part, None] * phases * mean_slice.conj()).real.sum(1)
        xa[part] = (product @ operands.shells).double()
        aa[part] = ((by_orientation @ slice_power * operands.ctf2[part]) @ operands.shells).double()
    every = torch.arange(n_fine, device=rows.device)
    _insert(sums, references, batch, every, torch.view_as_complex(numerators.unflatten(1, (-1, 2))), denominators)
    return xa, aa


def _insert(
    sums: Sums, references: References, batch: ImageBatch, fine: Tensor, numerators: Tensor, denominators: Tensor
) -> None:
    """Back-project slices `(u, p)` of ascending fine orientations into the volumes of their classes."""
    grid = references.grid
    per_class = grid.n_orientations * grid.orientation_children
    ends = torch.searchsorted(fine, torch.arange(len(references) + 1, device=fine.device) * per_class).tolist()
    for k, (start, end) in enumerate(pairwise(ends)):
        if end > start:
            backproject(
                sums.data[k], sums.weight[k], numerators[start:end], denominators[start:end],
                grid.child_matrices(fine[start:end] % per_class).to(denominators.dtype),
                batch.geometry.kx, batch.geometry.ky, references.padding, references.r_max,
            )  # fmt: skip
