"""The rehearsal comes by everything that a refinement comes by, or the real one would still wait for its kernels."""

import pytest
import torch
from torch import Tensor

from torchem.em import rehearsal
from torchem.em.expectation import Expectation, Samples
from torchem.em.images import ImageBatch


def test_rehearsal_takes_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[bool, bool, bool]] = []
    is_dense, call = Expectation._is_dense, Expectation.__call__
    sums: list[Tensor] = []

    def noted(self: Expectation, batch: ImageBatch, samples: Samples) -> bool:
        dense = is_dense(self, batch, samples)
        taken.append((self.settings.cross_correlation, dense, self.settings.local_sigma is not None))
        return dense

    def called(self: Expectation, *arguments: object) -> object:
        found = call(self, *arguments)
        sums.append(self.sums.weight.sum())
        return found

    monkeypatch.setattr(Expectation, "_is_dense", noted)
    monkeypatch.setattr(Expectation, "__call__", called)
    rehearsal.rehearse(torch.device("cpu"))
    # correlation, dense, sparse, local
    paths = [(True, False, False), (False, True, False), (False, False, False), (False, False, True)]
    assert taken == [path for path in paths for _ in range(2)]
    assert all(weight > 0 for weight in sums)
