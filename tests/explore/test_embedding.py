"""2SDR against its definition and on images whose ranks are known; t-SNE keeps groups apart."""

import sys

import numpy as np
import pytest
import torch

from torchem.errors import InputError
from torchem.explore import tsne, two_stage_reduction


@pytest.fixture
def problem():
    """400 images 24 × 20 of 3 components in a 5 × 4 core, in noise, and what they were without it."""
    rng = np.random.default_rng(1)
    rows = np.linalg.qr(rng.standard_normal((24, 5)))[0]
    columns = np.linalg.qr(rng.standard_normal((20, 4)))[0]
    core = np.linalg.qr(rng.standard_normal((20, 3)))[0].reshape(5, 4, 3)
    scores = rng.standard_normal((400, 3)) * [20, 14, 9]
    clean = 1.5 + np.einsum("hp,pqr,nr,wq->nhw", rows, core, scores, columns)
    return clean, clean + rng.standard_normal(clean.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_finds_what_is_there(problem, dtype):
    clean, noisy = (torch.from_numpy(images).to(dtype) for images in problem)
    found = two_stage_reduction(noisy)
    assert found.rows.shape[1] <= 6 and found.columns.shape[1] <= 5 and found.scores.shape == (400, 3)
    error = (found.reconstruct() - clean).square().mean().sqrt()
    # 3 of 480 directions of the noise, whose deviation is 1, are left, and little of what was to be found is lost
    assert error < 1.5 * (3 / 480 + 1 / 400) ** 0.5
    # scores are uncorrelated, decreasing, and reconstruct's inverse
    covariance = found.scores.T @ found.scores / 400
    np.testing.assert_allclose(covariance, torch.diag(found.variances), atol=1e-3 * float(covariance.max()))
    assert (found.variances.diff() < 0).all()
    identity = found.basis.flatten(0, 1).T @ found.basis.flatten(0, 1)
    np.testing.assert_allclose(identity, torch.eye(3), atol=1e-5)


def test_turns_raise_what_is_captured(problem):
    noisy = torch.from_numpy(problem[1])
    found = two_stage_reduction(noisy, ranks=(3, 2), components=6)
    centred = noisy - noisy.mean(0)

    def captured(rows, columns):
        return float((rows.T @ centred @ columns).square().sum())

    # neither side can be bettered while the other stays: the definition of multilinear PCA
    best = captured(found.rows, found.columns)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        nudge = 0.05 * torch.randn(24, 3, generator=generator, dtype=torch.float64)
        assert captured(torch.linalg.qr(found.rows + nudge)[0], found.columns) < best
        nudge = 0.05 * torch.randn(20, 2, generator=generator, dtype=torch.float64)
        assert captured(found.rows, torch.linalg.qr(found.columns + nudge)[0]) < best


def test_with_full_ranks_it_is_pca(problem):
    noisy = problem[1][:, :6, :5]
    found = two_stage_reduction(noisy, ranks=(6, 5), components=30)
    flat = noisy.reshape(400, 30) - noisy.reshape(400, 30).mean(0)
    np.testing.assert_allclose(found.variances, np.linalg.svd(flat)[1] ** 2 / 400, rtol=1e-9)
    np.testing.assert_allclose(found.reconstruct(), noisy, atol=1e-9)


def test_pure_noise_has_next_to_no_rank():
    noise = torch.from_numpy(np.random.default_rng(2).standard_normal((500, 32, 32)))
    found = two_stage_reduction(noise)
    assert max(found.rows.shape[1], found.columns.shape[1]) <= 3


def test_what_cannot_be_reduced(problem):
    images = problem[1]
    for wrong, match in ((images[:2], "too few"), (np.ones((5, 4, 4)), "all alike"), (images * np.nan, "not finite")):
        with pytest.raises(InputError, match=match):
            two_stage_reduction(wrong)
    with pytest.raises(InputError, match="ranks of 25 and 3"):
        two_stage_reduction(images, ranks=(25, 3))
    with pytest.raises(InputError, match="7 components"):
        two_stage_reduction(images, ranks=(3, 2), components=7)


def test_tsne_keeps_groups_apart():
    pytest.importorskip("sklearn", reason='the extra "explore" is not installed')
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(3), 20)
    scores = rng.standard_normal((60, 4)) + 20 * np.eye(4)[group]
    points = tsne(torch.from_numpy(scores), seed=1)
    np.testing.assert_array_equal(points, tsne(scores, seed=1))
    nearest = np.argsort(((points[:, None] - points) ** 2).sum(-1), axis=1)[:, 1]
    assert (group[nearest] == group).all()


def test_tsne_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(InputError, match=r'pip install scikit-learn'):
        tsne(np.zeros((20, 3)))
