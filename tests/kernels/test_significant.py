"""The posterior kernel against the PyTorch reference."""

import pytest
import torch

from torchem.ops import significant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("fraction", [0.5, 0.999, 0.9999])
@pytest.mark.parametrize("spread", [0.01, 5.0, 500.0])
def test_posterior(fraction: float, spread: float) -> None:
    counts = torch.tensor([1, 300, 57, 513, 2])
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    generator = torch.Generator().manual_seed(1)
    log_weights = spread * torch.randn(int(counts.sum()), generator=generator) - 1000
    expected = significant.posterior(log_weights.double(), first, fraction)
    found = significant._posterior_on_gpu(log_weights.to(DEVICE), first.to(DEVICE), fraction)
    assert torch.equal(found.best.cpu(), expected.best)
    assert torch.equal(found.top.cpu().double(), expected.top)
    assert torch.allclose(found.log_total.cpu(), expected.log_total, atol=1e-6)
    assert torch.allclose(found.kept.cpu().double(), expected.kept, rtol=1e-4, atol=1e-7)
    # members may differ within 1e-3 nats of the threshold
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    least = torch.full((len(counts),), torch.inf).scatter_reduce(
        0, rows, torch.where(expected.kept > 0, log_weights, torch.inf), "amin"
    )
    clear = (log_weights - least[rows]).abs() > 1e-3
    assert torch.equal((found.kept.cpu() > 0)[clear], (expected.kept > 0)[clear])


def test_first_of_equal_maxima_is_the_best() -> None:
    values = torch.zeros(700)
    values[[300, 301, 650]] = 1
    found = significant._posterior_on_gpu(values.to(DEVICE), torch.tensor([0, 700], device=DEVICE), 0.999)
    assert int(found.best) == 300
