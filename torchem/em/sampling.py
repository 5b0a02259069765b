"""The grid of orientations and translations: coarse samples, their children, the perturbation, local searches.

An orientation is numbered ``direction * n_psi + psi`` within the asymmetric unit; with K classes, class-major
(``class * n_orientations + orientation``). A child of an orientation is one of 4 nested HEALPix pixels times 2 psi
angles (psi innermost), a child of a translation one of 2 × 2 quarters (x outer), for every order of oversampling.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import healpix
import numpy as np
import torch
from torch import Tensor

from torchem.imaging.symmetry import asymmetric_directions, psi_angle, rotation_matrix
from torchem.ops.significant import row_logsumexp
from torchem.runtime import memory

# of views and directions, compared at once
COSINES = {"cpu": 2**24, "cuda": 2**26}


@dataclass
class Sampling:
    """The sampling of one iteration, RELION's sampling file in short.

    Attributes
    ----------
    healpix_order
        order of the HEALPix grid of directions, 12·4^order in all (3D references).
    psi_step
        degrees; 360 / (6·2^order) for 3D references.
    offset_range, offset_step
        Å: coarse translations are the multiples of the step within the range.
    perturb, perturbation
        strength of the random perturbation and its present value q (history-dependent), in grid steps.
    """

    symmetry: str
    offset_range: float
    offset_step: float
    ndim: int = 3
    healpix_order: int = 2
    psi_step: float = field(default=0.0)
    oversampling: int = 1
    perturb: float = 0.5
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        if self.ndim == 3:
            self.psi_step = 360.0 / (6 * 2**self.healpix_order)

    @property
    def angular_step(self) -> float:
        """Coarse angular step, degrees."""
        return self.psi_step

    @property
    def fine_angular_step(self) -> float:
        """Angular step of the children, degrees."""
        return self.psi_step / 2**self.oversampling

    @property
    def fine_offset_step(self) -> float:
        """Step of the child translations, Å."""
        return self.offset_step / 2**self.oversampling

    def perturb_again(self, generator: torch.Generator) -> None:
        """Draw a new perturbation: q + U(f/2, f) wrapped to [-f, f], f being its strength."""
        if self.perturb > 0:
            draw = float(torch.rand((), generator=generator, dtype=torch.float64))
            q = self.perturbation + self.perturb * (0.5 + 0.5 * draw)
            self.perturbation = q - 2 * self.perturb if q > self.perturb else q


class Grid:
    """All samples of a :class:`Sampling` on one device, in double precision.

    Attributes
    ----------
    rot, tilt
        `(d,)` degrees: the directions of the asymmetric unit, unperturbed (3D).
    views
        `(d, 3)` unit vectors along them.
    psi
        `(n_psi,)` degrees.
    translations
        `(t, 2)` Å, x and y, unperturbed.
    n_orientations, orientation_children, translation_children
        R, 8^o (2^o for 2D references), 4^o.
    """

    def __init__(self, sampling: Sampling, device: torch.device | str = "cpu") -> None:
        self.sampling, self.device = sampling, torch.device(device)
        n_psi = round(360.0 / sampling.psi_step)
        if sampling.ndim == 3:
            self.pixels = torch.from_numpy(asymmetric_directions(sampling.symmetry, sampling.healpix_order))
            self.rot, self.tilt = self._angles(sampling.healpix_order, self.pixels)
            child_angles = self._angles(
                sampling.healpix_order + sampling.oversampling,
                self.pixels[:, None] * 4**sampling.oversampling + torch.arange(4**sampling.oversampling),
            )
        else:
            self.pixels = torch.zeros(1, dtype=torch.int64)
            self.rot = self.tilt = torch.zeros(1, dtype=torch.float64, device=self.device)
            child_angles = self.rot[:, None], self.tilt[:, None]
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        # an orientation is a turn within the plane after one to its direction
        self._directions = rotation_matrix(self.rot, self.tilt, zero)
        self._child_directions = rotation_matrix(*child_angles, zero)
        # of the directions themselves; what is perturbed is compared with them
        self.views = self._directions[:, 2].contiguous()
        self.psi = torch.arange(n_psi, dtype=torch.float64, device=self.device) * (360.0 / n_psi)
        n_child_psi = 2**sampling.oversampling
        parts = torch.arange(n_child_psi, dtype=torch.float64, device=self.device)
        self.child_psi = self.psi[:, None] + (360.0 / n_psi) * ((parts + 0.5) / n_child_psi - 0.5)
        self._turns = rotation_matrix(zero, zero, self.psi)
        self._child_turns = rotation_matrix(zero, zero, self.child_psi)
        self.translations = disc(sampling.offset_range, sampling.offset_step, self.device)
        quarter = sampling.offset_step * ((parts + 0.5) / n_child_psi - 0.5)
        children = torch.cartesian_prod(quarter, quarter).reshape(-1, 2)
        self.child_translations = self.translations[:, None] + children

    @property
    def n_directions(self) -> int:
        return len(self.pixels)

    @property
    def n_psi(self) -> int:
        return len(self.psi)

    @property
    def n_orientations(self) -> int:
        return self.n_directions * self.n_psi

    @property
    def n_translations(self) -> int:
        return len(self.translations)

    @property
    def orientation_children(self) -> int:
        return self._child_directions.shape[1] * self.child_psi.shape[1]

    @property
    def translation_children(self) -> int:
        return self.child_translations.shape[1]

    def matrices(self, orientations: Tensor) -> Tensor:
        """Perturbed rotation matrices `(m, 3, 3)` of coarse orientations `(m,)` (numbers within one class)."""
        return self._perturbed(self._directions[orientations // self.n_psi], self._turns[orientations % self.n_psi])

    def child_matrices(self, children: Tensor) -> Tensor:
        """Perturbed matrices `(m, 3, 3)` of fine orientations `(m,)`, numbered orientation · children + child."""
        n_child_psi = self.child_psi.shape[1]
        orientation, child = children // self.orientation_children, children % self.orientation_children
        return self._perturbed(
            self._child_directions[orientation // self.n_psi, child // n_child_psi],
            self._child_turns[orientation % self.n_psi, child % n_child_psi],
        )

    def coarse_shifts(self) -> Tensor:
        """`(t, 2)` Å: the perturbed coarse translations."""
        return self.translations + self.sampling.perturbation * self.sampling.offset_step

    def fine_shifts(self) -> Tensor:
        """`(t, 4^o, 2)` Å: the perturbed child translations."""
        return self.child_translations + self.sampling.perturbation * self.sampling.offset_step

    def local_orientations(
        self, euler: Tensor, sigma: float, operators: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The orientations within 3 sigma of the last poses or their symmetry mates, with Gaussian log priors.

        The priors of direction and psi are cut strictly below 3 sigma and normalised over what was kept, the nearest
        sample alone if nothing was. (RELION compares psi with the last pose's even where a direction is near one of
        its mates, so that a particle cannot cross the border of the asymmetric unit; here it can.)

        Parameters
        ----------
        euler
            `(n, 3)` degrees, double.
        sigma
            degrees.
        operators
            `(g, 3, 3)`.

        Returns
        -------
        particle `(m,)`, ascending; orientation `(m,)`, ascending for each particle; log prior `(m,)`.
        """
        n, at_once = len(euler), max(1, COSINES[self.device.type] // (len(operators) * self.n_directions))
        found = []
        for begin in range(0, n, at_once):
            with memory.scope("chunk"):
                some = self._near(euler[begin : begin + at_once], sigma, operators)
                some[0].add_(begin)
                found.append(memory.keep(some, "batch"))
                del some
        particle, direction, cosine, psi = (torch.cat(part) for part in zip(*found, strict=True))
        distance = torch.rad2deg(torch.acos(cosine.clamp_(-1, 1)))
        log_prior = -0.5 * (distance / sigma) ** 2
        _, log_total = row_logsumexp(log_prior, particle, n)
        log_prior -= log_total[particle]

        # the psi angles around each of these poses
        step = 360.0 / self.n_psi
        reach = min(math.ceil(3 * sigma / step), (self.n_psi - 1) // 2)
        index = torch.round(psi / step)[:, None] + torch.arange(-reach, reach + 1, device=self.device)
        turn = index * step - psi[:, None]  # (m, window)
        near = turn.abs() < 3 * sigma
        near[:, reach] = True  # the nearest
        psi_prior = torch.where(near, -0.5 * (turn / sigma) ** 2, -torch.inf)
        psi_prior = psi_prior - torch.logsumexp(psi_prior, dim=1, keepdim=True)
        row, column = torch.nonzero(near, as_tuple=True)
        orientation = direction[row] * self.n_psi + index[row, column].long() % self.n_psi
        log_prior = log_prior[row] + psi_prior[row, column]
        # two mates may share a sample where sigma is wide
        key, inverse = torch.unique(particle[row] * self.n_orientations + orientation, return_inverse=True)
        prior = torch.zeros_like(key, dtype=log_prior.dtype).index_add_(0, inverse, log_prior.exp_())
        return key // self.n_orientations, key % self.n_orientations, prior.log_()

    def _near(self, euler: Tensor, sigma: float, operators: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Poses, directions within 3 sigma of them or a mate (or the nearest), cosines of the angles, mates' psi."""
        d = self.n_directions
        # an angle within 3 sigma is a cosine above this one
        bound = math.cos(math.radians(3 * sigma)) if 3 * sigma < 180 else -2.0
        all_operators = operators.to(euler).transpose(0, 1).flatten(1)  # (3, g·3)
        poses = rotation_matrix(*euler.unbind(1))  # (m, 3, 3)
        mates = (poses.flatten(0, 1) @ all_operators).view(len(poses), 3, -1, 3).transpose(1, 2)  # (m, g, 3, 3)
        cosine = (mates[:, :, 2].reshape(-1, 3) @ self.views.T).view(len(poses), -1)  # (m, g·d)
        near = (cosine > bound).scatter_(1, cosine.argmax(1, keepdim=True), True)
        pose, sample = torch.nonzero(near, as_tuple=True)
        return pose, sample % d, cosine[pose, sample], psi_angle(mates)[pose, sample // d]

    def _angles(self, order: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
        colatitude, longitude = healpix.pix2ang(2**order, pixels.numpy(), nest=True)
        rot = (np.rad2deg(longitude) + 180.0) % 360.0 - 180.0
        return torch.from_numpy(rot).to(self.device), torch.from_numpy(np.rad2deg(colatitude)).to(self.device)

    def _perturbed(self, directions: Tensor, turns: Tensor) -> Tensor:
        omega = self.sampling.perturbation * self.sampling.angular_step
        # no batch of products of 3 × 3, which takes a GPU ten times as long
        matrices = (turns[..., None] * directions[..., None, :, :]).sum(-2)
        if omega == 0:
            return matrices
        return (matrices.view(-1, 3) @ _equal_turns(omega, self.sampling.ndim, self.device)).view_as(matrices)


def disc(radius: float, step: float, device: torch.device | str = "cpu") -> Tensor:
    """`(t, 2)`: the points of a square grid around 0 that lie within a radius; double."""
    reach = math.ceil(radius / step)
    axis = torch.arange(-reach, reach + 1, dtype=torch.float64, device=device) * step
    points = torch.cartesian_prod(axis, axis)
    return points[(points**2).sum(1) < radius**2 + 0.001]


@lru_cache(maxsize=2)
def _equal_turns(degrees: float, ndim: int, device: torch.device) -> Tensor:
    """`(3, 3)`: all angles that there are of so many degrees (kept: all slices of an iteration are turned so)."""
    psi = torch.tensor(degrees, dtype=torch.float64)
    other = psi if ndim == 3 else torch.zeros_like(psi)
    return memory.keep(rotation_matrix(other, other, psi).to(device), "run")
