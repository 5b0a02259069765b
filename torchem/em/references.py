"""The K references of an iteration, and their slices at the orientations of its grid."""

import torch
from torch import Tensor

from torchem.em.images import ImageGeometry
from torchem.em.sampling import Grid
from torchem.imaging.projection import fourier_volume
from torchem.ops.slices import Slices, kernels_serve
from torchem.runtime import memory


def fourier_volumes(maps: Tensor, r_max: int, padding: int) -> Tensor:
    """The Fourier volume of each map, `(k, …)`, for an iteration."""
    with memory.scope("chunk"):
        return memory.keep(torch.stack([fourier_volume(m, r_max, padding) for m in maps]), "iteration")


class References:
    """Fourier volumes of one half's references; orientations are numbered class-major.

    Parameters
    ----------
    maps
        `(k, L, L, L)` or `(k, L, L)`.
    r_max
        pixels: half the ``current_size``.
    volumes
        what :func:`fourier_volumes` made of the maps; None: they are made here.
    """

    def __init__(self, maps: Tensor, grid: Grid, r_max: int, padding: int, volumes: Tensor | None = None) -> None:
        self.grid, self.r_max, self.padding, self.dtype = grid, r_max, padding, maps.dtype
        self.volumes = fourier_volumes(maps, r_max, padding) if volumes is None else volumes

    def slices(
        self, geometry: ImageGeometry, orientations: Tensor, n_pixels: int, fine: bool, r_max: int | None = None
    ) -> Slices:
        """Slices at coarse or fine orientations.

        Parameters
        ----------
        orientations
            `(u,)` numbers of coarse or fine orientations.
        n_pixels
            of the geometry's list, from its start.
        r_max
            pixels: what lies beyond is 0; the volumes' own if not given.
        """
        per_class = self.grid.n_orientations * (self.grid.orientation_children if fine else 1)
        matrices = self.grid.child_matrices if fine else self.grid.matrices
        return Slices(
            self.volumes, orientations // per_class, matrices(orientations % per_class).to(self.dtype),
            geometry.kx[:n_pixels], geometry.ky[:n_pixels], self.padding,
            self.r_max if r_max is None else min(r_max, self.r_max),
        )  # fmt: skip

    def slices_of(
        self, geometry: ImageGeometry, orientations: Tensor, n_pixels: int, fine: bool, r_max: int | None = None
    ) -> tuple[Slices, Tensor]:
        """Slices at orientations that may come several times, and `(m,)` which slice belongs to each.

        Each is there once, but for kernels, which cut them anew for every pair.
        """
        if kernels_serve(self.volumes):
            which = torch.arange(len(orientations), device=orientations.device)
        else:
            orientations, which = torch.unique(orientations, return_inverse=True)
        return self.slices(geometry, orientations, n_pixels, fine, r_max), which
