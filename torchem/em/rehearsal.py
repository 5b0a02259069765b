"""A refinement of next to nothing, beside reading the real data: a GPU loads every kernel at its first use."""

import torch

from torchem.em.expectation import Expectation, ExpectationSettings
from torchem.em.images import ImageGeometry, prepare_images
from torchem.em.maximization import update_halves, update_parameters
from torchem.em.model import Model
from torchem.em.sampling import Grid, Sampling
from torchem.imaging.ctf import Optics
from torchem.imaging.fourier import squared_magnitude
from torchem.imaging.masks import soft_sphere
from torchem.imaging.symmetry import operators

BOX, PARTICLES, PADDING = 32, 16, 2
# Σ|C·P/σ|² of what a run passes through: correlation, flat weights at all orientations, few at some, local
STRENGTHS = (300.0, 1e-3, 300.0, 2000.0)


def rehearse(device: torch.device) -> None:
    """Run E-steps as the first ones of a refinement and as local ones are, and an M-step, in single precision."""
    symmetry = torch.from_numpy(operators("C2")).to(device)
    optics = Optics("rehearsal", 300.0, 2.7, 0.1, 4.0, BOX)
    ball = soft_sphere(BOX, BOX / 5, device=device)
    half = ball.roll((3, 1, 2), (0, 1, 2)) - ball
    images = half.sum(0).expand(PARTICLES, -1, -1)
    defocus = torch.tensor([15000.0, 15000.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=device)
    zero = torch.zeros((PARTICLES, 3), dtype=torch.float64, device=device)
    geometry = ImageGeometry.of(optics, BOX - 4, BOX, optics.pixel_size, torch.float32, device)
    batch = prepare_images(
        images, torch.arange(PARTICLES, device=device), geometry, defocus.expand(PARTICLES, -1),
        torch.ones(PARTICLES, device=device), zero[:, :2], 0.8 * BOX * optics.pixel_size, None, 0,
    )  # fmt: skip
    power = squared_magnitude(batch.masked * batch.ctf)[0].sum().double()
    grid = Grid(Sampling("C2", 4.0, 4.0, healpix_order=0, perturbation=0.1), device)
    for number, strength in enumerate(STRENGTHS):
        noise = (power / strength).expand(BOX // 2 + 1).clone()
        models = [Model.initial(half[None], [noise.clone()], grid.n_directions, 2) for _ in range(2)]
        settings = ExpectationSettings(
            current_size=geometry.size, coarse_size=20, cross_correlation=number == 0,
            local_sigma=grid.sampling.angular_step / 2 if number == 3 else None,
        )
        sums = []
        for model in models:
            expectation = Expectation(model, grid, settings, symmetry)
            expectation(batch, 0, torch.arange(PARTICLES, device=device) % 2, zero[:, 0] + 1, zero)
            sums.append(expectation.sums)
    update_halves(
        models, sums, symmetry, PADDING, tau2_fudge=1.0, join_shell=3.0, mask=None, seed=0, last=False
    )  # fmt: skip
    counts = [geometry.pixels.shell_counts()]
    for model, sum_ in zip(models, sums, strict=True):
        update_parameters(model, sum_, counts, norm=True, scale=True, cross_correlation=False)
