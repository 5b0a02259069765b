"""Densities and projections of points against exact sums."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from torchem.errors import InputError
from torchem.imaging.density import density, project, spread_density
from torchem.imaging.symmetry import rotation_matrix

BOX, PIXEL = 32, 3.0


@pytest.fixture
def atoms() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    direction = rng.normal(size=(300, 3))
    radius = 36 * rng.random((300, 1)) ** (1 / 3)
    xyz = direction / np.linalg.norm(direction, axis=1, keepdims=True) * radius
    return xyz, rng.choice([6.0, 7.0, 8.0], 300)


@pytest.fixture
def rotations() -> Tensor:
    rot, tilt, psi = torch.tensor([[10.0, -125.0, 77.0], [20.0, 95.0, 160.0], [-60.0, 5.0, 140.0]]).double()
    return rotation_matrix(rot, tilt, psi)


def tensors(atoms: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(atoms[0]).float(), torch.from_numpy(atoms[1]).float()


def exact_projection(xyz: np.ndarray, weights: np.ndarray, rotation: np.ndarray, resolution: float) -> np.ndarray:
    """The image as a sum over atoms of plane waves, frequency by frequency."""
    seen = (xyz @ rotation.T)[:, :2] / PIXEL + BOX // 2
    k = np.fft.fftfreq(BOX, 1 / BOX)
    wave_x = np.exp(-2j * np.pi / BOX * seen[:, :1] * k)
    wave_y = np.exp(-2j * np.pi / BOX * seen[:, 1:] * k)
    transform = (wave_y * weights[:, None]).T @ wave_x
    k2 = k[:, None] ** 2 + k**2
    transform *= np.exp(-math.log(2) * k2 * (resolution / (BOX * PIXEL)) ** 2) * (k2 < (BOX / 2) ** 2)
    return np.fft.ifft2(transform).real


@pytest.mark.parametrize("resolution", [0.0, 7.0])
def test_projection_is_exact(atoms: tuple[np.ndarray, np.ndarray], rotations: Tensor, resolution: float) -> None:
    images = project(*tensors(atoms), rotations, BOX, PIXEL, resolution)
    assert images.dtype == torch.float32
    for image, rotation in zip(images.numpy(), rotations.numpy(), strict=True):
        exact = exact_projection(*atoms, rotation, resolution)
        assert np.sqrt(((image - exact) ** 2).mean()) < 0.006 * exact.std()


def test_density_sums_to_its_projection(atoms: tuple[np.ndarray, np.ndarray]) -> None:
    volume = density(*atoms, BOX, PIXEL, 7.0, centre="keep")
    assert volume.shape == (BOX, BOX, BOX) and volume.dtype == torch.float32
    assert float(volume.sum()) == pytest.approx(atoms[1].sum(), rel=1e-5)
    image = project(*tensors(atoms), torch.eye(3)[None], BOX, PIXEL, 7.0)[0]
    torch.testing.assert_close(volume.sum(0), image, rtol=0, atol=1e-5 * float(image.max()))


def test_voxels_project_as_the_atoms_do(atoms: tuple[np.ndarray, np.ndarray], rotations: Tensor) -> None:
    """The lattice of a band-limited map adds nothing below the Nyquist frequency."""
    volume = density(*atoms, BOX, PIXEL, 15.0, centre="keep")
    axis = (torch.arange(BOX) - BOX // 2) * PIXEL
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    voxels = torch.stack([x, y, z], dim=-1).reshape(-1, 3)
    from_voxels = project(voxels, volume.flatten(), rotations, BOX, PIXEL)
    from_atoms = project(*tensors(atoms), rotations, BOX, PIXEL, 15.0)
    assert float((from_voxels - from_atoms).std()) < 0.005 * float(from_atoms.std())


def test_projections_agree_with_trilinear_sampling(
    atoms: tuple[np.ndarray, np.ndarray], rotations: Tensor
) -> None:
    """Rotate the map on its grid and sum along z: image(x) = ∫ V(Aᵀ x) dz."""
    volume = density(*atoms, BOX, PIXEL, 15.0, centre="keep")
    axis = torch.arange(BOX).double() - BOX // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    grid = torch.stack([x, y, z], dim=-1).reshape(-1, 3)
    for image, rotation in zip(project(*tensors(atoms), rotations, BOX, PIXEL, 15.0), rotations, strict=True):
        where = ((grid @ rotation + BOX // 2) / (BOX - 1) * 2 - 1).float().reshape(1, BOX, BOX, BOX, 3)
        sampled = torch.nn.functional.grid_sample(volume[None, None], where, align_corners=True)[0, 0].sum(0)
        assert float(torch.corrcoef(torch.stack([sampled.flatten(), image.flatten()]))[0, 1]) > 0.998


def test_low_pass_is_one_half_at_the_resolution() -> None:
    volume = density(np.zeros((1, 3)), np.ones(1), BOX, PIXEL, BOX * PIXEL / 8, centre="keep")
    transform = torch.fft.rfftn(torch.fft.ifftshift(volume)).real
    some = transform[[0, 8, 0], [0, 0, 0], [0, 0, 8]]
    torch.testing.assert_close(some, torch.tensor([1.0, 0.5, 0.5]), rtol=0, atol=1e-3)
    assert float(volume.argmax()) == BOX // 2 * (BOX**2 + BOX + 1)


def test_centre_of_mass(atoms: tuple[np.ndarray, np.ndarray]) -> None:
    xyz, weights = atoms
    centred = density(xyz, weights, BOX, PIXEL, 7.0)
    moved = density(xyz + np.array([50.0, -70.0, 20.0]), weights, BOX, PIXEL, 7.0)
    torch.testing.assert_close(centred, moved, rtol=0, atol=1e-3 * float(centred.max()))


def test_coarser_band() -> None:
    """A map's voxels on a finer grid hold nothing beyond their own Nyquist frequency."""
    point = torch.zeros(1, 3), torch.ones(1)
    fine, limited = spread_density(*point, BOX, PIXEL), spread_density(*point, BOX, PIXEL, finest=4 * PIXEL)
    spectrum = torch.fft.rfftn(torch.fft.ifftshift(limited)).real
    assert float(spectrum[0, 0, 7]) == pytest.approx(1, abs=1e-3) and abs(float(spectrum[0, 0, 9])) < 1e-4
    assert float(torch.fft.rfftn(torch.fft.ifftshift(fine)).real[0, 0, 9]) == pytest.approx(1, abs=2e-3)


def test_model_larger_than_the_box(atoms: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(InputError, match="larger box"):
        density(*atoms, 16, PIXEL, 7.0)
    with pytest.raises(ValueError, match="centre"):
        density(*atoms, BOX, PIXEL, 7.0, centre="middle")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_agrees(atoms: tuple[np.ndarray, np.ndarray], rotations: Tensor) -> None:
    points, weights = tensors(atoms)
    here = project(points, weights, rotations, BOX, PIXEL, 7.0)
    there = project(points.cuda(), weights.cuda(), rotations, BOX, PIXEL, 7.0).cpu()
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5 * float(here.max()))
