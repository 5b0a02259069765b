"""Checkpoints: all that a run needs to go on, exactly; the same state gives the same bytes."""

import io
from pathlib import Path
from typing import Any

import torch

from torchem.data.files import replacing


def write_checkpoint(path: Path, plain: dict[str, Any]) -> None:
    """Write a state taken apart into tensors, numbers, lists and dicts, and its ``generator``."""
    buffer = io.BytesIO()
    torch.save(plain | {"generator": plain["generator"].get_state()}, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`write_checkpoint` was given, on the host."""
    plain: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    generator = torch.Generator()
    generator.set_state(plain["generator"])
    plain["generator"] = generator
    return plain
