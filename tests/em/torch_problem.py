"""A problem of :mod:`tests.em.plain_em` in torchem's own types, and the E-step run on it."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tests.em import plain_em as em
from torchem.em.expectation import BatchResult, Expectation, ExpectationSettings, Samples
from torchem.em.images import ImageBatch, ImageGeometry, prepare_images
from torchem.em.model import Model
from torchem.em.sampling import Grid, Sampling
from torchem.imaging.ctf import Optics
from torchem.imaging.symmetry import asymmetric_directions, operators
from torchem.ops.significant import Posterior

CPU = torch.device("cpu")


class Recorder(Expectation):
    """The E-step, keeping the log weights of the coarse pass and what the fine pass found."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.candidates: list[tuple[Tensor, ...]] = []
        self.samples: list[Samples] = []
        self.fine: list[tuple[Samples, Tensor, Tensor]] = []

    def _global_samples(self, values, *args):
        found = super()._global_samples(values, *args)
        every = values.transpose(1, 2).flatten(1)
        columns = torch.arange(every.shape[1]).expand_as(every)
        if self.settings.cross_correlation:
            # the others are not compared: the scale of a correlation means nothing
            every, columns = (values.gather(1, found.column[:, None]) for values in (every, columns))
        particles = torch.arange(len(every))
        self.candidates.append((particles[:, None].expand_as(every).flatten(), columns.flatten(), every.flatten()))
        return found

    def _local_scores(self, *args):
        particle, orientation, scores, log_prior = super()._local_scores(*args)
        n_shifts = scores.shape[1]
        columns = (orientation[:, None] * n_shifts + torch.arange(n_shifts)).flatten()
        self.candidates.append((particle.repeat_interleave(n_shifts), columns, scores.flatten()))
        return particle, orientation, scores, log_prior

    def _coarse_pass(self, *args) -> Samples:
        self.samples.append(super()._coarse_pass(*args))
        return self.samples[-1]

    def _fine_pass(self, *args) -> tuple[Tensor, Posterior]:
        weights, found = super()._fine_pass(*args)
        self.fine.append((args[4], weights, found.log_total))
        return weights, found


@dataclass
class Converted:
    """Everything that one E-step of torchem takes, for one half of a plain problem."""

    model: Model
    grid: Grid
    settings: ExpectationSettings
    operators: Tensor
    batch: ImageBatch
    group: Tensor
    norm: Tensor
    euler: Tensor
    found: BatchResult | None = field(default=None)

    def run(self, kind: type[Expectation] = Recorder) -> Expectation:
        """The E-step over the batch; ``found`` keeps its result."""
        expectation = kind(self.model, self.grid, self.settings, self.operators)
        self.found = expectation(self.batch, 0, self.group, self.norm, self.euler)
        return expectation


def convert(
    problem: em.Problem, half: int = 0, dtype: torch.dtype = torch.float64, symmetry: str = "C1", **settings: object
) -> Converted:
    """One half of a plain problem; ``settings`` replace those of the E-step."""
    particles, plain, optics = problem.halves[half], problem.models[half], problem.optics
    ndim, box = plain.references.ndim - 1, plain.references.shape[-1]
    sampling = Sampling(
        symmetry=symmetry, offset_range=problem.sampling.offset_range, offset_step=problem.sampling.offset_step,
        ndim=ndim, healpix_order=max(problem.sampling.healpix_order, 0), psi_step=problem.sampling.psi_step,
        perturbation=problem.sampling.perturbation,
    )  # fmt: skip
    grid = Grid(sampling)
    assert grid.pixels.tolist() == problem.sampling.pixels.tolist()
    model = Model.initial(
        torch.from_numpy(plain.references).to(dtype), [torch.from_numpy(plain.sigma2).clone()], grid.n_directions,
        len(plain.scale), plain.norm_average,
    )  # fmt: skip
    model.pdf_direction = torch.from_numpy(plain.pdf_direction.copy())
    model.pdf_class = model.pdf_direction.sum(1)
    model.sigma_offset = plain.sigma_offset
    model.scale = torch.from_numpy(plain.scale.copy())
    model.data_vs_prior = torch.from_numpy(plain.data_vs_prior.copy())
    model.prior_offset = torch.from_numpy(plain.prior_offset.copy())
    size = problem.settings.current_size
    constants = Optics("one", optics.voltage, optics.cs, optics.amplitude_contrast, optics.pixel_size, box)
    geometry = ImageGeometry.of(constants, size, box, optics.pixel_size, dtype, CPU)
    n = len(particles.images)
    batch = prepare_images(
        torch.from_numpy(particles.images).to(dtype), torch.arange(n), geometry,
        torch.from_numpy(particles.ctf_parameters), plain.norm_average / torch.from_numpy(particles.norm),
        torch.from_numpy(particles.origins_angst), problem.settings.particle_diameter, None, 0,
        problem.settings.cross_correlation,
    )  # fmt: skip
    local = problem.sampling.local_sigma
    values = {
        "current_size": size,
        "coarse_size": problem.settings.coarse_size,
        "adaptive_fraction": problem.settings.adaptive_fraction,
        "cross_correlation": problem.settings.cross_correlation,
        "local_sigma": None if local is None else local[0],
        "padding": problem.settings.padding,
    }
    return Converted(
        model, grid, ExpectationSettings(**(values | settings)), torch.from_numpy(problem.settings.operators), batch,
        torch.from_numpy(particles.group), torch.from_numpy(particles.norm),
        torch.zeros((n, 3), dtype=torch.float64) if particles.euler is None else torch.from_numpy(particles.euler),
    )  # fmt: skip


def plain_half_space(problem: em.Problem, plain: np.ndarray) -> np.ndarray:
    """A plain sum `(K, ...)` on torchem's grid: the half x >= 0, without the plain one's spare border."""
    ndim = problem.models[0].references.ndim - 1
    inner = (slice(None), *[slice(1, -1)] * ndim)
    return em.right_half(plain[inner])


# name: dimensions, classes, point group, options of em.example
CASES: dict[str, tuple[int, int, str, dict]] = {
    "3D": (3, 1, "D2", {}),
    "3D, two classes": (3, 2, "D2", {"perturbation": -0.4}),
    "3D, local": (3, 1, "C1", {"local": True}),
    "3D, local, two classes": (3, 2, "D2", {"local": True}),
    "3D, correlation": (3, 1, "C1", {"cross_correlation": True}),
    "3D, two classes, correlation": (3, 2, "D2", {"cross_correlation": True}),
    "2D": (2, 1, "C1", {}),
    "2D, two classes": (2, 2, "C1", {"perturbation": -0.4}),
    "2D, local, two classes": (2, 2, "C1", {"local": True}),
    "2D, two classes, correlation": (2, 2, "C1", {"cross_correlation": True}),
}


@cache
def solved(name: str, halves: int = 1) -> tuple[em.Problem, list[em.Expectation]]:
    """A case of 20 particles × 24 px in three scale groups, with the plain E-step of each half."""
    ndim, classes, symmetry, options = CASES[name]
    if ndim == 3:
        options = options | {"operators": operators(symmetry), "pixels": asymmetric_directions(symmetry, 1)}
    problem = em.example(ndim, classes, groups=3, halves=halves, **options)
    return problem, [
        em.expectation(half, problem.optics, model, problem.sampling, problem.settings)
        for half, model in zip(problem.halves, problem.models, strict=True)
    ]


def of_case(name: str, half: int = 0, halves: int = 1, dtype: torch.dtype = torch.float64, **settings) -> Converted:
    """A case in torchem's types."""
    return convert(solved(name, halves)[0], half, dtype, CASES[name][2], **settings)


def relative_rms(found: object, expected: object) -> float:
    """Root mean square of the difference over that of what is expected."""
    found, expected = (x.numpy() if isinstance(x, Tensor) else np.asarray(x) for x in (found, expected))
    assert found.shape == expected.shape
    return float(np.sqrt((np.abs(found - expected) ** 2).sum() / (np.abs(expected) ** 2).sum()))
