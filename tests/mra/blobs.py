"""Small simulated sets: images of a few blobs, turned, shifted, mirrored and noisy."""

from dataclasses import dataclass

import numpy as np
import torch

from torchem.data.images import Images
from torchem.imaging.planar import transformed


@dataclass(frozen=True)
class Truth:
    """Which reference each image shows, and how: EMAN2's parameters of what brings it back."""

    references: np.ndarray
    images: np.ndarray
    class_id: np.ndarray
    mirror: np.ndarray


def blobs(n: int, k: int, box: int = 24, noise: float = 0.3, seed: int = 0, reach: float = 1.0) -> Truth:
    """Images of k references of unit variance, shifts uniform up to ``reach`` pixels."""
    random = np.random.default_rng(seed)
    axis = np.arange(box) - box // 2
    spots = random.uniform(-0.25 * box, 0.25 * box, (k, 6, 2, 1, 1))
    references = np.exp(-((axis - spots[:, :, 0]) ** 2 + (axis[:, None] - spots[:, :, 1]) ** 2) / 5).sum(1)
    references /= references.std((1, 2), keepdims=True)
    class_id, mirror = random.permutation(np.arange(n) % k), random.integers(0, 2, n)
    chosen = torch.tensor(references[class_id])
    images = transformed(
        chosen, torch.tensor(random.uniform(0, 360, n)), *torch.tensor(random.uniform(-reach, reach, (2, n))),
        torch.tensor(mirror),
    ).numpy()  # fmt: skip
    images = images + noise * random.standard_normal(images.shape)
    return Truth(references.astype(np.float32), images.astype(np.float32), class_id, mirror)


def in_memory(images: np.ndarray, pixel_size: float | None = 2.0) -> Images:
    """Images that are on no disk."""
    names = [f"{number + 1:06d}@memory.mrcs" for number in range(len(images))]

    def read(rows: np.ndarray | list[int], out: np.ndarray | None = None) -> np.ndarray:
        return np.take(images, np.asarray(rows), 0, out, mode="clip")

    return Images("memory", names, images.shape[-1], pixel_size, read, lambda: None)
