"""The padded Fourier volume: made from a map, symmetrised, and turned back."""

import math

import pytest
import torch
from torch import Tensor

from torchem.imaging.fourier import FourierPixels
from torchem.imaging.projection import (
    fourier_volume,
    gridding_correction,
    make_hermitian,
    real_space_map,
    symmetrise,
    volume_radius2,
    volume_shape,
)
from torchem.imaging.symmetry import operators, rotation_matrix
from torchem.ops.slices import project

BOX, PADDING = 32, 2


def coordinates(box: int, ndim: int) -> Tensor:
    """`(..., ndim)` x first, from the origin."""
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    return torch.stack(torch.meshgrid(*[axis] * ndim, indexing="ij")[::-1], -1)


def gaussian(box: int, centre: Tensor, width: float) -> Tensor:
    square = (coordinates(box, len(centre)) - centre).square().sum(-1)
    return torch.exp(-square / (2 * width**2))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_slice_is_the_transform_of_the_projection(ndim: int, dtype: torch.dtype) -> None:
    width, centre = 2.5, torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)[:ndim]
    angles = [[0, 0, 0.0], [0, 0, 70.0], [0, 0, -145.0]] if ndim == 2 else [[0, 0, 0.0], [40, 65, -20.0], [5, 180, 9.0]]
    matrices = rotation_matrix(*torch.tensor(angles, dtype=torch.float64).T)
    box, r_max = 64, 20
    pixels = FourierPixels.of(box)
    kx, ky = pixels.kx.double(), pixels.ky.double()
    volume = fourier_volume(gaussian(box, centre, width).to(dtype), r_max, PADDING)
    found = project(volume, matrices.to(dtype), kx.to(dtype), ky.to(dtype), PADDING, r_max)
    moved = centre @ matrices[:, :2, :ndim].mT  # x, y of each projection
    frequency2 = (kx**2 + ky**2) / box**2
    amplitude = (2 * math.pi) ** (ndim / 2) * width**ndim / box**2
    expected = amplitude * torch.exp(-2 * (math.pi * width) ** 2 * frequency2)
    expected = expected * torch.polar(torch.ones(1).double(), -2 * math.pi / box * (moved @ torch.stack((kx, ky))))
    expected = expected * (kx**2 + ky**2 <= r_max**2)
    assert float((found - expected).abs().max()) < 0.01 * amplitude


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("box", [16, 20])
def test_a_map_survives_its_volume(ndim: int, box: int) -> None:
    map_ = gaussian(box, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:ndim], 1.4)
    correction = gridding_correction(box, PADDING, ndim, torch.float64, map_.device)
    found = real_space_map(fourier_volume(map_, box // 2, PADDING), box, PADDING) * correction
    assert float((found - map_).norm() / map_.norm()) < 1e-3


def test_shapes_and_radii() -> None:
    for ndim, shape in ((3, (27, 27, 14)), (2, (27, 14))):
        assert volume_shape(6, 2, ndim) == shape
        radius2 = volume_radius2(shape, torch.device("cpu"))
        assert radius2.shape == shape
        assert int(radius2[(13,) * (ndim - 1)][0]) == 0
        assert int(radius2[(0,) * (ndim - 1)][13]) == 13**2 * ndim
        volume = fourier_volume(torch.randn((16,) * ndim, dtype=torch.float64), 6, 2)
        assert volume.shape == shape
        assert not volume[radius2 > 144].any()


@pytest.mark.parametrize("ndim", [2, 3])
def test_hermitian_plane(ndim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = volume_shape(3, 2, ndim)
    data = torch.randn(shape, generator=generator, dtype=torch.complex128)
    weight = torch.rand(shape, generator=generator, dtype=torch.float64)
    whole = data.clone(), weight.clone()
    make_hermitian(*whole)
    for before, after in zip((data, weight), whole, strict=True):
        plane, axes = after[..., 0], tuple(range(ndim - 1))
        origin = (shape[0] // 2,) * (ndim - 1)
        expected = before[..., 0] + before[..., 0].flip(axes).conj()
        expected[origin] = before[(*origin, 0)]
        assert torch.equal(plane, expected)
        assert torch.equal(after[..., 1:], before[..., 1:])
        mates = plane.flip(axes).conj()
        mates[origin] = plane[origin]
        assert torch.equal(plane, mates)


@pytest.mark.parametrize("group", ["C1", "C4", "D2", "O"])
def test_symmetrised_volumes_are_symmetric(group: str) -> None:
    """For rotations that map the grid onto itself the copies are exact."""
    rotations = torch.from_numpy(operators(group))
    generator = torch.Generator().manual_seed(0)
    map_ = torch.randn((12, 12, 12), generator=generator, dtype=torch.float64)
    volume = fourier_volume(map_, 5, PADDING)
    weight = volume.abs().square()
    radius = 10
    summed, weights = volume.clone(), weight.clone()
    symmetrise([(summed, weights), (volume.clone(), weight.clone())], rotations, radius)
    again, weights_again = summed.clone(), weights.clone()
    symmetrise([(again, weights_again)], rotations, radius)
    assert torch.allclose(again, len(rotations) * summed, atol=1e-10)
    assert torch.allclose(weights_again, len(rotations) * weights, atol=1e-10)
    half = volume.shape[0] // 2
    assert torch.allclose(summed[half, half, 0], len(rotations) * volume[half, half, 0])
    if group == "C1":
        assert torch.allclose(summed, volume, atol=1e-14)


def test_symmetrising_about_any_axis_is_nearly_exact() -> None:
    rotations = torch.from_numpy(operators("C3"))
    map_ = sum(gaussian(BOX, torch.tensor([4.0, 1, 3], dtype=torch.float64) @ r, 3.0) for r in rotations)
    volume = fourier_volume(map_, 10, PADDING)
    summed = [(volume.clone(), volume.abs()), (2 * volume, volume.abs())]
    symmetrise(summed, rotations, 20)
    assert torch.allclose(summed[1][0], 2 * summed[0][0])
    summed = summed[0][0]
    assert float((summed / 3 - volume).norm() / volume.norm()) < 0.03


@pytest.mark.parametrize("ndim", [2, 3])
def test_gridding_correction_is_the_transform_of_the_interpolation(ndim: int) -> None:
    found = gridding_correction(BOX, PADDING, ndim, torch.float64, torch.device("cpu"))
    radius = coordinates(BOX, ndim).norm(dim=-1)
    assert torch.allclose(found, torch.sinc(radius / (PADDING * BOX)).square())
    assert float(found[(BOX // 2,) * ndim]) == 1
