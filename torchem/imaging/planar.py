"""Images turned, shifted and mirrored by the parameters of 2D alignment."""

import math

import torch
from torch import Tensor

# pixels beyond an image that a spline half a pixel beyond it reaches
BORDER = 2


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
    box = images.shape[-1]
    angle = torch.deg2rad(alpha.to(images))
    cosine, sine = angle.cos(), angle.sin()
    sign = 1 - 2 * mirror.to(images)
    # p = Rᵀ (M y − s)
    axis = torch.arange(box, dtype=images.dtype, device=images.device) - box // 2
    x = sign[:, None] * axis - sx.to(images)[:, None]  # (n, L)
    y = axis - sy.to(images)[:, None]
    columns = (cosine[:, None] * x)[:, None, :] - (sine[:, None] * y)[:, :, None] + box // 2  # (n, L, L)
    rows = (sine[:, None] * x)[:, None, :] + (cosine[:, None] * y)[:, :, None] + box // 2
    # a spline at the border takes coefficients from beyond it
    coefficients = torch.nn.functional.pad(spline_coefficients(images)[:, None], (BORDER,) * 4, mode="circular")
    result = torch.zeros_like(images)
    across = _pairs(columns, box)
    for weight, place in _pairs(rows, box):
        for other, beside in across:
            points = torch.stack([beside, place], -1)
            values = torch.nn.functional.grid_sample(coefficients, points, align_corners=True)
            result.addcmul_(weight * other, values[:, 0])
    return result


def spline_coefficients(images: Tensor) -> Tensor:
    """What cubic B-splines on the pixels are multiplied by to add up to the images, which go on periodically.

    The transform of the B-spline's samples, (2 + cos 2πk/L)/3 along each axis, is divided out (Unser 1999).
    """
    box = images.shape[-1]
    wave = 2 * math.pi / box * torch.arange(box, dtype=torch.float64, device=images.device)
    samples = ((2 + wave.cos()) / 3).to(images.dtype)
    return torch.fft.irfft2(torch.fft.rfft2(images) / (samples[:, None] * samples[: box // 2 + 1]), s=(box, box))


def _pairs(place: Tensor, box: int) -> list[tuple[Tensor, Tensor]]:
    """A cubic B-spline's four weights as those of two linear interpolations (Ruijters et al. 2008).

    Weight, 0 beyond the image, and place of each; grid_sample counts from −1, the first pixel of the border, to 1.
    """
    pixel = place.floor()
    f = place - pixel
    outer, inner = (1 - f) ** 3 / 6, 2 / 3 - f * f * (2 - f) / 2
    low, high = outer + inner, 1 - outer - inner
    scale, inside = 2 / (box + 2 * BORDER - 1), (place >= -0.5) & (place <= box - 0.5)
    places = pixel - 1 + inner / low, pixel + 1 + f**3 / (6 * high)
    return [(w * inside, scale * (x + BORDER) - 1) for w, x in zip((low, high), places, strict=True)]
