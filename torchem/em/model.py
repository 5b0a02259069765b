"""What a refinement knows: the model of each half, the state of each particle, and of the schedule."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchem.em.sampling import Sampling


@dataclass
class Model:
    """References and statistics of one half of the data, or of all of it; spectra are double, by shell.

    Attributes
    ----------
    references
        `(k, L, L, L)` or `(k, L, L)` real-space maps.
    sigma2_noise
        one `(box//2 + 1,)` an optics group: variance of a real or imaginary component.
    tau2, sigma2, data_vs_prior, fourier_coverage, fsc
        `(k, L//2 + 1)`.
    pdf_class, pdf_direction
        `(k,)`; `(k, d)`, which sums to 1 over both.
    prior_offset
        `(k, 2)` Å, centre of the offset prior (2D references; 0 in 3D).
    sigma_offset
        Å.
    norm_average
        mean norm correction.
    scale
        `(groups,)`.
    """

    references: Tensor
    sigma2_noise: list[Tensor]
    tau2: Tensor
    sigma2: Tensor
    data_vs_prior: Tensor
    fourier_coverage: Tensor
    fsc: Tensor
    pdf_class: Tensor
    pdf_direction: Tensor
    prior_offset: Tensor
    scale: Tensor
    sigma_offset: float = 10.0
    norm_average: float = 1.0
    log_likelihood: float = 0.0
    average_pmax: float = 0.0

    @staticmethod
    def initial(
        references: Tensor, sigma2_noise: list[Tensor], n_directions: int, n_groups: int, norm_average: float = 1.0
    ) -> "Model":
        """A model before the first iteration: flat priors and spectra, scale 1, sigma_offset 10 Å."""
        k, shells, device = len(references), references.shape[-1] // 2 + 1, references.device
        flat = torch.zeros((k, shells), dtype=torch.float64, device=device)
        return Model(
            references=references,
            sigma2_noise=sigma2_noise,
            tau2=flat.clone(),
            sigma2=flat.clone(),
            data_vs_prior=flat.clone(),
            fourier_coverage=flat.clone(),
            fsc=flat.clone(),
            pdf_class=torch.full((k,), 1.0 / k, dtype=torch.float64, device=device),
            pdf_direction=torch.full(
                (k, n_directions), 1.0 / (k * n_directions), dtype=torch.float64, device=device
            ),
            prior_offset=torch.zeros((k, 2), dtype=torch.float64, device=device),
            scale=torch.ones(n_groups, dtype=torch.float64, device=device),
            norm_average=norm_average,
        )

    def inverse_sigma2(self, optics_group: int) -> Tensor:
        """`(box//2 + 1,)` 1/σ² of an optics group's noise; 0 where nothing is known of it."""
        sigma2 = self.sigma2_noise[optics_group]
        return torch.where(sigma2 > 0, 1 / sigma2, 0.0)

    def spread_directions(self, n_directions: int) -> None:
        """Start on a new grid: each class's probability, flat over its directions."""
        self.pdf_direction = (self.pdf_class[:, None] / n_directions).repeat(1, n_directions)

    @property
    def n_classes(self) -> int:
        return len(self.references)

    @property
    def ndim(self) -> int:
        return self.references.ndim - 1

    @property
    def box(self) -> int:
        return self.references.shape[-1]


@dataclass
class Poses:
    """What the last iteration found for each of N particles, on the CPU, double.

    Attributes
    ----------
    euler
        `(n, 3)` rot, tilt, psi, degrees.
    offset_angst
        `(n, 2)` the shift that centres the particle.
    class_number
        `(n,)` from 0.
    norm_correction, pmax, significant, log_likelihood
        `(n,)`.
    """

    euler: Tensor
    offset_angst: Tensor
    class_number: Tensor
    norm_correction: Tensor
    pmax: Tensor
    significant: Tensor
    log_likelihood: Tensor

    @staticmethod
    def initial(euler: Tensor, offset_angst: Tensor, norm_correction: Tensor) -> "Poses":
        n = len(euler)
        zero = torch.zeros(n, dtype=torch.float64)
        return Poses(
            euler.clone(), offset_angst.clone(), torch.zeros(n, dtype=torch.int64), norm_correction.clone(),
            zero.clone(), torch.zeros(n, dtype=torch.int64), zero.clone(),
        )  # fmt: skip

    def clone(self) -> "Poses":
        return Poses(**{name: value.clone() for name, value in vars(self).items()})


@dataclass
class State:
    """All that an iteration hands to the next; what a checkpoint holds, and nothing else.

    Attributes
    ----------
    halves
        one model (classification) or two (gold standard).
    subset
        `(n,)` the half of each particle, from 0.
    current_size, coarse_size
        Fourier pixels of the two passes.
    current_resolution
        Å; infinite before the first iteration.
    orientability
        `(L//2 + 1,)` share of each shell in telling orientations apart.
    local_sigma
        degrees: width of the priors around the last poses; None while all orientations are searched.
    """

    halves: list[Model]
    sampling: Sampling
    poses: Poses
    subset: Tensor
    generator: torch.Generator
    orientability: Tensor
    iteration: int = 0
    local_sigma: float | None = None
    current_size: int = 0
    coarse_size: int = 0
    current_resolution: float = float("inf")
    size_increment: int = 10
    has_high_fsc: bool = False
    iterations_without_gain: int = 0
    iterations_without_change: int = 0
    best_resolution: float = 0.0  # 1/Å
    smallest_change_angles: float = 999.0
    smallest_change_offsets: float = 999.0
    change_angles: float = 999.0
    change_offsets: float = 999.0
    accuracy_angles: float = 999.0
    accuracy_offsets: float = 999.0
    fine_enough: bool = False
    converged: bool = False
