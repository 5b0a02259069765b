"""What the commands share: options out of Hydra's hands, and refusals on one screen without a traceback."""

from __future__ import annotations

import ctypes
import difflib
import errno
import logging
import os
import shlex
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchem.errors import InputError
from torchem.runtime import run_folder

if TYPE_CHECKING:
    import torch

Options = TypeVar("Options")

# what a disk or a folder may refuse, before and during a run
_DISK_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
    errno.ENAMETOOLONG,
)  # fmt: skip
# after this, not 5 ms, another thread has its turn: those that read images, write and wake the GPU wait at every step
_SWITCH_SECONDS = 2e-4


def to_options(schema: type[Options], settings: Any) -> Options:
    """Make the dataclass `schema` of nested plain settings; unknown keys and values of a wrong type are refused."""
    # the structured config refuses what +typo=3 had added to Hydra's
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(settings)))
    assert isinstance(options, schema)
    return options


def check_option_names(arguments: Sequence[str], known: Collection[str], groups: Collection[str] = ()) -> None:
    """Refuse options that do not exist, with the nearest that does; Hydra's own advice would be ``+typo=3``.

    Parameters
    ----------
    arguments
        The command line.
    known
        Names like ``sampling.offset_step``.
    groups
        Configuration groups, chosen by ``+group=name``.

    Raises
    ------
    InputError
        Names the option.
    """
    before, sweep = "", _is_sweep(arguments)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        name = key.lstrip("+~-")
        flag, before = before.startswith("-"), argument
        if key.startswith("--") and (same := _ending(name, known)):
            raise InputError(f"{argument}: options are written NAME=VALUE, as {same[0]}=…")
        if not equals and not flag and not key.startswith(("-", "~")):
            raise InputError(f"{argument}: options are written NAME=VALUE, without blanks beside =")
        if equals and not key.startswith("-"):
            _check_value(argument, sweep)
        if not equals or key.startswith("-") or name in known or name.partition(".")[0].startswith("hydra"):
            continue
        if name in groups:
            wanted = "NAME" if value in ("", "null") else value
            if wanted != value or not key.startswith("+"):
                raise InputError(f"{argument}: write +{name}={wanted}")
            continue
        near = _like(name, known)
        advice = f"did you mean {near[0]}?" if near else "see --cfg job for all options"
        raise InputError(f"{argument}: there is no option {name}; {advice}")


def _is_sweep(arguments: Sequence[str]) -> bool:
    """Whether Hydra is asked to run a job for each of several values.

    Raises
    ------
    InputError
        The flag stands between options, of which Hydra would not know the later ones.
    """
    flags = [i for i, a in enumerate(arguments) if a == "-m" or (a[:4] == "--mu" and "--multirun".startswith(a))]
    options = [i for i, a in enumerate(arguments) if "=" in a and not a.startswith("-")]
    if flags and options and options[0] < flags[0] < options[-1]:
        raise InputError(f"{arguments[flags[0]]}: write it before or after all options")
    return bool(flags) or "hydra.mode=MULTIRUN" in arguments


def _check_value(argument: str, sweep: bool) -> None:
    """Refuse a value that Hydra reads as something else than the user meant; its own message names its grammar."""
    key, _, value = argument.partition("=")
    hydras = '"' + value.replace('"', '\\"') + '"'
    quoted = f"write {shlex.quote(f'{key}={hydras}')} with all these quotes"
    try:
        several = OverridesParser.create().parse_overrides([argument])[0].is_sweep_override()
    except OverrideParseException:
        raise InputError(f"{argument}: {quoted}") from None
    if several and not sweep:
        raise InputError(f"{argument}: add -m to run one job for each value; if it is one value, {quoted}")


def _ending(last: str, known: Collection[str]) -> list[str]:
    """The options of a name, whatever their groups."""
    return [option for option in known if option.rpartition(".")[2] == last]


def _like(name: str, known: Collection[str]) -> list[str]:
    """The options of the same name in other groups, or else nearly of it, or whose names hold it, or a bit like it."""
    last = name.rpartition(".")[2]
    return (
        _ending(last, known)
        or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        or [option for option in known if len(last) > 2 and last in option.rpartition(".")[2]]
        or difflib.get_close_matches(name, known, n=1)
    )


def resumed(
    schema: type[Options], settings: Mapping[str, Any], given: Mapping[str, Any], default: Mapping[str, Any]
) -> Options:
    """Options of a run's `settings`, but for those of the command line, not of the `default`, or free to change."""
    config, usual = OmegaConf.create(dict(settings)), run_folder.flatten(default)
    line = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    named = {argument.partition("=")[0].lstrip("+~") for argument in line}
    for option, value in run_folder.flatten(given).items():
        if value != usual.get(option) or option in named or run_folder.may_change(option):
            OmegaConf.update(config, option, value)
    return to_options(schema, config)


def output_folder() -> Path:
    """The folder that Hydra made, relative to the current one if it is inside: RELION's files name each other so."""
    folder, here = Path(HydraConfig.get().runtime.output_dir), Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


@contextmanager
def telling(interrupted: str) -> Iterator[None]:
    """End the process with a message for everything that the user can mend.

    Wrap the whole command, and what Hydra calls once more: it would add to what it lets through.

    Parameters
    ----------
    interrupted
        What becomes of the work after Ctrl-C.
    """
    # Hydra then lets errors through as they are
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except InputError as error:
        _fail("" if error.elsewhere else str(error))
    except (HydraException, OmegaConfBaseException) as error:
        # Hydra's own message says which option, its cause why
        cause = str(error.__cause__ or "").partition("\n")[0]
        _fail(": ".join(text for text in (str(error), cause) if text))
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _fail(f"{error.filename}: {error.strerror}; free space or rights, or choose another hydra.run.dir=FOLDER")
    except KeyboardInterrupt:
        _fail(f"interrupted: {interrupted}", status=130)
    finally:
        _remove_empty_folder()


def start_driver(device: str) -> None:
    """Start NVIDIA's driver on a thread, unless `device` is ``cpu``: PyTorch's own import takes longer than that."""

    def start() -> None:
        try:
            ctypes.CDLL("libcuda.so.1").cuInit(0)
        except OSError:
            pass  # no driver is here: PyTorch will find no GPU

    if device != "cpu":
        threading.Thread(target=start).start()


def leave() -> NoReturn:
    """End the process now that all is written: Python would tidy up itself and a GPU for a second, the system can."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wake(device: torch.device) -> None:
    """Start a GPU beside other work, and what takes long at its first use: Triton, transforms, products, sorting."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    if device.type == "cuda":
        threading.Thread(target=_wake_triton, args=(device,)).start()
        threading.Thread(target=_wake_libraries, args=(device,)).start()


def _wake_triton(device: torch.device) -> None:
    import torch

    from torchem.ops.significant import posterior

    # Triton finds the kernels that it compiled before by a hash of itself, half a gigabyte
    with torch.cuda.device(device):
        posterior(torch.zeros(2, device=device), torch.tensor([0, 2], device=device), 0.999)


def _wake_libraries(device: torch.device) -> None:
    import torch

    with torch.cuda.device(device):
        torch.view_as_real(torch.fft.rfft2(torch.ones((8, 8), device=device))).sum().item()
        for dtype in (torch.float16, torch.float32, torch.float64):
            some = torch.ones((2, 16, 16), dtype=dtype, device=device)
            torch.mm(some[0], some[1])
            torch.bmm(some, some)
        torch.unique(torch.zeros(2, dtype=torch.int64, device=device), return_inverse=True)
        torch.cuda.synchronize()


def _remove_empty_folder() -> None:
    """Take back the run's folder, which Hydra makes before anything is looked at, where nothing came of it."""
    if HydraConfig.initialized():
        folder = output_folder()
        for empty in (folder, folder.parent):
            try:
                empty.rmdir()
            except OSError:
                return  # something is in it


def _fail(message: str, status: int = 1) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)
