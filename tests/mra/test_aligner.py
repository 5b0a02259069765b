"""Whole alignments of small simulated sets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.mra.blobs import blobs, in_memory
from torchem.errors import InputError
from torchem.imaging.planar import transformed
from torchem.mra.aligner import Iteration, MultiReferenceAligner, ReferenceFreeAligner
from torchem.mra.options import AlignOptions

OPTIONS = AlignOptions(last_ring=9, x_range=2, y_range=2, device="cpu")


def recomputed(images: np.ndarray, iteration: Iteration) -> np.ndarray:
    """Class averages, from the table of parameters alone, of images less the mean of their outermost pixels."""
    outermost = np.ones(images.shape[1:], bool)
    outermost[1:-1, 1:-1] = False
    images = images - images[:, outermost].mean(1)[:, None, None]
    table = iteration.parameters
    columns = [torch.tensor(table[name].to_numpy(float)) for name in ("alpha", "sx", "sy", "mirror")]
    aligned = transformed(torch.tensor(images), *columns).double()
    members = table["class_id"].to_numpy()
    return np.stack([
        aligned[members == k].mean(0) if (members == k).any() else np.zeros(aligned.shape[1:])
        for k in range(len(iteration.averages))
    ])  # fmt: skip


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)])


def purity(table: pd.DataFrame, class_id: np.ndarray) -> float:
    return pd.crosstab(table["class_id"], class_id).max(axis=1).sum() / len(table)


def test_given_references_keep_their_frame() -> None:
    truth = blobs(60, 3)
    aligner = MultiReferenceAligner(replace(OPTIONS, max_iterations=3), in_memory(truth.images), truth.references)
    *_, last = aligner
    assert last.parameters["class_id"].tolist() == truth.class_id.tolist()
    assert last.parameters["mirror"].tolist() == truth.mirror.tolist()
    assert correlations(last.averages.numpy(), truth.references).min() > 0.95
    np.testing.assert_allclose(last.averages.numpy(), recomputed(truth.images, last), atol=1e-4)
    assert last.members.sum() == 60 and (last.parameters["peak"] > 0.8).all()
    assert list(last.parameters) == ["image", "class_id", "mirror", "alpha", "sx", "sy", "peak", "pixel_error"]


def test_references_of_unequal_energy() -> None:
    """A reference's contrast and background do not matter."""
    truth = blobs(30, 3)
    stronger = truth.references * np.array([1, 20, 0.1], np.float32)[:, None, None] + 5
    options = replace(OPTIONS, references="refs.mrcs", max_iterations=1)
    (iteration,) = MultiReferenceAligner(options, in_memory(truth.images), stronger)
    assert iteration.parameters["class_id"].tolist() == truth.class_id.tolist()


def test_classes_of_the_data() -> None:
    truth = blobs(240, 4, noise=1.0, seed=3)
    iterations = list(MultiReferenceAligner(replace(OPTIONS, n_classes=4, seed=1), in_memory(truth.images)))
    last = iterations[-1]
    assert last.converged and purity(last.parameters, truth.class_id) > 0.9
    assert float(last.members.min()) >= 0.2 * 60
    # centred averages and parameters still belong together, but for what centring moved across the border
    inner = (slice(None), slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(last.averages.numpy()[inner], recomputed(truth.images, last)[inner], atol=0.05)
    assert [iteration.number for iteration in iterations] == list(range(1, len(iterations) + 1))
    assert iterations[0].changed == 1 and last.changed < 0.01 and last.pixel_error < 0.5


@pytest.mark.parametrize(("contrast", "background"), [(1, 1000), (1e8, 0), (1e-12, 0)])
def test_contrast_and_background_of_images_do_not_matter(contrast: float, background: float) -> None:
    truth = blobs(60, 3, seed=4)
    options = replace(OPTIONS, references="refs.mrcs", max_iterations=1)
    (expected,) = MultiReferenceAligner(options, in_memory(truth.images), truth.references)
    (found,) = MultiReferenceAligner(options, in_memory(truth.images * contrast + background), truth.references)
    assert found.parameters["class_id"].tolist() == expected.parameters["class_id"].tolist()
    np.testing.assert_allclose(found.parameters["peak"], expected.parameters["peak"], atol=2e-4)
    inner = (slice(None), slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(found.averages.numpy()[inner] / contrast, expected.averages.numpy()[inner], atol=2e-3)
    np.testing.assert_allclose(found.frc, expected.frc, atol=5e-3)


def test_tiny_classes_give_up_their_seats() -> None:
    """A reference that takes nothing becomes the half of the largest class that fitted worst."""
    truth = blobs(80, 2, noise=0.5, seed=5)
    nothing = np.random.default_rng(0).standard_normal(truth.references[0].shape).astype(np.float32)
    references = np.stack([truth.references[0], nothing])
    options = replace(OPTIONS, references="refs.mrcs", max_iterations=8)
    aligner = MultiReferenceAligner(options, in_memory(truth.images), references)
    first, *_, last = aligner
    assert float(first.members[1]) < 0.2 * 40
    assert purity(last.parameters, truth.class_id) > 0.95


def test_reference_free() -> None:
    truth = blobs(80, 1, noise=0.7, seed=2)
    iterations = list(ReferenceFreeAligner(replace(OPTIONS, mode="rfa"), in_memory(truth.images)))
    last = iterations[-1]
    assert last.converged and len(last.averages) == 1
    # turned and perhaps mirrored against the truth: so compare powers
    power = [float(iteration.averages.square().mean()) for iteration in (iterations[0], last)]
    assert power[1] > power[0] and power[1] > 0.7
    np.testing.assert_allclose(last.averages.numpy(), recomputed(truth.images, last), atol=0.05)
    # smaller and smaller shifts
    assert last.shifts.x_range == 0.5 and iterations[0].shifts.x_range == 2


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    truth = blobs(60, 3, noise=1.0, seed=4)
    images = in_memory(truth.images)
    options = replace(OPTIONS, n_classes=3, max_iterations=4)
    whole = list(MultiReferenceAligner(options, images, folder=tmp_path))
    for path in tmp_path.glob("run_it00[34]*"):
        path.unlink()
    resumed = list(MultiReferenceAligner.resume(options, images, folder=tmp_path))
    assert [iteration.number for iteration in resumed] == [3, 4]
    pd.testing.assert_frame_equal(resumed[-1].parameters, whole[-1].parameters)
    assert torch.equal(resumed[-1].averages, whole[-1].averages)
    with pytest.raises(InputError, match="holds no whole iteration"):
        MultiReferenceAligner.resume(options, images, folder=tmp_path / "nothing")


def test_references_are_needed() -> None:
    images = in_memory(blobs(4, 1).images)
    with pytest.raises(InputError, match="no references: give"):
        MultiReferenceAligner(OPTIONS, images)
    with pytest.raises(InputError, match="20 x 20 px, but the images have 24 px"):
        MultiReferenceAligner(OPTIONS, images, np.zeros((1, 20, 20), np.float32))


def test_unusable_images(caplog: pytest.LogCaptureFixture) -> None:
    """What is no number, or flat, harms nobody else."""
    truth = blobs(30, 2)
    images = truth.images.copy()
    images[3, 2, 2], images[7] = np.nan, 4.0
    options = replace(OPTIONS, references="refs.mrcs", max_iterations=1)
    (iteration,) = MultiReferenceAligner(options, in_memory(images), truth.references)
    good = np.setdiff1d(np.arange(30), (3, 7))
    assert iteration.parameters["class_id"].to_numpy()[good].tolist() == truth.class_id[good].tolist()
    assert np.isfinite(iteration.averages.numpy()).all() and "image 4 " in caplog.text
    assert np.isfinite(iteration.parameters.drop(columns=["image", "pixel_error"]).to_numpy(float)).all()
