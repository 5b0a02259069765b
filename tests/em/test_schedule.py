"""Sizes, resolution, sampling and convergence, with numbers from RELION's own log of beta-galactosidase."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.em import plain_em as em
from torchem.em import schedule
from torchem.em.images import ImageGeometry, modulations
from torchem.em.model import Model, Poses, State
from torchem.em.references import fourier_volumes
from torchem.em.sampling import Sampling
from torchem.imaging.ctf import Optics
from torchem.imaging.symmetry import euler_angles, operators, rotation_matrix

# EMPIAR-10017: 128 px of 1.77 Å, a mask of 200 Å, a reference of 60 Å
BOX, PIXEL, DIAMETER, INI_HIGH = 128, 1.77, 200.0, 60.0


def state(order: int = 2, **values: object) -> State:
    sampling = Sampling("D2", offset_range=5 * PIXEL, offset_step=2 * PIXEL, healpix_order=order)
    flat = torch.zeros(BOX // 2 + 1, dtype=torch.float64)
    model = Model.initial(torch.zeros((1, 4, 4, 4)), [flat], 1, 1)
    poses = Poses.initial(torch.zeros((1, 3)), torch.zeros((1, 2)), torch.ones(1))
    out = State([model], sampling, poses, torch.zeros(1), torch.Generator(), flat)
    for name, value in values.items():
        setattr(out, name, value)
    return out


@pytest.mark.parametrize(
    ("order", "current", "coarse"), [(2, 28, 22), (2, 90, 22), (3, 88, 42), (4, 122, 84), (5, 122, 122), (6, 128, 128)]
)
def test_coarse_size(order: int, current: int, coarse: int) -> None:
    assert schedule.coarse_size(state(order).sampling, BOX, PIXEL, DIAMETER, current) == coarse


def test_coarse_size_of_flat_references() -> None:
    """As in RELION's class2d run of 32 px of 7.08 Å: 2·⌈1.5·226.56·30/(π·200)⌉ = 34, so the current size."""
    flat = Sampling("C1", 9.0, 6.0, ndim=2, psi_step=12.0)
    assert schedule.coarse_size(flat, 32, 7.08, 200.0, 24) == 24
    assert schedule.coarse_size(flat, 32, 7.08, 200.0, 1000) == 34


def test_current_size() -> None:
    s = state()
    schedule.image_sizes(s, BOX, PIXEL, DIAMETER, INI_HIGH)
    assert (s.current_size, s.coarse_size) == (28, 22)
    # shell 20, and 10 more; a quarter of Nyquist more where alignment and FSC are good; never more than the box
    resolution = BOX * PIXEL / 20
    for pmax, high, expected in ((0.5, False, 60), (0.05, True, 60), (0.5, True, 72)):
        s.halves[0].average_pmax, s.has_high_fsc = pmax, high
        schedule.image_sizes(s, BOX, PIXEL, DIAMETER, resolution)
        assert s.current_size == expected
    schedule.image_sizes(s, BOX, PIXEL, DIAMETER, BOX * PIXEL / 60)
    assert s.current_size == BOX
    s.converged = True
    schedule.image_sizes(s, BOX, PIXEL, DIAMETER, 60.0)
    assert s.current_size == BOX


def test_size_after_fsc() -> None:
    s = state(current_size=60)
    fsc = torch.ones(65, dtype=torch.float64)
    fsc[20:33], fsc[33:] = 0.4, 0.1
    schedule.size_after_fsc(s, fsc)
    assert s.size_increment == 33 - 20 + 5
    assert s.has_high_fsc  # 0.4 at shell 29
    fsc[20:], s.current_size = 0.0, 60
    schedule.size_after_fsc(s, fsc)
    assert s.size_increment == 18  # never shrinks
    assert s.has_high_fsc  # for good
    low = state(current_size=60)
    schedule.size_after_fsc(low, fsc)
    assert (low.size_increment, low.has_high_fsc) == (10, False)


def test_resolution_shell() -> None:
    ratio = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 0.9, 2, 0.5, 0.4, 0.3, 0.2]])
    assert schedule.resolution_shell(ratio) == 6
    ratio[0, 10] = 1.1  # more than 3 beyond
    assert schedule.resolution_shell(ratio) == 10
    assert schedule.resolution_shell(torch.full((1, 13), 0.5)) == 5
    assert schedule.resolution_shell(torch.cat((torch.full((1, 13), 0.5), ratio))) == 10


def test_resolution_shell_agrees_with_the_plain_implementation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        ratio = np.exp(rng.normal(0, 1.5, 17) + np.linspace(2.5, -3, 17))
        ratio[-1] = 0  # never the last shell: there is none beyond it
        assert schedule.resolution_shell(torch.from_numpy(ratio)[None]) == em.resolution_shell(ratio)


def test_resolution_gain_is_counted() -> None:
    s = state()
    for shell, without in ((10, 0), (10, 1), (9, 2), (11, 0), (11, 1), (12, 0)):
        schedule.update_resolution(s, shell, BOX, PIXEL)
        assert s.iterations_without_gain == without
        assert s.current_resolution == pytest.approx(BOX * PIXEL / shell)


def test_changes_are_measured_and_counted() -> None:
    group = torch.from_numpy(operators("D2"))
    s = state()
    s.poses = Poses.initial(torch.tensor([[10.0, 20, 30], [0, 90, 5]]).double(), torch.ones((2, 2)), torch.ones(2))
    s.poses.euler, s.poses.offset_angst = s.poses.euler.clone(), torch.tensor([[4.0, 1], [1, 5]]).double()
    old = s.poses.euler + torch.tensor([[0.0, 0, 12], [0, 0, -12]])
    schedule.update_changes(s, old, torch.ones((2, 2)).double(), group)
    # a turn about the view leaves that axis where it is
    assert s.change_angles == pytest.approx(8.0)
    assert s.change_offsets == pytest.approx(np.sqrt((9 + 16) / 4))
    assert s.iterations_without_change == 0
    # the same again is no change any more
    schedule.update_changes(s, old, torch.ones((2, 2)).double(), group)
    assert s.iterations_without_change == 1
    # a symmetry mate is the same pose
    mates = rotation_matrix(*s.poses.euler.T) @ group[2]
    schedule.update_changes(s, torch.stack(euler_angles(mates), 1), s.poses.offset_angst, group)
    assert s.change_angles == pytest.approx(0, abs=1e-5)
    assert s.iterations_without_change == 2


def settled(order: int, step: float, reach: float, **values: object) -> State:
    s = state(order, iterations_without_gain=1, iterations_without_change=1, **values)
    s.sampling.offset_step, s.sampling.offset_range = step, reach
    return s


def test_sampling_updates_of_relions_log() -> None:
    """Beta-galactosidase, iterations 6 and 8: fine steps 0.683663 and 0.508432 Å, ranges 4.71428 and 1.84725 Å."""
    s = settled(2, 3.54, 8.85, accuracy_angles=2.0, accuracy_offsets=0.91155, change_offsets=0.942856)
    s.sampling.perturbation = 0.31
    schedule.update_sampling(s, 4)
    assert s.sampling.fine_offset_step == pytest.approx(0.683663, abs=1e-6)
    assert s.sampling.offset_range == pytest.approx(4.71428, abs=1e-5)
    assert (s.sampling.healpix_order, s.sampling.angular_step, s.local_sigma) == (3, 7.5, None)
    assert s.sampling.perturbation == 0.31  # goes on
    assert (s.iterations_without_gain, s.iterations_without_change) == (0, 0)
    assert s.smallest_change_angles == s.smallest_change_offsets == 999
    s.iterations_without_gain = s.iterations_without_change = 1
    s.accuracy_angles, s.accuracy_offsets, s.change_offsets = 1.0, 0.508432 / 0.75, 1.84725 / 5
    schedule.update_sampling(s, 4)
    assert s.sampling.fine_offset_step == pytest.approx(0.508432, abs=1e-6)
    assert s.sampling.offset_range == pytest.approx(1.84725, abs=1e-5)
    assert s.sampling.healpix_order == 4
    # local searches: sigma is one coarse step
    assert s.local_sigma == s.sampling.angular_step == 3.75


def test_bounds_of_the_new_translations() -> None:
    # a step of at most 1.5 Å, fine; the range is halved where it exceeds 4 steps (auto_cc of relion_parity)
    s = settled(2, 14.16, 21.24, accuracy_angles=5.05, accuracy_offsets=3.1771, change_offsets=2.742072)
    schedule.update_sampling(s, 4)
    assert s.sampling.offset_step == pytest.approx(3.0)
    assert s.sampling.offset_range == pytest.approx(6.85518, abs=1e-5)
    # at least 1.5 steps
    s = settled(2, 6.0, 9.0, accuracy_angles=2.0, accuracy_offsets=1.0, change_offsets=0.01)
    schedule.update_sampling(s, 4)
    assert s.sampling.offset_range == pytest.approx(1.5 * 1.5)
    # at most 1.3 times the old range, and where half of that is still wide the step grows
    s = settled(2, 6.0, 30.0, accuracy_angles=2.0, accuracy_offsets=1.0, change_offsets=99.0)
    schedule.update_sampling(s, 4)
    assert (s.sampling.offset_range, s.sampling.offset_step) == pytest.approx((19.5, 4.875))
    # a step never grows
    s = settled(2, 1.0, 2.0, accuracy_angles=2.0, accuracy_offsets=9.0, change_offsets=9.0)
    schedule.update_sampling(s, 4)
    assert (s.sampling.offset_range, s.sampling.offset_step) == (2.0, 1.0)


@pytest.mark.parametrize("gain", [0, 1])
def test_sampling_waits_until_nothing_gets_better(gain: int) -> None:
    s = settled(2, 3.0, 9.0, accuracy_angles=0.1)
    s.iterations_without_gain, s.iterations_without_change = gain, 1 - gain
    schedule.update_sampling(s, 4)
    assert s.sampling.healpix_order == 2
    assert not s.fine_enough


def test_convergence() -> None:
    # 15°/2 is finer than 3/4 of the accuracy
    s = settled(2, 3.0, 9.0, accuracy_angles=10.1)
    assert not schedule.has_converged(s)
    schedule.update_sampling(s, 4)
    assert s.fine_enough
    assert s.sampling.healpix_order == 2
    assert schedule.has_converged(s)
    s.iterations_without_gain = 0
    assert not schedule.has_converged(s)
    s.iterations_without_gain, s.iterations_without_change = 1, 0
    assert not schedule.has_converged(s)


@pytest.mark.parametrize("ndim", [2, 3])
def test_accuracy_follows_the_noise(ndim: int) -> None:
    """Less noise tells smaller errors; the shell shares sum to 1; hopeless noise gives the largest errors."""
    rng = np.random.default_rng(0)
    box, pixel, n = 24, 4.0, 12
    reference = torch.from_numpy(em.phantom(box, pixel, rng, ndim))
    optics = Optics("one", 300.0, 2.7, 0.1, pixel, box)
    geometry = ImageGeometry.of(optics, 20, box, pixel, torch.float64, torch.device("cpu"))
    ctf, _ = modulations(geometry, None, n, torch.float64)
    euler = torch.from_numpy(rng.uniform(0, 180, (n, 3))) * torch.tensor([ndim - 2, ndim - 2, 1])
    volumes = fourier_volumes(reference[None], 10, 2)

    def accuracy(sigma2: float) -> tuple[float, float, Tensor]:
        return schedule.estimate_accuracy(
            volumes, geometry, ctf, torch.full((geometry.n_pixels,), 1 / sigma2).double(), euler,
            torch.zeros(n, dtype=torch.int64), 10, 2, box, torch.Generator().manual_seed(0),
        )  # fmt: skip

    found = [accuracy(s) for s in (1e-8, 1e-5, 1e-4, 1e-3)]
    angles, shifts = [f[0] for f in found], [f[1] for f in found]
    assert angles == sorted(angles)
    assert shifts == sorted(shifts)
    assert angles[0] < 0.2 * angles[2]
    for angle, shift, share in found[:2]:
        assert 0.05 <= angle < 30
        assert 0.1 * pixel <= shift < 10 * pixel
        assert float(share.sum()) == pytest.approx(1)
        assert float(share[0]) == 0  # the origin tells nothing
    hopeless = accuracy(1e9)
    assert hopeless[:2] == pytest.approx((30.0, 10 * pixel))
    assert not hopeless[2].any()


def test_accuracy_threshold_is_where_the_difference_passes() -> None:
    """One Gaussian off the centre: the error in psi that is found is the first that differs enough."""
    box, pixel = 32, 3.0
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    reference = torch.exp(-((axis[:, None] - 1) ** 2 + (axis - 8) ** 2) / 8)
    optics = Optics("one", 300.0, 2.7, 0.1, pixel, box)
    geometry = ImageGeometry.of(optics, 28, box, pixel, torch.float64, torch.device("cpu"))
    ctf, _ = modulations(geometry, None, 1, torch.float64)
    sigma2 = 2e-5
    volumes = fourier_volumes(reference[None], 14, 2)
    angle, _, _ = schedule.estimate_accuracy(
        volumes, geometry, ctf, torch.full((geometry.n_pixels,), 1 / sigma2).double(), torch.zeros((1, 3)).double(),
        torch.zeros(1, dtype=torch.int64), 14, 2, box, torch.Generator(),
    )  # fmt: skip

    transform = em.padded_transform(reference.numpy(), 14, 2)
    kx, ky, shell = em.half_plane(28)

    def difference(psi: float) -> float:
        a, b = (em.central_slice(transform, em.rotation(0, 0, t), kx, ky, 14, 2) for t in (0.0, psi))
        return float((np.abs(a - b) ** 2)[shell > 0].sum() / (2 * sigma2))

    assert difference(angle) > schedule.ACCURACY_THRESHOLD
    assert difference(0.75 * angle) < schedule.ACCURACY_THRESHOLD
