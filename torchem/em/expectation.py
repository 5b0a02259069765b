"""The E-step of one half: coarse pass, significant samples, fine pass, weighted sums.

Shapes: n particles of a batch, k classes, r coarse orientations, t coarse translations, p Fourier pixels, b significant
samples (blocks), o and j the orientation and translation children of a sample. Orientations are numbered class-major;
pairs of particle and orientation are worked through orientation by orientation, so that a slice is cut once for all
its particles, and their numerators are added before anything is scattered.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from torchem.em.images import ImageBatch, ImageGeometry
from torchem.em.model import Model
from torchem.em.references import References
from torchem.em.sampling import Grid
from torchem.em.sums import Sums, add_dense, add_rows, in_steps, operands
from torchem.em.weights import block_sparse
from torchem.imaging.ctf import Optics
from torchem.imaging.fourier import squared_magnitude
from torchem.ops.pairs import score_pairs
from torchem.ops.significant import (
    Posterior,
    first_best,
    posterior,
    row_logsumexp,
    row_starts,
    significant_of_rows,
)
from torchem.ops.slices import Slices
from torchem.ops.squared_difference import (
    CPU_LADDER,
    LADDER,
    Projections,
    choose_precision,
    log_weights,
    prepare_projections,
)
from torchem.runtime import memory

# shells whose data-vs-prior ratio exceeds this take part in the scale correction
SCALE_MINIMUM_DATA_VS_PRIOR = 3.0
# share of all (particle, orientation) pairs from which on the fine pass does all of them by matrix products
DENSE_SUPPORT = {"cpu": 0.6, "cuda": 0.07}

# slices that say how strong all of them are
SOME_SLICES = 64

# of one particle in a local search: within 3 sigma of its pose, sigma being a coarse step
LOCAL_ORIENTATIONS = 200


@dataclass
class ExpectationSettings:
    """What the schedule decided for one iteration.

    Attributes
    ----------
    current_size, coarse_size
        Fourier pixels of the fine and the coarse pass.
    cross_correlation
        score by normalised cross-correlation, the best sample takes all.
    local_sigma
        degrees: Gaussian priors around the last poses; None: all orientations.
    chunk_elements
        largest number of complex values that one step may hold in one temporary.
    fine_weights
        largest number of fine-pass weights held at once; samples are gathered until theirs would be about as many.
    """

    current_size: int
    coarse_size: int
    adaptive_fraction: float = 0.999
    cross_correlation: bool = False
    local_sigma: float | None = None
    padding: int = 2
    chunk_elements: int = 2**24
    fine_weights: int = 2**24


@dataclass
class Shared:
    """What the halves of an iteration have in common, found when it is first needed.

    Attributes
    ----------
    ramps
        by optics group: phases of coarse `(t, p)` and of fine translations `(t·j, p)`, at the pixels of each pass.
    half_precision
        by optics group and number of pixels: whether kernels may take slices from volumes in half precision; the first
        images speak for all.
    """

    ramps: dict[Optics, tuple[Tensor, Tensor]] = field(default_factory=dict)
    half_precision: dict[tuple[Optics, int], bool] = field(default_factory=dict)


@dataclass
class Samples:
    """Significant coarse samples of a batch, sorted by particle, then column."""

    particle: Tensor  # (b,) position in the batch
    column: Tensor  # (b,) orientation * T + translation
    log_prior: Tensor  # (b,)
    significant: Tensor  # (n,) number of significant samples

    def __getitem__(self, part: slice) -> "Samples":
        """The samples of a range of particles, renumbered from 0."""
        if part == slice(0, len(self.significant)):
            return self
        inside = (self.particle >= part.start) & (self.particle < part.stop)
        return Samples(
            self.particle[inside] - part.start, self.column[inside], self.log_prior[inside], self.significant[part]
        )

    @staticmethod
    def joined(parts: "list[Samples]") -> "Samples":
        """Those of neighbouring ranges of particles."""
        if len(parts) == 1:
            return parts[0]
        starts = accumulate((len(part.significant) for part in parts), initial=0)
        particle = [part.particle + start for part, start in zip(parts, starts, strict=False)]
        others = zip(*((part.column, part.log_prior, part.significant) for part in parts), strict=True)
        return Samples(torch.cat(particle), *map(torch.cat, others))


@dataclass
class BatchResult:
    """Poses and per-particle figures of one batch, on the device; see :class:`torchem.em.model.Poses`."""

    euler_matrix: Tensor
    offset_angst: Tensor
    class_number: Tensor
    norm_correction: Tensor
    pmax: Tensor
    significant: Tensor
    log_likelihood: Tensor


def relative_to_mean(log_prior: Tensor) -> Tensor:
    """Log of a prior divided by its mean over all axes but the first, which RELION's log-likelihoods refer to."""
    axes = tuple(range(1, log_prior.ndim))
    return log_prior - (torch.logsumexp(log_prior, axes, keepdim=True) - math.log(log_prior[0].numel()))


class Expectation:
    """The E-step of one half: made once an iteration, called on batch after batch, adding to ``sums``.

    Parameters
    ----------
    model
        references and statistics of this half.
    grid
        the iteration's samples.
    operators
        `(g, 3, 3)` of the point group.
    shared
        what the halves have in common.
    volumes
        of the references, see :class:`torchem.em.references.References`.

    Attributes
    ----------
    precisions
        of scores, that were chosen so far.
    """

    def __init__(
        self, model: Model, grid: Grid, settings: ExpectationSettings, operators: Tensor,
        shared: Shared | None = None, volumes: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model, self.grid, self.settings = model, grid, settings
        self.operators = operators
        self._shared = shared or Shared()
        self.dtype = model.references.dtype
        r_max = settings.current_size // 2
        # what stays until the maps are made, below what goes with the E-step
        self.sums = Sums.zeros(model, grid.n_directions, r_max, settings.padding)
        self.references = References(model.references, grid, r_max, settings.padding, volumes)
        self._coarse_projections: dict[Optics, Projections] = {}
        self.precisions: set[str] = set()

    def __call__(
        self, batch: ImageBatch, optics_group: int, group: Tensor, norm_correction: Tensor, last_euler: Tensor
    ) -> BatchResult:
        """Add one batch to the sums and return what was found for its particles.

        Parameters
        ----------
        optics_group
            of all particles of the batch.
        group
            `(n,)` scale groups.
        norm_correction
            `(n,)` the present ones.
        last_euler
            `(n, 3)` last poses, centres of local searches.
        """
        inverse_sigma2 = self._inverse_sigma2(batch, optics_group)
        scale = self.model.scale[group].to(self.dtype)[:, None]
        results = []
        for start, samples in self._significant(batch, inverse_sigma2, scale, last_euler):
            for part in self._parts(samples):
                here = slice(start + part.start, start + part.stop)
                with memory.scope("chunk"):
                    results.append(memory.keep(self._fine_part(
                        batch[here], samples[part], optics_group, group[here], norm_correction[here], inverse_sigma2,
                        scale[here],
                    ), "batch"))  # fmt: skip
            del samples  # gone before the next ones are found
        if len(results) == 1:
            return results[0]
        return BatchResult(
            *(torch.cat(values) for values in zip(*(vars(r).values() for r in results), strict=True))
        )

    def _significant(
        self, batch: ImageBatch, inverse_sigma2: Tensor, scale: Tensor, last_euler: Tensor
    ) -> Iterator[tuple[int, Samples]]:
        """Range after range of the particles, where it begins and its significant samples, enough for a fine pass."""
        orientations = LOCAL_ORIENTATIONS
        if self.settings.local_sigma is None:
            orientations = self.grid.n_orientations
            with memory.scope("chunk"):
                self._coarse_table(batch, inverse_sigma2, scale)  # as precise as all of its images need
        every = self.model.n_classes * orientations * self.grid.n_translations
        slab = max(1, self.settings.chunk_elements // every)
        first, found = 0, list[Samples]()
        for start in range(0, len(batch), slab):
            here = slice(start, min(start + slab, len(batch)))
            with memory.scope("chunk"):
                samples = self._coarse_pass(batch[here], inverse_sigma2, scale[here], last_euler[here])
                found.append(memory.keep(samples, "batch"))
                del samples
            if here.stop == len(batch) or sum(len(part.column) for part in found) >= self._samples_at_once:
                joined, found = Samples.joined(found), []
                yield first, joined
                first = here.stop
                del joined

    def _fine_part(
        self, batch: ImageBatch, samples: Samples, optics_group: int, group: Tensor, norm_correction: Tensor,
        inverse_sigma2: Tensor, scale: Tensor,
    ) -> BatchResult:  # fmt: skip
        """Fine pass and sums of particles whose weights may be held at once."""
        _, phases = self._phases(batch.geometry)
        orientation = samples.column // self.grid.n_translations
        n_orientations = self.model.n_classes * self.grid.n_orientations
        pairs = torch.unique_consecutive(samples.particle * n_orientations + orientation, return_inverse=True)
        dense = self._is_dense(batch, len(pairs[0]))
        _, found = self._fine_pass(batch, inverse_sigma2, scale, phases, samples, dense, pairs)
        return self._accumulate(
            batch, optics_group, group, norm_correction, inverse_sigma2, scale, phases, samples, dense, found
        )

    def _phases(self, geometry: ImageGeometry) -> tuple[Tensor, Tensor]:
        """:class:`Shared`'s ramps of an optics group."""
        ramps = self._shared.ramps
        if geometry.optics not in ramps:
            coarse = geometry.phases(self.grid.coarse_shifts())[:, : geometry.count(self.settings.coarse_size)]
            fine = geometry.phases(self.grid.fine_shifts().flatten(0, 1))
            ramps[geometry.optics] = memory.keep((coarse.contiguous(), fine), "iteration")
        return ramps[geometry.optics]

    @property
    def _samples_at_once(self) -> int:
        """How many samples' fine weights may be held."""
        return max(1, self.settings.fine_weights // (self.grid.orientation_children * self.grid.translation_children))

    def _parts(self, samples: Samples) -> Iterator[slice]:
        """Ranges of particles whose fine weights may be held at once."""
        most = self._samples_at_once
        if len(samples.column) <= most:
            yield slice(0, len(samples.significant))
            return
        ends = torch.cumsum(samples.significant, 0).tolist()
        start, base = 0, 0
        for position, end in enumerate(ends):
            if end - base > most and position > start:
                yield slice(start, position)
                start, base = position, ends[position - 1]
        yield slice(start, len(ends))

    # scores

    def _inverse_sigma2(self, batch: ImageBatch, optics_group: int) -> Tensor:
        shell = batch.geometry.pixels.shell[: batch.geometry.n_pixels]
        return self.model.inverse_sigma2(optics_group).to(self.dtype)[shell]

    def _score_operands(
        self, batch: ImageBatch, inverse_sigma2: Tensor, scale: Tensor, n_pixels: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, weights and power as :func:`torchem.ops.squared_difference.score` wants them."""
        ctf = batch.ctf[:, :n_pixels] * scale
        masked = batch.masked[:, :n_pixels]
        if self.settings.cross_correlation:
            assert batch.window_power is not None
            # RELION sums the correlation over the whole window: the column kx = 0 with the mates that lie in it
            pixels = batch.geometry.pixels
            border = pixels.shell[n_pixels - 1]
            twice = 1 + ((pixels.kx == 0) & (pixels.ky > 0) & (pixels.ky < border))[:n_pixels].to(self.dtype)
            return masked * (ctf * twice), ctf.square() * twice, batch.window_power.to(self.dtype)
        ctf[:, 0] = 0  # the origin takes no part
        weighted = ctf * inverse_sigma2[:n_pixels]
        return masked * weighted, weighted.mul_(ctf), None

    def _offset_log_prior(self, batch: ImageBatch) -> Tensor:
        """`(n, k, t)`: Gaussian log prior of the unperturbed coarse offsets, relative to its mean over k and t."""
        offsets = batch.offset_angst[:, None, None] + self.grid.translations - self.model.prior_offset[:, None]
        return relative_to_mean(offsets.square().sum(-1).mul_(-0.5 / self.model.sigma_offset**2))

    # coarse pass

    def _coarse_pass(
        self, batch: ImageBatch, inverse_sigma2: Tensor, scale: Tensor, last_euler: Tensor
    ) -> Samples:
        n_pixels = batch.geometry.count(self.settings.coarse_size)
        phases, _ = self._phases(batch.geometry)
        operands = self._score_operands(batch, inverse_sigma2, scale, n_pixels)
        offset_prior = self._offset_log_prior(batch)
        sigma = self.settings.local_sigma
        if sigma is not None:
            return self._local_samples(batch, operands, phases, offset_prior, last_euler, sigma)
        images, weights, power = operands
        prior = None if self.settings.cross_correlation else self._orientation_log_prior()
        found = log_weights(
            images, weights, self._coarse_table(batch, inverse_sigma2, scale), phases, prior,
            None if prior is None else offset_prior, power,
        )  # fmt: skip
        return self._global_samples(found.values, found.log_total(), prior, offset_prior)

    def _coarse_table(self, batch: ImageBatch, inverse_sigma2: Tensor, scale: Tensor) -> Projections:
        """Slices at all coarse orientations, made ready for the first batch of an optics group and kept for all."""
        key = batch.geometry.optics
        if key not in self._coarse_projections:
            n_pixels = batch.geometry.count(self.settings.coarse_size)
            _, weights, _ = self._score_operands(batch, inverse_sigma2, scale, n_pixels)
            everything = torch.arange(self.model.n_classes * self.grid.n_orientations, device=weights.device)
            slices = self.references.slices(
                batch.geometry, everything, n_pixels, fine=False, r_max=self.settings.coarse_size // 2
            )
            self._coarse_projections[key] = memory.keep(
                self._projections(slices, inverse_sigma2, weights), "iteration"
            )
        return self._coarse_projections[key]

    def _projections(self, slices: Slices, inverse_sigma2: Tensor, weights: Tensor) -> Projections:
        """Slices made ready for matrix products, as precise as these images `(n, p)` of weights need."""
        cut, whitening = slices.cut(), None
        if not self.settings.cross_correlation:
            whitening = inverse_sigma2[: weights.shape[1]].sqrt()
            whitening[0] = 0
        return prepare_projections(cut, self._precision(cut, weights), whitening, self.model.n_classes)

    def _precision(self, slices: Tensor, weights: Tensor) -> str:
        """How precise scores must be, from Σ C²|P|²/σ² of an average slice for the image in which it is largest."""
        if slices.dtype != torch.complex64:
            return "fp32"
        largest = float((weights @ squared_magnitude(slices).mean(0)).amax())
        precision = choose_precision(largest, LADDER if slices.is_cuda else CPU_LADDER)
        self.precisions.add(precision)
        return precision

    def _bears_half_precision(self, batch: ImageBatch, slices: Slices, weights: Tensor) -> bool:
        """Whether kernels may take slices from volumes in half precision, for images of these weights `(n, p)`."""
        if not slices.on_gpu:
            return False
        known, key = self._shared.half_precision, (batch.geometry.optics, weights.shape[1])
        if key not in known:
            count = min(len(slices), SOME_SLICES)
            some = torch.arange(count, device=weights.device) * len(slices) // count
            known[key] = self._precision(slices[some].cut(), weights) in ("fp16", "split")
        return known[key]

    def _global_samples(
        self, values: Tensor, log_total: Tensor, prior: Tensor | None, offset_prior: Tensor
    ) -> Samples:
        """The significant samples of log weights `(n, t, k·r)`."""
        n, n_shifts, n_orientations = values.shape
        if prior is None:
            # winner takes all, and no priors
            best = values.transpose(1, 2).reshape(n, -1).max(1).indices
            each = torch.arange(n, device=best.device)
            return Samples(each, best, torch.zeros_like(best, dtype=torch.float64), torch.ones_like(best))
        row, place = significant_of_rows(values.flatten(1), log_total, self.settings.adaptive_fraction)
        column = place % n_orientations * n_shifts + place // n_orientations
        # by particle, then column
        n_columns = n_orientations * n_shifts
        sample = (row * n_columns + column).sort().values
        row, column = sample // n_columns, sample % n_columns
        orientation, shift = column // n_shifts, column % n_shifts
        log_prior = prior[orientation] + offset_prior[row, orientation // self.grid.n_orientations, shift]
        return Samples(row, column, log_prior, row_starts(row, n).diff())

    def _orientation_log_prior(self) -> Tensor:
        """`(k·r,)`: log probability of each orientation's direction (2D: of its class), relative to the mean."""
        flat = self.model.ndim == 2
        probability = self.model.pdf_class if flat else self.model.pdf_direction.flatten()
        prior = (probability / probability.mean()).log()
        return prior.repeat_interleave(self.grid.n_orientations if flat else self.grid.n_psi)

    def _local_samples(
        self, batch: ImageBatch, operands: tuple, phases: Tensor, offset_prior: Tensor, last_euler: Tensor,
        sigma: float,
    ) -> Samples:  # fmt: skip
        """The significant samples around each particle's last pose."""
        n_shifts = len(phases)
        particle, orientation, log_weight, log_prior = self._local_scores(
            batch, operands, phases, offset_prior, last_euler, sigma
        )
        first = row_starts(particle, len(batch)) * n_shifts
        if self.settings.cross_correlation:
            rows = torch.repeat_interleave(particle, n_shifts)
            top, _ = row_logsumexp(log_weight.flatten(), rows, len(batch))
            place = first_best(log_weight.flatten(), rows, top)
            log_prior = torch.zeros_like(log_prior)
        else:
            place = torch.nonzero(posterior(log_weight.flatten(), first, self.settings.adaptive_fraction).kept)[:, 0]
        pair, shift = place // n_shifts, place % n_shifts
        particle = particle[pair]
        return Samples(
            particle, orientation[pair] * n_shifts + shift, log_prior[pair, shift],
            row_starts(particle, len(batch)).diff(),
        )  # fmt: skip

    def _local_scores(
        self, batch: ImageBatch, operands: tuple, phases: Tensor, offset_prior: Tensor, last_euler: Tensor,
        sigma: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Pairs `(m,)` of particle and orientation, and their log weights and log priors `(m, t)`."""
        images, weights, power = operands
        particle, orientation, orientation_prior = self.grid.local_orientations(last_euler, sigma, self.operators)
        per_class = self.grid.n_orientations
        n_orientations = row_starts(particle, len(batch)).diff()
        orientation_prior += n_orientations.double().log()[particle]  # relative to the mean
        if self.model.n_classes > 1:
            # every class is searched around the last pose
            classes = torch.arange(self.model.n_classes, device=images.device)[:, None]
            orientation = (classes * per_class + orientation).flatten()
            particle, order = particle.repeat(len(classes)).sort(stable=True)
            orientation, orientation_prior = orientation[order], orientation_prior.repeat(len(classes))[order]
        slices, inverse = self.references.slices_of(
            batch.geometry, orientation, images.shape[1], fine=False, r_max=self.settings.coarse_size // 2
        )
        scores = score_pairs(
            slices, inverse, particle, images, weights, phases, power, self.settings.chunk_elements,
            half=self._bears_half_precision(batch, slices, weights),
        )  # fmt: skip
        log_prior = orientation_prior[:, None] + offset_prior[particle, orientation // per_class]
        if not self.settings.cross_correlation:
            scores += log_prior.to(scores)
        return particle, orientation, scores, log_prior

    # fine pass

    def _fine_pass(
        self, batch: ImageBatch, inverse_sigma2: Tensor, scale: Tensor, phases: Tensor, samples: Samples, dense: bool,
        pairs: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Posterior]:  # fmt: skip
        """Log weights of the children of significant samples, block-sparse, and what they amount to.

        Phases are `(t·j, p)`, of all fine translations; pairs of particle and orientation particle · R + orientation,
        ascending, and to which of them each sample belongs.
        """
        grid = self.grid
        operands = self._score_operands(batch, inverse_sigma2, scale, batch.geometry.n_pixels)
        if dense:
            values = self._dense_scores(batch, inverse_sigma2, operands, phases, samples)  # (b, o, j)
        else:
            values = self._pair_scores(batch, operands, phases, samples, *pairs)
        values += samples.log_prior.to(self.dtype)[:, None, None]
        weights = block_sparse(
            samples.particle, samples.column, values.flatten(1), len(batch),
            self.model.n_classes * grid.n_orientations * grid.n_translations,
        )  # fmt: skip
        first = weights.crow_indices().long() * values[0].numel()
        return weights, posterior(weights.values().flatten(), first, self.settings.adaptive_fraction)

    def _is_dense(self, batch: ImageBatch, n_pairs: int) -> bool:
        """Whether so many pairs of particle and orientation are significant that all are better done at once."""
        if self.settings.local_sigma is not None:
            return False
        n_fine = self.model.n_classes * self.grid.n_orientations * self.grid.orientation_children
        if n_fine * batch.geometry.n_pixels > self.settings.fine_weights:
            return False  # all their slices would not fit
        support = DENSE_SUPPORT[batch.masked.device.type]
        return n_pairs > support * len(batch) * self.model.n_classes * self.grid.n_orientations

    def _dense_slab(self, batch: ImageBatch) -> int:
        """How many particles' weights of all fine samples may be held at once."""
        grid = self.grid
        shifts = grid.n_translations * grid.translation_children
        samples = self.model.n_classes * grid.n_orientations * grid.orientation_children * shifts
        images = 8 * shifts * batch.geometry.n_pixels
        return max(1, self.settings.fine_weights // (samples + images))

    def _every_fine_slice(self, batch: ImageBatch) -> Slices:
        n = self.model.n_classes * self.grid.n_orientations * self.grid.orientation_children
        every = torch.arange(n, device=batch.masked.device)
        return self.references.slices(batch.geometry, every, batch.geometry.n_pixels, fine=True)

    def _dense_scores(
        self, batch: ImageBatch, inverse_sigma2: Tensor, operands: tuple, phases: Tensor, samples: Samples
    ) -> Tensor:
        """Scores `(b, o, j)` of the significant samples' children, taken from those of all fine samples."""
        grid, o, j = self.grid, self.grid.orientation_children, self.grid.translation_children
        images, weights, power = operands
        orientation, shift = samples.column // grid.n_translations, samples.column % grid.n_translations
        # below all that goes before it does
        values = torch.empty((len(shift), o, j), dtype=self.dtype, device=images.device)
        projections = self._projections(self._every_fine_slice(batch), inverse_sigma2, weights)
        nothing = None if power is not None else torch.zeros(len(projections.values), device=images.device)
        slab = self._dense_slab(batch)
        for start, begin, end in in_steps(samples.particle, len(batch), slab):
            here = slice(start, start + slab)
            # priors come with the samples
            scores = log_weights(
                images[here], weights[here], projections, phases, nothing,
                None if nothing is None else nothing.new_zeros((len(images[here]), self.model.n_classes, len(phases))),
                None if power is None else power[here],
            ).values.unflatten(2, (-1, o)).unflatten(1, (-1, j))  # fmt: skip
            particle = samples.particle[begin:end] - start
            # (b, j, o)
            values[begin:end] = scores[particle, shift[begin:end], :, orientation[begin:end]].transpose(1, 2)
            del scores  # gone before the next ones are made
        return values

    def _pair_scores(
        self, batch: ImageBatch, operands: tuple, phases: Tensor, samples: Samples, key: Tensor, pair: Tensor
    ) -> Tensor:
        """Scores `(b, o, j)`: each particle with its significant orientations' children, at all shifts at once."""
        grid, n_pixels = self.grid, batch.geometry.n_pixels
        n_shifts, o, j = grid.n_translations, grid.orientation_children, grid.translation_children
        images, weights, power = operands
        shift = samples.column % n_shifts
        values = torch.empty((len(shift), o, j), dtype=self.dtype, device=images.device)
        n_orientations = self.model.n_classes * grid.n_orientations
        children = torch.arange(o, device=images.device)
        step = max(1, self.settings.chunk_elements // (o * len(phases)))
        for start, begin, end in in_steps(pair, len(key), step):
            mine = key[start : start + step, None]
            fine = (mine % n_orientations * o + children).flatten()
            slices, inverse = self.references.slices_of(batch.geometry, fine, n_pixels, fine=True)
            scores = score_pairs(
                slices, inverse, (mine // n_orientations).expand(-1, o).flatten(), images, weights, phases, power,
                self.settings.chunk_elements, half=self._bears_half_precision(batch, slices, weights),
            ).reshape(-1, o, n_shifts, j)  # fmt: skip
            values[begin:end] = scores[pair[begin:end] - start, :, shift[begin:end]]
            del scores  # gone before the next ones are made
        return values

    # weighted sums

    def _accumulate(
        self, batch: ImageBatch, optics_group: int, group: Tensor, norm_correction: Tensor, inverse_sigma2: Tensor,
        scale: Tensor, phases: Tensor, samples: Samples, dense: bool, found: Posterior,
    ) -> BatchResult:  # fmt: skip
        grid, sums, n = self.grid, self.sums, len(batch)
        n_shifts, o, j = grid.n_translations, grid.orientation_children, grid.translation_children
        rows, best = samples.particle, found.best
        if self.settings.cross_correlation:
            # winner takes all: its score is not a log probability
            pmax = torch.ones(n, dtype=torch.float64, device=rows.device)
            log_likelihood = found.top.double()
            kept = torch.zeros_like(found.kept)
            kept[best] = 1
        else:
            pmax = (found.top.double() - found.log_total).exp()
            log_likelihood = found.log_total + self._log_likelihood_constant(batch, inverse_sigma2)
            kept = found.kept
        kept = kept.reshape(-1, o, j)
        orientation, shift = samples.column // n_shifts, samples.column % n_shifts
        strong = self.model.data_vs_prior.amax(0) > SCALE_MINIMUM_DATA_VS_PRIOR
        where = (
            sums, self.references, batch, operands(batch, inverse_sigma2, scale, strong), phases, rows, orientation,
            shift, kept,
        )  # fmt: skip
        if dense:
            residual, figures = add_dense(*where, self._every_fine_slice(batch), self._dense_slab(batch))
        else:
            residual, figures = add_rows(*where, self.settings.chunk_elements)

        # offsets, from how much of each particle is at each class and translation
        class_of = orientation // grid.n_orientations
        by_child = kept.sum(1).double()  # (b, j); summed in double, all of kept would be copied
        share = by_child.new_zeros((n * self.model.n_classes * n_shifts, j))
        share.index_add_(0, (rows * self.model.n_classes + class_of) * n_shifts + shift, by_child)
        share = share.view(n, -1, n_shifts, j)
        offsets = (batch.offset_angst[:, None, None] + grid.fine_shifts())[:, None]  # (n, 1, t, j, 2)
        from_prior = offsets - self.model.prior_offset[:, None, None]
        sums.offset_square += torch.dot(share.flatten(), from_prior.square().sum(-1).flatten())
        if self.model.ndim == 2:
            sums.class_offset += (share[..., None] * offsets).sum((0, 2, 3))
        total = share.sum((1, 2, 3))

        # noise, norm and scale from what is left of the images
        power = batch.power.clone()
        power[:, : batch.geometry.size // 2 + 1].mul_(total[:, None])
        by_shell = residual @ batch.geometry.pixels.shell_matrix(batch.geometry.size)
        sums.noise[optics_group].add_(power.sum(0)).add_(by_shell)
        sums.noise_weight[optics_group].add_(total.sum())
        new_norm = (power.sum(1).add_(figures[:, 0]) * 2).sqrt_().mul_(norm_correction / self.model.norm_average)
        sums.scale_xa.index_add_(0, group, figures[:, 1])
        sums.scale_aa.index_add_(0, group, figures[:, 2])
        sums.group_weight.index_add_(0, group, torch.ones_like(total))

        # directions, totals
        sums.pdf_direction.view(-1).index_add_(0, orientation // grid.n_psi, by_child.sum(1))
        sums.totals += torch.stack((torch.ones_like(pmax), new_norm, pmax, log_likelihood)).sum(1)

        block, child = best // (o * j), best % (o * j)
        fine = orientation[block] % grid.n_orientations * o + child // j
        return BatchResult(
            euler_matrix=grid.child_matrices(fine),
            offset_angst=offsets[torch.arange(n, device=rows.device), 0, shift[block], child % j],
            class_number=class_of[block],
            norm_correction=new_norm,
            pmax=pmax,
            significant=samples.significant,
            log_likelihood=log_likelihood,
        )

    def _log_likelihood_constant(self, batch: ImageBatch, inverse_sigma2: Tensor) -> Tensor:
        """`(n,)`: what the scores leave out, -½Σ|X|²/σ² - Σ log 2πσ², without the origin.

        As in RELION, the power beyond the window counts too, undivided.
        """
        inverse = inverse_sigma2.double()[1:]
        power = squared_magnitude(batch.masked[:, 1:]).double() @ inverse
        power += batch.power[:, batch.geometry.size // 2 + 1 :].sum(1)
        return torch.add(torch.log(inverse / (2 * torch.pi)).sum(), power, alpha=-0.5)
