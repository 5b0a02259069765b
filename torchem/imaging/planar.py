"""Images turned, shifted and mirrored by the parameters of 2D alignment."""

import torch
from torch import Tensor

from torchem.ops.spline import spline_coefficients, spline_values


def transformed(images: Tensor, alpha: Tensor, sx: Tensor, sy: Tensor, mirror: Tensor) -> Tensor:
    """Aligned images: rotate, then shift, then mirror, EMAN2's combined transform, by cubic splines.

    out(M (R p + s)) = image(p) for points p from the centre, pixel L // 2; R = [[cos α, sin α], [−sin α, cos α]], and M
    turns x to −x.

    Parameters
    ----------
    images
        `(n, L, L)`.
    alpha
        `(n,)` degrees.
    sx, sy
        `(n,)` pixels.
    mirror
        `(n,)` 0 or 1.

    Returns
    -------
    `(n, L, L)`, 0 where nothing of the image comes to lie.
    """
    angle, sign = torch.deg2rad(alpha.to(images)), 1 - 2 * mirror.to(images)
    return spline_values(spline_coefficients(images), angle, sx.to(images), sy.to(images), sign)
