"""Checkpoints: all that a run needs to go on, exactly; the same state gives the same bytes."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from torchem.data.files import replacing
from torchem.errors import InputError


def write_checkpoint(path: Path, plain: dict[str, Any]) -> None:
    """Write a state taken apart into tensors, numbers, lists and dicts, and its ``generator``."""
    buffer = io.BytesIO()
    torch.save(plain | {"generator": plain["generator"].get_state()}, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`write_checkpoint` was given, on the host.

    Raises
    ------
    InputError
        The file is broken.
    """
    generator = torch.Generator()
    try:
        plain: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        generator.set_state(plain["generator"])
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} cannot be read ({reason}); move {path.name.removesuffix('checkpoint.pt')}* out of the folder to "
            "go on from the iteration before, or start a new run with run_name=NEW"
        ) from error
    plain["generator"] = generator
    return plain
