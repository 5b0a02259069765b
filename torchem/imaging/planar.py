"""Images turned, shifted and mirrored by the parameters of 2D alignment."""

import torch
from torch import Tensor


def transformed(images: Tensor, alpha: Tensor, sx: Tensor, sy: Tensor, mirror: Tensor) -> Tensor:
    """Aligned images: rotate, then shift, then mirror, EMAN2's combined transform, by bicubic interpolation.

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
    box = images.shape[-1]
    angle = torch.deg2rad(alpha.to(images))
    cosine, sine = angle.cos(), angle.sin()
    sign = 1 - 2 * mirror.to(images)
    # p = Rᵀ (M y − s); grid_sample counts from −1, pixel 0, to 1, pixel L − 1
    scale = 2 / (box - 1)
    corner = scale * (box // 2) - 1
    axis = torch.arange(box, dtype=images.dtype, device=images.device) - box // 2
    x = sign[:, None] * axis - sx.to(images)[:, None]  # (n, L)
    y = axis - sy.to(images)[:, None]
    points = torch.stack(
        [
            (cosine[:, None] * x)[:, None, :] - (sine[:, None] * y)[:, :, None],
            (sine[:, None] * x)[:, None, :] + (cosine[:, None] * y)[:, :, None],
        ],
        dim=-1,
    )  # (n, L, L, 2)
    return torch.nn.functional.grid_sample(
        images[:, None], scale * points + corner, mode="bicubic", padding_mode="zeros", align_corners=True
    )[:, 0]
