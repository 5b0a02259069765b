"""Images turned, shifted and mirrored: against an object that is known everywhere."""

import numpy as np
import pandas as pd
import pytest
import torch

from torchem.data.alignment import from_relion, to_matrix
from torchem.data.images import Images
from torchem.data.star import read_star, write_star
from torchem.imaging.planar import transformed
from torchem.imaging.simulation import NoiseOptions, SimulateOptions, simulate


def draw(points):
    """An object without symmetry at points `(..., 2)` from the centre."""
    x, y = points[..., 0], points[..., 1]
    blobs = ((3, 1, 2.5, 1), (-5, 3, 3, 0.7), (1, -6, 2.2, 1.3))
    return sum(h * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * w * w)) for a, b, w, h in blobs)


@pytest.mark.parametrize("box", [40, 41])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brings_the_object_back(box, dtype):
    table = pd.DataFrame(
        [(0, 0.0, 0.0, 0.0), (0, 30.0, 0, 0), (0, 0, 1.5, -0.7), (1, 0, 0.5, 0), (1, 217, -1.3, 2.4), (0, 217, 3, 2)],
        columns=["mirror", "alpha", "sx", "sy"],
    )
    axis = np.arange(box) - box // 2
    points = np.stack(np.meshgrid(axis, axis), axis=-1)
    matrix = to_matrix(table)
    images = np.stack([draw(points @ m[:2, :2].T + m[:2, 3]) for m in matrix])
    columns = {name: torch.tensor(table[name].to_numpy()) for name in table}
    aligned = transformed(torch.from_numpy(images).to(dtype), **columns).numpy()
    assert aligned.dtype == np.float32 if dtype is torch.float32 else np.float64
    # what cubic splines are good to, within a radius that stays in the image; 0.01 px or 0.1° off would be seen
    within = np.hypot(points[..., 0], points[..., 1]) < 14
    np.testing.assert_allclose(aligned[:, within], np.broadcast_to(draw(points), aligned.shape)[:, within], atol=2e-3)
    np.testing.assert_allclose(aligned[0], images[0], atol=1e-5)


def test_nothing_comes_from_beyond_the_border():
    ones = torch.ones(1, 16, 16)
    moved = transformed(ones, torch.zeros(1), torch.full((1,), 4.0), torch.zeros(1), torch.zeros(1))
    assert (moved[0, :, :3].abs() < 1e-5).all() and (moved[0, :, 5:] > 0.99).all()


def test_the_tolerance_tells_right_from_wrong():
    axis = np.arange(40) - 20
    points = np.stack(np.meshgrid(axis, axis), axis=-1)
    turn = [[np.cos(0.002), np.sin(0.002)], [-np.sin(0.002), np.cos(0.002)]]
    for other in (points + np.array([0.01, 0]), points @ turn):
        assert np.abs(draw(points) - draw(other)).max() > 2e-3


@pytest.mark.parametrize(("period", "loss"), [(8, 1e-3), (4, 0.02), (3, 0.05)])
def test_averages_keep_high_frequencies(period, loss):
    """A wave of that many pixels, turned and shifted by any amount and back, keeps its amplitude on average."""
    generator = torch.Generator().manual_seed(1)
    alpha = 360 * torch.rand(64, generator=generator, dtype=torch.float64)
    sx, sy = 4 * torch.rand((2, 64), generator=generator, dtype=torch.float64) - 2
    axis = torch.arange(64, dtype=torch.float64) - 32
    angle = torch.deg2rad(alpha)[:, None, None]
    x = angle.cos() * axis - angle.sin() * axis[:, None]
    y = angle.sin() * axis + angle.cos() * axis[:, None]
    # images whose aligned ones are all the same wave along x
    turned = x * angle.cos() + y * angle.sin()
    assert torch.allclose(turned, axis.expand(64, 64, 64))
    back_x = angle.cos() * axis + angle.sin() * axis[:, None] + sx[:, None, None]
    images = torch.cos(2 * np.pi / period * back_x)
    average = transformed(images, alpha, sx, sy, torch.zeros(64)).mean(0)
    wave = torch.cos(2 * np.pi / period * axis).expand(64, 64)
    inside = axis.square() + axis[:, None].square() < 20**2
    amplitude = float((average * wave)[inside].sum() / wave.square()[inside].sum())
    assert abs(1 - amplitude) < loss


def test_truth_of_simulated_particles_brings_them_together(tmp_path):
    """What the simulator calls psi and origin, RELION's, taken over as EMAN2's, aligns particles of one view."""
    views = pd.DataFrame({"rlnAngleRot": 40.0, "rlnAngleTilt": 55.0, "rlnAnglePsi": np.linspace(-170, 170, 24)})
    write_star(tmp_path / "views.star", {"particles": views})
    options = SimulateOptions(
        n_particles=24, box=48, pixel_size=5.0, symmetry="C1", orientations=str(tmp_path / "views.star"),
        shift_sigma_px=2.0, astigmatism_angst=0, defocus_min_angst=15000, defocus_max_angst=15000,
        noise=NoiseOptions(snr=4.0), device="cpu",
    )  # fmt: skip
    simulate(options, tmp_path)
    images = Images.open(tmp_path / "particles.star")
    stack = torch.from_numpy(images.read(range(24)))
    parameters = from_relion(read_star(tmp_path / "truth.star")["particles"], images.pixel_size)

    def sharpness(table):
        columns = {name: torch.tensor(table[name].to_numpy()) for name in ("alpha", "sx", "sy", "mirror")}
        return float(transformed(stack, **columns).mean(0).var())

    right = sharpness(parameters)
    assert right > 3 * sharpness(parameters.assign(alpha=-parameters["alpha"]))
    assert right > 1.3 * sharpness(parameters.assign(sx=-parameters["sx"], sy=-parameters["sy"]))
    assert right > 1.1 * sharpness(parameters.assign(sx=0, sy=0))
