r"""Scores of images against shifted projections: minus half the noise-weighted squared distance.

With everything divided by sigma, :math:`-\tfrac12\|X_t - CP\|^2 = -\tfrac12\|X\|^2 + \Re\sum (C X_t) P^* -
\tfrac12 \sum C^2 |P|^2`: a matrix product, a smaller one, and a constant of the image, which is left out here
(Zhang et al. 2018, eq. 5.1; RELION's getAllSquaredDifferences).
"""

import torch
from torch import Tensor


def score(
    images: Tensor, weights: Tensor, projections: Tensor, phases: Tensor, power: Tensor | None = None
) -> Tensor:
    """Score every image against every projection at every shift.

    Parameters
    ----------
    images
        `(n, p)` complex: half-transforms times scale·CTF/σ² (normalised correlation: times scale·CTF).
    weights
        `(n, p)` (scale·CTF)²/σ² (normalised correlation: (scale·CTF)²).
    projections
        `(r, p)` complex: CTF-free central slices.
    phases
        `(t, p)` complex: phase ramps of the shifts applied to the image.
    power
        `(n,)` Σ|X|²: given, the score is the normalised cross-correlation instead.

    Returns
    -------
    `(n, r, t)` real: log-likelihood up to a constant of the image, or the normalised cross-correlation.
    """
    n, t = len(images), len(phases)
    shifted = torch.view_as_real(images[:, None] * phases).reshape(n * t, -1)
    cross = (shifted @ torch.view_as_real(projections).flatten(1).T).reshape(n, t, -1)
    norm = weights @ projections.abs().square().T
    if power is None:
        return cross.sub_(0.5 * norm[:, None]).transpose(1, 2)
    return cross.div_((norm * power[:, None]).sqrt()[:, None]).transpose(1, 2)


def score_pairs(
    images: Tensor, weights: Tensor, projections: Tensor, phases: Tensor, power: Tensor | None = None
) -> Tensor:
    """Score image m against its own projections at every shift: :func:`score` for given pairs only.

    Parameters
    ----------
    images, weights
        `(m, p)`: the image of each pair, as in :func:`score`.
    projections
        `(m, c, p)` complex: the c projections of each pair.
    phases, power
        `(t, p)`; `(m,)` or None.

    Returns
    -------
    `(m, c, t)` real.
    """
    product = projections * images.conj()[:, None]
    cross = torch.view_as_real(product).flatten(-2) @ torch.view_as_real(phases).flatten(1).T
    norm = torch.einsum("mcp,mp->mc", torch.view_as_real(projections).square().sum(-1), weights)
    if power is None:
        return cross.sub_(0.5 * norm[..., None])
    return cross.div_((norm * power[:, None]).sqrt()[..., None])
