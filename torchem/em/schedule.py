"""What the next iteration does: image sizes, resolution, accuracy of alignment, finer sampling, convergence.

All of it is RELION's auto-refinement; the numbers are its constants. Resolutions are shells of the box of L pixels of
a Å: shell s is L·a/s Å.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchem.em.images import ImageGeometry
from torchem.em.model import State
from torchem.em.sampling import Sampling
from torchem.imaging.fourier import round_half_away, squared_magnitude
from torchem.imaging.symmetry import axes_distance, rotation_matrix
from torchem.ops.slices import Slices

MINIMUM_RESOLUTION_GAIN = 0.0001  # 1/Å
MINIMUM_RESOLUTION_SHELL = 5
# -log 0.01: the difference of two projections that tells one pose from another
ACCURACY_THRESHOLD = 4.60517
ACCURACY_PARTICLES = 100
# of the translations' range
MOST_STEPS = 4
# pixels of all errors and particles that are tried at once
TRIALS = {"cpu": 2**22, "cuda": 2**23}


def image_sizes(state: State, box: int, pixel_size: float, particle_diameter: float, resolution: float) -> None:
    """Set ``current_size`` and ``coarse_size``, with the sampling of the previous iteration.

    Parameters
    ----------
    resolution
        Å: the current one; in the first iteration that of the initial reference.
    """
    shell = round_half_away(box * pixel_size / resolution)
    if state.halves[0].average_pmax > 0.1 and state.has_high_fsc:
        increment = round_half_away(0.25 * box / 2)
    else:
        increment = state.size_increment
    state.current_size = box if state.converged else 2 * min(box // 2, shell + increment)
    state.coarse_size = coarse_size(state.sampling, box, pixel_size, particle_diameter, state.current_size)


def coarse_size(sampling: Sampling, box: int, pixel_size: float, particle_diameter: float, current_size: int) -> int:
    """Fourier pixels that tell orientations one coarse step apart: 2⌈1.2·L·a/(π·D·Δ/360)⌉ (2D: 1.5 for 1.2)."""
    steps_around = 360.0 / sampling.angular_step
    safety = 1.2 if sampling.ndim == 3 else 1.5
    # a step moves the particle's edge by π·D·Δ/360
    shell = safety * box * pixel_size * steps_around / (torch.pi * particle_diameter)
    return min(current_size, 2 * int(-(-shell // 1)))


def size_after_fsc(state: State, fsc: Tensor) -> None:
    """Let the next sizes grow faster once the FSC says that there is more: ``size_increment``, ``has_high_fsc``."""

    values = fsc.tolist()

    def first_below(threshold: float) -> int:
        return next((shell for shell, value in enumerate(values) if value < threshold), len(values) - 1)

    state.size_increment = max(state.size_increment, first_below(0.143) - first_below(0.5) + 5)
    edge = state.current_size // 2 - 1
    state.has_high_fsc = state.has_high_fsc or values[edge] > 0.2


def resolution_shell(data_vs_prior: Tensor) -> int:
    """The last shell in which the data outweigh the prior, over classes `(k, s)`.

    The shell before the first ratio below 1; if some shell more than 3 beyond it is above 1, the highest such one.
    """
    best = 0
    for *ratios, _ in data_vs_prior.tolist():
        shell = next((s for s, ratio in enumerate(ratios[1:]) if ratio < 1), len(ratios) - 1)
        highest = max((s for s, ratio in enumerate(ratios) if ratio > 1), default=0)
        best = max(best, highest if highest > shell + 3 else shell)
    return max(best, MINIMUM_RESOLUTION_SHELL)


def update_resolution(state: State, shell: int, box: int, pixel_size: float) -> None:
    """Set the current resolution and count the iterations that brought no gain."""
    state.current_resolution = box * pixel_size / shell
    frequency = 1 / state.current_resolution
    if frequency <= state.best_resolution + MINIMUM_RESOLUTION_GAIN:
        state.iterations_without_gain += 1
    else:
        state.iterations_without_gain = 0
    state.best_resolution = max(state.best_resolution, frequency)


def update_changes(state: State, old_euler: Tensor, old_offsets: Tensor, operators: Tensor) -> None:
    """Measure how much the poses moved and count the iterations in which they did not move less.

    Less than 0.4 of a coarse step is no move. (RELION's source names the fine step; its own runs go on to a finer grid
    after two iterations on each, as they do by the coarse step and cannot by the fine one.)
    """
    poses = torch.stack((old_euler, state.poses.euler)).to(operators.device)
    before, now = rotation_matrix(*poses.unbind(2))
    state.change_angles = float(axes_distance(before, now, operators).mean())
    moved = (state.poses.offset_angst - old_offsets).square().sum(1).mean()
    state.change_offsets = float((moved / 2).sqrt())
    settled = [
        change < 0.4 * step or 1.03 * change >= smallest
        for change, step, smallest in (
            (state.change_offsets, state.sampling.offset_step, state.smallest_change_offsets),
            (state.change_angles, state.sampling.angular_step, state.smallest_change_angles),
        )
    ]
    state.iterations_without_change = state.iterations_without_change + 1 if all(settled) else 0
    state.smallest_change_offsets = min(state.smallest_change_offsets, state.change_offsets)
    state.smallest_change_angles = min(state.smallest_change_angles, state.change_angles)


def update_sampling(state: State, local_healpix_order: int) -> None:
    """Go to a finer grid when neither resolution nor poses get better; note when it is fine enough."""
    if state.iterations_without_gain < 1 or state.iterations_without_change < 1:
        return
    sampling = state.sampling
    if sampling.fine_angular_step < 0.75 * state.accuracy_angles:
        state.fine_enough = True
        return
    old_step, old_range = sampling.offset_step, sampling.offset_range
    step = min(1.5, 0.75 * state.accuracy_offsets) * 2**sampling.oversampling
    reach = max(min(5 * state.change_offsets, 1.3 * old_range), 1.5 * step)
    if reach > MOST_STEPS * step:
        reach /= 2
    if reach > MOST_STEPS * step:
        step = reach / MOST_STEPS
    if step > old_step:
        step, reach = old_step, old_range
    state.sampling = Sampling(
        symmetry=sampling.symmetry, offset_range=reach, offset_step=step, ndim=sampling.ndim,
        healpix_order=sampling.healpix_order + 1, oversampling=sampling.oversampling,
        perturb=sampling.perturb, perturbation=sampling.perturbation,
    )  # fmt: skip
    if state.local_sigma is not None or state.sampling.healpix_order >= local_healpix_order:
        state.local_sigma = state.sampling.angular_step
    state.iterations_without_gain = state.iterations_without_change = 0
    state.smallest_change_angles = state.smallest_change_offsets = 999.0


def has_converged(state: State) -> bool:
    """Whether the next iteration is the last: the grid is fine enough and nothing gets better."""
    return state.fine_enough and state.iterations_without_gain >= 1 and state.iterations_without_change >= 1


def estimate_accuracy(
    volumes: Tensor, geometry: ImageGeometry, ctf: Tensor, inverse_sigma2: Tensor, euler: Tensor,
    class_number: Tensor, r_max: int, padding: int, box: int, generator: torch.Generator,
) -> tuple[float, float, Tensor]:  # fmt: skip
    """The smallest errors of angle (degrees) and shift (Å) that the data could tell.

    A growing error is put into one angle or one coordinate of each particle's pose, until
    Σ |C·P₁ − C·P₂|²/(2σ²) exceeds -log 0.01; the mean over the particles.

    Parameters
    ----------
    volumes
        `(k, …)` Fourier volumes of the references.
    ctf
        `(n, p)` of the particles to try.
    inverse_sigma2
        `(p,)`.
    euler, class_number
        `(n, 3)` degrees, `(n,)`.

    Returns
    -------
    angle, shift, and `(box//2 + 1,)` the share of each shell in telling the angles apart (all 0 if none does).
    """
    n, device, dtype = len(ctf), ctf.device, volumes.dtype.to_real()
    weight = ctf.square() * inverse_sigma2
    weight[:, 0] = 0

    def slices(angles: Tensor) -> Tensor:
        """`(e, n, 3)` to `(e, n, p)`."""
        matrices = rotation_matrix(*angles.flatten(0, 1).unbind(1)).to(dtype)
        classes = class_number.repeat(len(angles))
        return Slices(volumes, classes, matrices, geometry.kx, geometry.ky, padding, r_max).cut().unflatten(0, (-1, n))

    def first_error(errors: list[float], difference: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        found = torch.full((n,), errors[-1], dtype=torch.float64, device=device)
        missing = torch.ones(n, dtype=torch.bool, device=device)
        by_shell = torch.zeros(box // 2 + 1, dtype=torch.float64, device=device)
        at_once = max(1, TRIALS[device.type] // weight.numel())
        for some in torch.tensor(errors, dtype=torch.float64, device=device).split(at_once):
            differences = (difference(some[:, None, None]) * weight).double() / 2  # (e, n, p)
            distinct = differences.sum(2) > ACCURACY_THRESHOLD
            first = (distinct & (distinct.cumsum(0) == 1) & missing).double()
            found = torch.where(first.any(0), some @ first, found)
            # shells of the reference, whatever box the images have
            by_shell.index_add_(0, geometry.shell, first.flatten() @ differences.flatten(0, 1))
            missing &= ~distinct.any(0)
            if not bool(missing.any()):
                break
        return found.mean(), by_shell / by_shell.sum().clamp(min=1e-300)

    n_angles = 3 if volumes.ndim == 4 else 1
    axis = torch.randint(n_angles, (n,), generator=generator).to(device) + (3 - n_angles)
    coordinate = torch.randint(2, (n,), generator=generator).to(device)
    true = slices(euler[None])
    turn = axis[:, None] == torch.arange(3, device=device)
    k = torch.where(coordinate[:, None] == 0, geometry.pixels.kx, geometry.pixels.ky)[:, : geometry.n_pixels]
    half_phase, power = k.double() * (torch.pi / geometry.optics.box), 4 * squared_magnitude(true)

    def turned(error: Tensor) -> Tensor:
        return squared_magnitude(true - slices(euler + error * turn))

    def shifted(error: Tensor) -> Tensor:
        # |1 - exp(iφ)|² = 4 sin²(φ/2)
        return power * torch.sin(error * half_phase).square_().to(dtype)

    angle_steps = ((0.2, 0.05), (1, 0.1), (2, 0.2), (5, 0.5), (10, 1), (20, 2), (30, 5))
    shift_steps = ((1, 0.1), (2, 0.2), (5, 0.5), (10, 1))
    angles, by_shell = first_error(_growing(angle_steps), turned)
    shift, _ = first_error(_growing(shift_steps), shifted)
    found = torch.cat((torch.stack((angles, shift * geometry.optics.pixel_size)), by_shell)).cpu()
    return float(found[0]), float(found[1]), found[2:].clone()


def _growing(steps: tuple[tuple[float, float], ...]) -> list[float]:
    """Errors to try: steps of each size up to each bound, the last bound included."""
    errors, error = [], 0.0
    for bound, step in steps:
        while error < bound - 1e-9:
            error += step
            errors.append(error)
    return errors
