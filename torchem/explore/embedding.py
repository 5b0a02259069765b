"""Images as points: two-stage dimension reduction (2SDR), and t-SNE of its scores.

2SDR (Chung et al. 2020, Ann. Math. Sci. Appl. 5:283) models n images of h × w pixels in two stages:

* multilinear PCA: X_i = mean + A U_i Bᵀ + noise, where A (h × p) and B (w × q) have orthonormal columns, found by
  turns: A holds the leading eigenvectors of Σ (X_i − mean) B Bᵀ (X_i − mean)ᵀ, and B those with the roles exchanged;
* PCA of the vectors vec(U_i), whose p·q numbers are few enough for it.

Chung et al. choose the ranks by information criteria. Here they are the numbers of eigenvalues beyond the edge of the
Marchenko–Pastur distribution, the largest that white noise alone would give.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchem.errors import InputError

_TURNS = 10
_SETTLED = 1e-6  # of the variance that is captured
# of 1,000 points neighbourhoods are as true after 500 as after scikit-learn's 1,000 (trustworthiness 0.979)
_TSNE_STEPS = 500


@dataclass(frozen=True)
class TwoStageReduction:
    """Images as `mean + rows (basis scores) columnsᵀ`.

    Attributes
    ----------
    scores
        `(n, r)`, uncorrelated, of decreasing variance.
    mean
        `(h, w)`.
    rows, columns
        `(h, p)` A and `(w, q)` B.
    basis
        `(p, q, r)`, orthonormal: the principal components of U.
    """

    scores: Tensor
    mean: Tensor
    rows: Tensor
    columns: Tensor
    basis: Tensor

    @property
    def variances(self) -> Tensor:
        """`(r,)` variance of each score."""
        return self.scores.square().mean(0)

    def reconstruct(self, scores: Tensor | None = None) -> Tensor:
        """Images `(m, h, w)` of `(m, r)` scores: the denoised images, with no argument."""
        core = torch.einsum("pqr,nr->npq", self.basis, self.scores if scores is None else scores)
        return self.mean + self.rows @ core @ self.columns.T


def two_stage_reduction(
    images: Tensor | np.ndarray, ranks: tuple[int, int] | None = None, components: int | None = None
) -> TwoStageReduction:
    """Reduce images to a few scores each; see the head of this file.

    Parameters
    ----------
    images
        `(n, h, w)`, of any device; at least 3.
    ranks
        p and q of multilinear PCA; by the noise without them.
    components
        r, number of scores; by the noise, and at most 50, without it.

    Raises
    ------
    InputError
        for fewer than 3 images, ranks that do not fit, and images that are all alike or not finite.
    """
    images = torch.as_tensor(images)
    n, height, width = images.shape
    if n < 3:
        raise InputError(f"{n} images are too few to reduce their dimension; give at least 3")
    mean = images.mean(0)
    centred = images - mean
    power = float(centred.square().sum())
    if not 0 < power < float("inf"):
        raise InputError("the images are all alike or hold values that are not finite; there is nothing to reduce")
    row_values, _ = _leading(centred, height)
    column_values, columns = _leading(centred.transpose(1, 2), width)
    # the eigenvalues of white noise of variance s² are near w s²; most of them are noise's
    noise = float(torch.minimum(row_values.median() / width, column_values.median() / height))
    if ranks is None:
        ranks = (_beyond(row_values / width, noise, n * width), _beyond(column_values / height, noise, n * height))
    p, q = ranks
    if not (1 <= p <= height and 1 <= q <= width):
        raise InputError(f"ranks of {p} and {q} do not fit images of {width} x {height} pixels")
    columns, captured = columns[:, :q], 0.0
    for _ in range(_TURNS):
        _, rows = _leading(centred @ columns, p)
        values, columns = _leading(centred.transpose(1, 2) @ rows, q)
        before, captured = captured, n * float(values[:q].sum())
        if captured - before < _SETTLED * power:
            break
    core = rows.T @ centred @ columns  # (n, p, q)
    flat = core.flatten(1)
    _, singular, basis = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    if components is None:
        components = min(_beyond(singular.square() / n, noise, n), 50)
    if not 1 <= components <= len(singular):
        raise InputError(f"{components} components of {n} images at ranks {p} and {q}; choose at most {len(singular)}")
    basis = basis[:components]
    # the sign of a component is arbitrary: its largest element shall be positive, on every machine
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    basis = basis * largest.sign()
    return TwoStageReduction(flat @ basis.T, mean, rows, columns, basis.T.reshape(p, q, components))


def tsne(scores: Tensor | np.ndarray, seed: int = 0) -> np.ndarray:
    """`(n, 2)` positions by t-SNE (van der Maaten & Hinton 2008, scikit-learn) of `(n, r)` scores.

    Raises
    ------
    InputError
        where scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise InputError("t-SNE needs scikit-learn; pip install scikit-learn") from error
    points = np.asarray(torch.as_tensor(scores).cpu(), np.float32)
    # its principal components are the start, so the seed has little to decide
    start = "pca" if points.shape[1] >= 2 else "random"
    perplexity = min(30.0, (len(points) - 1) / 3)
    # its thousand short parallel loops crawl where other processes want the same cores
    with threadpool_limits(1, user_api="openmp"):
        return TSNE(perplexity=perplexity, init=start, random_state=seed, max_iter=_TSNE_STEPS).fit_transform(points)


def _leading(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, decreasing, and the first eigenvectors `(h, count)` of the mean of X Xᵀ over `(n, h, w)`."""
    n, height, _ = matrices.shape
    unfolded = matrices.transpose(0, 1).reshape(height, -1)
    values, vectors = torch.linalg.eigh((unfolded @ unfolded.T).double() / n)
    return values.flip(0), vectors.flip(1)[:, :count].to(matrices.dtype)


def _beyond(values: Tensor, noise: float, samples: int) -> int:
    """How many eigenvalues exceed noise · (1 + √(dimension / samples))², at least 1."""
    edge = noise * (1 + (len(values) / samples) ** 0.5) ** 2
    return max(1, int((values > edge).sum()))
