"""Checkpoints: all that a run needs to go on, exactly; the same state gives the same bytes."""

from pathlib import Path
from typing import Any

import torch

from torchem.data.files import replacing


def write_checkpoint(path: Path, plain: dict[str, Any]) -> None:
    """Write a state taken apart into tensors, numbers, lists and dicts, and its ``generator``."""
    # an open file: of a path the temporary name would stand in it
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(plain | {"generator": plain["generator"].get_state()}, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`write_checkpoint` was given, on the host."""
    plain: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    generator = torch.Generator()
    generator.set_state(plain["generator"])
    plain["generator"] = generator
    return plain
