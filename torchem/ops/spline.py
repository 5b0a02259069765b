"""Cubic splines through images, and their values where the pixels of turned, shifted and mirrored images come from."""

import math

import torch
from torch import Tensor

# pixels beyond an image that a spline half a pixel beyond it reaches
BORDER = 2


def spline_coefficients(images: Tensor) -> Tensor:
    """What cubic B-splines on the pixels are multiplied by to add up to the images, which go on periodically.

    The transform of the B-spline's samples, (2 + cos 2πk/L)/3 along each axis, is divided out (Unser 1999).
    """
    box = images.shape[-1]
    wave = 2 * math.pi / box * torch.arange(box, dtype=torch.float64, device=images.device)
    samples = ((2 + wave.cos()) / 3).to(images.dtype)
    return torch.fft.irfft2(torch.fft.rfft2(images) / (samples[:, None] * samples[: box // 2 + 1]), s=(box, box))


def spline_values(
    coefficients: Tensor, angle: Tensor, sx: Tensor, sy: Tensor, sign: Tensor, backend: str | None = None
) -> Tensor:
    """Splines at the places p = Rᵀ (M y − s) of all pixels y from the centre, pixel L // 2; 0 beyond the image.

    R = [[cos α, sin α], [−sin α, cos α]]; M multiplies x by the sign.

    Parameters
    ----------
    coefficients
        `(n, L, L)`.
    angle
        `(n,)` radians, α.
    sx, sy
        `(n,)` pixels.
    sign
        `(n,)` 1, or −1 for mirrored images.
    backend
        "triton" (float32) or "reference"; by default Triton for float32 on a GPU.
    """
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend is {backend!r}; it must be triton or reference")
    box = coefficients.shape[-1]
    cosine, sine = angle.cos(), angle.sin()
    if backend == "triton" or (backend is None and coefficients.is_cuda and coefficients.dtype == torch.float32):
        from torchem.kernels.spline import spline_values as kernel

        out = torch.empty_like(coefficients)
        places = (values.contiguous() for values in (cosine, sine, sign, sx, sy))
        kernel[(len(out), -(-box * box // 512))](
            coefficients.contiguous(), *places, out, box, PIXELS=512, num_warps=4
        )  # fmt: skip
        return out

    axis = torch.arange(box, dtype=coefficients.dtype, device=coefficients.device) - box // 2
    x = sign[:, None] * axis - sx[:, None]  # (n, L)
    y = axis - sy[:, None]
    columns = (cosine[:, None] * x)[:, None, :] - (sine[:, None] * y)[:, :, None] + box // 2  # (n, L, L)
    rows = (sine[:, None] * x)[:, None, :] + (cosine[:, None] * y)[:, :, None] + box // 2
    # a spline at the border takes coefficients from beyond it
    padded = torch.nn.functional.pad(coefficients[:, None], (BORDER,) * 4, mode="circular")
    result = torch.zeros_like(coefficients)
    across = _pairs(columns, box)
    for weight, place in _pairs(rows, box):
        for other, beside in across:
            points = torch.stack([beside, place], -1)
            values = torch.nn.functional.grid_sample(padded, points, align_corners=True)
            result.addcmul_(weight * other, values[:, 0])
    return result


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
