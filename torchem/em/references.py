"""The K references of an iteration, cut into slices at the orientations of its grid."""

import torch
from torch import Tensor

from torchem.em.images import ImageGeometry
from torchem.em.sampling import Grid
from torchem.imaging.projection import fourier_volume
from torchem.ops.slices import project


class References:
    """Fourier volumes of one half's references, and their slices; orientations are numbered class-major.

    Parameters
    ----------
    maps
        `(k, L, L, L)` or `(k, L, L)`.
    r_max
        pixels: half the ``current_size``.
    """

    def __init__(self, maps: Tensor, grid: Grid, r_max: int, padding: int) -> None:
        self.grid, self.r_max, self.padding, self.dtype = grid, r_max, padding, maps.dtype
        self.volumes = [fourier_volume(m, r_max, padding) for m in maps]

    def __len__(self) -> int:
        return len(self.volumes)

    def slices(
        self, geometry: ImageGeometry, orientations: Tensor, n_pixels: int, fine: bool, r_max: int | None = None
    ) -> Tensor:
        """Slices of orientations in ascending order.

        Parameters
        ----------
        orientations
            `(u,)` numbers of coarse or fine orientations.
        n_pixels
            of the geometry's list, from its start.
        r_max
            pixels: what lies beyond is 0; the volumes' own if not given.

        Returns
        -------
        `(u, n_pixels)` complex.
        """
        per_class = self.grid.n_orientations * (self.grid.orientation_children if fine else 1)
        matrices = self.grid.child_matrices if fine else self.grid.matrices
        r_max = self.r_max if r_max is None else min(r_max, self.r_max)
        ends = torch.searchsorted(
            orientations, torch.arange(len(self) + 1, device=orientations.device) * per_class
        ).tolist()
        parts = [
            project(
                volume, matrices(orientations[start:end] % per_class).to(self.dtype),
                geometry.kx[:n_pixels], geometry.ky[:n_pixels], self.padding, r_max,
            )
            for volume, start, end in zip(self.volumes, ends[:-1], ends[1:], strict=True)
            if end > start
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)
