"""Slices of a Fourier volume and their adjoint: facts of geometry, in 3D and 2D."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.em import plain_em as em
from torchem.imaging.fourier import FourierPixels
from torchem.imaging.projection import fourier_volume, volume_shape
from torchem.imaging.symmetry import rotation_matrix
from torchem.ops import slices as slices_module
from torchem.ops.slices import backproject, project

NDIM = pytest.mark.parametrize("ndim", [2, 3])
BOX, R_MAX, PADDING = 24, 9, 2


def pixels(size: int = 2 * R_MAX) -> tuple[Tensor, Tensor]:
    of_box = FourierPixels.of(BOX)
    n = of_box.count(size)
    return of_box.kx[:n].double(), of_box.ky[:n].double()


def orientations(ndim: int, n: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    angles = torch.rand((3, n), generator=generator, dtype=torch.float64) * 360
    if ndim == 2:
        angles[:2] = 0
    return rotation_matrix(*angles)


def random_volume(ndim: int) -> Tensor:
    map_ = torch.randn((BOX,) * ndim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return fourier_volume(map_, R_MAX, PADDING)


@NDIM
@pytest.mark.parametrize("r_max", [R_MAX, 6])
def test_slices_agree_with_the_plain_implementation(ndim: int, r_max: int) -> None:
    volume, matrices, (kx, ky) = random_volume(ndim), orientations(ndim), pixels()
    whole = torch.cat((volume.flip(tuple(range(ndim)))[..., :-1].conj(), volume), -1).numpy()
    expected = np.array([em.central_slice(whole, m.numpy(), kx.numpy(), ky.numpy(), r_max, PADDING) for m in matrices])
    found = project(volume, matrices, kx, ky, PADDING, r_max)
    assert torch.allclose(found, torch.from_numpy(expected), atol=1e-12 * float(volume.abs().max()))
    single = project(volume.to(torch.complex64), matrices.float(), kx.float(), ky.float(), PADDING, r_max)
    assert torch.allclose(single.to(found), found, atol=1e-4 * float(volume.abs().max()))


@NDIM
@pytest.mark.parametrize("r_max", [R_MAX, 6])
def test_back_projection_is_the_adjoint(ndim: int, r_max: int) -> None:
    volume, matrices, (kx, ky) = random_volume(ndim), orientations(ndim), pixels()
    generator = torch.Generator().manual_seed(2)
    slices = torch.randn((len(matrices), len(kx)), generator=generator, dtype=torch.complex128)
    data = torch.zeros(volume_shape(R_MAX, PADDING, ndim), dtype=torch.complex128)
    weight = torch.zeros(data.shape, dtype=torch.float64)
    ones = torch.ones(slices.shape, dtype=torch.float64)
    backproject(data, weight, slices, ones, matrices, kx, ky, PADDING, r_max)
    here = (project(volume, matrices, kx, ky, PADDING, r_max).conj() * slices).real.sum()
    there = (volume.conj() * data).real.sum()
    assert float(here) == pytest.approx(float(there), rel=1e-12)
    # each pixel inside is dealt out once
    assert float(weight.sum()) == pytest.approx(len(matrices) * int((kx**2 + ky**2 <= r_max**2).sum()))


@NDIM
def test_the_origin_does_not_move(ndim: int) -> None:
    volume, (kx, ky) = random_volume(ndim), pixels()
    slices = project(volume, orientations(ndim, 50), kx, ky, PADDING, R_MAX)
    assert float(kx[0]) == float(ky[0]) == 0
    origin = volume[(volume.shape[0] // 2,) * (ndim - 1)][0]
    assert torch.allclose(slices[:, 0], origin.expand(50), rtol=1e-14)


@NDIM
def test_an_unrotated_slice_is_the_central_plane(ndim: int) -> None:
    volume, (kx, ky) = random_volume(ndim), pixels()
    half = volume.shape[0] // 2
    plane = volume[half] if ndim == 3 else volume
    inside = kx**2 + ky**2 <= R_MAX**2
    expected = plane[(PADDING * ky).long() + half, (PADDING * kx).long()] * inside
    found = project(volume, torch.eye(3, dtype=torch.float64)[None], kx, ky, PADDING, R_MAX)[0]
    assert torch.allclose(found, expected, atol=1e-12 * float(volume.abs().max()))
    assert not found[~inside].any()


@NDIM
def test_half_a_turn_gives_the_mirrored_pixels(ndim: int) -> None:
    """Turned by 180° about the view, a slice holds its own Friedel mates."""
    volume, (kx, ky) = random_volume(ndim), pixels()
    angles = torch.tensor([[0.0, 0.0, 33.0], [0.0, 0.0, 213.0]] if ndim == 2 else [[10, 50, 33.0], [10, 50, 213.0]])
    one, turned = project(volume, rotation_matrix(*angles.double().T), kx, ky, PADDING, R_MAX)
    assert torch.allclose(one, turned.conj(), atol=1e-12 * float(volume.abs().max()))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 63])
def test_slices_do_not_depend_on_their_number_or_on_threads(
    threads: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, matrices, (kx, ky) = random_volume(3), orientations(3, n), pixels()
    one_by_one = torch.cat([project(volume, m[None], kx, ky, PADDING, R_MAX) for m in matrices])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(project(volume, matrices, kx, ky, PADDING, R_MAX), one_by_one)


@NDIM
def test_insertion_adds_to_what_is_there(ndim: int) -> None:
    matrices, (kx, ky) = orientations(ndim, 2), pixels()
    shape = volume_shape(R_MAX, PADDING, ndim)
    slices = torch.randn((2, len(kx)), generator=torch.Generator().manual_seed(2), dtype=torch.complex128)
    weights = slices.abs()
    together, apart = ([torch.zeros(shape, dtype=d) for d in (torch.complex128, torch.float64)] for _ in range(2))
    backproject(*together, slices, weights, matrices, kx, ky, PADDING, R_MAX)
    for i in range(2):
        one = slice(i, i + 1)
        backproject(*apart, slices[one], weights[one], matrices[one], kx, ky, PADDING, R_MAX)
    for a, b in zip(together, apart, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 3])
def test_insertion_does_not_depend_on_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kx, ky = pixels()
    shape = volume_shape(R_MAX, PADDING, 3)
    n = 1 + threads * math.prod(shape) // len(kx)  # enough for a volume of its own for every thread
    slices = torch.randn((n, len(kx)), generator=torch.Generator().manual_seed(2), dtype=torch.complex128)
    found = []
    for number in (1, threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        monkeypatch.setattr(slices_module, "BLOCK", 2**12)
        data, weight = torch.ones(shape, dtype=torch.complex128), torch.ones(shape, dtype=torch.float64)
        backproject(data, weight, slices, slices.abs(), orientations(3, n), kx, ky, PADDING, R_MAX)
        found.append((data, weight))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12 * float(one.abs().max()))
