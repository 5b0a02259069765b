"""The kernel of cubic splines against the PyTorch reference in float64."""

import pytest
import torch

from torchem.ops.spline import spline_coefficients, spline_values

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("box", [2, 20, 33])
@pytest.mark.parametrize("n", [1, 5])
def test_spline_values(box: int, n: int) -> None:
    generator = torch.Generator().manual_seed(box)
    images = torch.randn((n, box, box), generator=generator)
    angle, sx, sy = (torch.rand((3, n), generator=generator) - 0.5) * 12
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    arguments = [x.to(DEVICE) for x in (spline_coefficients(images), angle, sx, sy, sign)]
    expected = spline_values(*(x.double() for x in arguments))
    found = spline_values(*arguments, backend="triton")
    # places on the very edge of an image may fall to either side of it
    assert float(((found - expected).abs() < 1e-4).double().mean()) > 0.999
