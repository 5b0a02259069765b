"""What a refinement knows before its first iteration (Scheres 2012; RELION's defaults)."""

import numpy as np
import torch
from torch import Tensor

from torchem.data.particles import Particles
from torchem.em.images import ParticleImages, estimate_noise
from torchem.em.model import Model, Poses, State
from torchem.em.options import RefineOptions
from torchem.em.sampling import Grid, Sampling
from torchem.errors import InputError
from torchem.imaging.fourier import half_transform, inverse_half_transform
from torchem.imaging.resolution import raised_cosine_lowpass
from torchem.imaging.symmetry import canonical


def initial_state(
    options: RefineOptions, particles: Particles, images: ParticleImages, reference: Tensor, particle_diameter: float
) -> State:
    """Halves, noise spectra, low-passed reference, flat priors, and the sampling to start with.

    Parameters
    ----------
    reference
        `(L, L, L)` at box and pixel size of the particles' first optics group, on the device of the run.
    particle_diameter
        Å.

    Raises
    ------
    InputError
        All particles are in one half.
    """
    sampling, pixel_size = options.sampling, particles.optics[0].pixel_size
    generator = torch.Generator().manual_seed(options.seed)
    first_sampling = Sampling(
        symmetry=canonical(options.dataset.symmetry or "C1"),
        offset_range=sampling.offset_range * pixel_size,
        offset_step=sampling.offset_step * pixel_size,
        healpix_order=sampling.healpix_order,
        oversampling=sampling.oversampling,
        perturb=sampling.perturb,
    )
    origins = torch.tensor(particles.origin_angst)
    noise = [
        estimate_noise(
            images, np.flatnonzero(particles.optics_group == group), optics,
            particle_diameter if options.zero_mask else None, origins,
        )
        for group, optics in enumerate(particles.optics)
    ]  # fmt: skip
    local = sampling.starts_locally(particles.has_poses)
    filtered = low_pass(reference, pixel_size, options.reference.ini_high)
    n_directions = Grid(first_sampling).n_directions
    return State(
        halves=[
            Model.initial(filtered[None], [s.clone() for s in noise], n_directions, len(particles.group_names))
            for _ in range(2)
        ],
        sampling=first_sampling,
        poses=Poses.initial(torch.tensor(particles.euler), origins, torch.tensor(particles.norm_correction)),
        subset=_halves(particles, generator),
        generator=generator,
        orientability=torch.zeros(len(reference) // 2 + 1, dtype=torch.float64),
        local_sigma=(sampling.sigma_ang or first_sampling.angular_step) if local else None,
    )


def low_pass(map_: Tensor, pixel_size: float, resolution: float) -> Tensor:
    """A map `(L, L, L)` without what is finer than a resolution in Å; the edge is 2 Fourier pixels wide."""
    box = map_.shape[0]
    curve = raised_cosine_lowpass(box, pixel_size, resolution, dtype=map_.dtype, device=map_.device)
    return inverse_half_transform(half_transform(map_, 3) * curve, box, 3)


def _halves(particles: Particles, generator: torch.Generator) -> Tensor:
    """`(n,)` 0 or 1: the given random subsets, or a coin for each particle."""
    given = particles.random_subset
    n = len(particles)
    subset = torch.randint(2, (n,), generator=generator) if given is None else torch.tensor(given) - 1
    if given is None and len(subset.unique()) < 2:
        subset[-1] = 1 - subset[-1]  # of few particles all may fall on one side
    if len(subset.unique()) < 2:
        raise InputError(
            f"{particles.source}: all {n} particles are in one half; remove the column rlnRandomSubset, "
            "or take more particles"
        )
    return subset
