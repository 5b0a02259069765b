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
COSINES = 2**24


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
            self.child_rot, self.child_tilt = self._angles(
                sampling.healpix_order + sampling.oversampling,
                self.pixels[:, None] * 4**sampling.oversampling + torch.arange(4**sampling.oversampling),
            )
        else:
            self.pixels = torch.zeros(1, dtype=torch.int64)
            self.rot = self.tilt = torch.zeros(1, dtype=torch.float64, device=self.device)
            self.child_rot = self.child_tilt = torch.zeros((1, 1), dtype=torch.float64, device=self.device)
        # of the directions themselves; what is perturbed is compared with them
        self.views = rotation_matrix(self.rot, self.tilt, torch.zeros_like(self.rot))[:, 2].contiguous()
        self.psi = torch.arange(n_psi, dtype=torch.float64, device=self.device) * (360.0 / n_psi)
        n_child_psi = 2**sampling.oversampling
        parts = torch.arange(n_child_psi, dtype=torch.float64, device=self.device)
        self.child_psi = self.psi[:, None] + (360.0 / n_psi) * ((parts + 0.5) / n_child_psi - 0.5)
        self.translations = self._disc(sampling.offset_range, sampling.offset_step)
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
        return self.child_rot.shape[1] * self.child_psi.shape[1]

    @property
    def translation_children(self) -> int:
        return self.child_translations.shape[1]

    def matrices(self, orientations: Tensor) -> Tensor:
        """Perturbed rotation matrices `(m, 3, 3)` of coarse orientations `(m,)` (numbers within one class)."""
        direction, psi = orientations // self.n_psi, orientations % self.n_psi
        return self._perturbed(self.rot[direction], self.tilt[direction], self.psi[psi])

    def child_matrices(self, children: Tensor) -> Tensor:
        """Perturbed matrices `(m, 3, 3)` of fine orientations `(m,)`, numbered orientation · children + child."""
        n_child_psi = self.child_psi.shape[1]
        orientation, child = children // self.orientation_children, children % self.orientation_children
        direction, psi = orientation // self.n_psi, orientation % self.n_psi
        return self._perturbed(
            self.child_rot[direction, child // n_child_psi],
            self.child_tilt[direction, child // n_child_psi],
            self.child_psi[psi, child % n_child_psi],
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
        n = len(euler)
        poses = rotation_matrix(*euler.unbind(1))  # (n, 3, 3)
        # an angle within 3 sigma is a cosine above this one
        bound = math.cos(math.radians(3 * sigma)) if 3 * sigma < 180 else -2.0
        nearest = torch.full((n,), -2.0, dtype=torch.float64, device=self.device)
        alone = torch.zeros((3, n), dtype=torch.float64, device=self.device)  # direction, cosine, psi of the nearest
        found: list[tuple[Tensor, ...]] = []
        for some in operators.to(poses).split(max(1, COSINES // (n * len(self.views)))):
            mates = (poses.flatten(0, 1) @ some.transpose(0, 1).flatten(1)).view(n, 3, -1, 3).transpose(1, 2)
            mates = mates.flatten(0, 1)
            cosine = mates[:, 2] @ self.views.T  # (n·g, d)
            psi = psi_angle(mates)
            mate, direction = torch.nonzero(cosine > bound, as_tuple=True)
            found.append((mate // len(some), direction, cosine[mate, direction], psi[mate]))
            best = cosine.max(1)
            closest = best.values.view(n, -1).max(1)
            mate = torch.arange(n, device=self.device) * len(some) + closest.indices
            candidate = torch.stack((best.indices[mate].double(), closest.values, psi[mate]))
            alone = torch.where(closest.values > nearest, candidate, alone)
            nearest = torch.maximum(nearest, closest.values)
        lonely = torch.nonzero(nearest <= bound)[:, 0]
        found.append((lonely, alone[0, lonely].long(), alone[1, lonely], alone[2, lonely]))
        particle, direction, cosine, psi = (torch.cat(part) for part in zip(*found, strict=True))
        distance = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
        log_prior = -0.5 * (distance / sigma) ** 2
        _, log_total = row_logsumexp(log_prior, particle, n)
        log_prior -= log_total[particle]

        # the psi angles around each of these poses
        step = 360.0 / self.n_psi
        reach = min(math.ceil(3 * sigma / step), (self.n_psi - 1) // 2)
        index = torch.round(psi / step)[:, None] + torch.arange(-reach, reach + 1, device=self.device)
        turn = index * step - psi[:, None]  # (m, window)
        near = turn.abs() < 3 * sigma
        near[:, reach] |= ~near.any(1)
        psi_prior = torch.where(near, -0.5 * (turn / sigma) ** 2, -torch.inf)
        psi_prior = psi_prior - torch.logsumexp(psi_prior, dim=1, keepdim=True)
        row, column = torch.nonzero(near, as_tuple=True)
        orientation = direction[row] * self.n_psi + index[row, column].long() % self.n_psi
        log_prior = log_prior[row] + psi_prior[row, column]
        # two mates may share a sample where sigma is wide
        key, inverse = torch.unique(particle[row] * self.n_orientations + orientation, return_inverse=True)
        _, log_prior = row_logsumexp(log_prior, inverse, len(key))
        return key // self.n_orientations, key % self.n_orientations, log_prior

    def _angles(self, order: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
        colatitude, longitude = healpix.pix2ang(2**order, pixels.numpy(), nest=True)
        rot = (np.rad2deg(longitude) + 180.0) % 360.0 - 180.0
        return torch.from_numpy(rot).to(self.device), torch.from_numpy(np.rad2deg(colatitude)).to(self.device)

    def _perturbed(self, rot: Tensor, tilt: Tensor, psi: Tensor) -> Tensor:
        omega = self.sampling.perturbation * self.sampling.angular_step
        if self.sampling.ndim == 2:
            return rotation_matrix(rot, tilt, psi + omega)
        matrices = rotation_matrix(rot, tilt, psi)
        if omega == 0:
            return matrices
        # one product: a batch of products of 3 × 3 takes a GPU ten times as long
        return (matrices.reshape(-1, 3) @ _equal_turns(omega, self.device)).view_as(matrices)

    def _disc(self, radius: float, step: float) -> Tensor:
        reach = math.ceil(radius / step)
        axis = torch.arange(-reach, reach + 1, dtype=torch.float64, device=self.device) * step
        points = torch.cartesian_prod(axis, axis)
        return points[(points**2).sum(1) < radius**2 + 0.001]


@lru_cache(maxsize=2)
def _equal_turns(degrees: float, device: torch.device) -> Tensor:
    """`(3, 3)`: rot, tilt and psi of so many degrees (kept: all slices of an iteration are turned so)."""
    turn = torch.tensor(degrees, dtype=torch.float64)
    return memory.keep(rotation_matrix(turn, turn, turn).to(device), "run")
