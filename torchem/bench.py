"""Speed and memory beside the rates of the same machine in the same run.

    python -m torchem.bench                                                     the squared difference, all precisions
    python -m torchem.bench bench=fine box=128 n_particles=500                  scores of pairs, slices cut on the way
    python -m torchem.bench -m box=22,42,60 precision=fp16 plot=true            a sweep, drawn
    python -m torchem.bench -m bench=mra n_references=10,20,50,100 plot=true    2D alignment
    python -m torchem.bench bench=weights plot=true                             memory of the fine weights

Every benchmark first checks that its results agree with a plainer computation, then prints a table, appends it to a CSV
file (outputs/bench/BENCH.csv) and with ``plot=true`` draws that file beside it. One file a benchmark:
torchem/benchmarks/.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from torchem.commands import check_option_names, telling, to_options
from torchem.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_NUMBERS = ("n_particles", "box", "n_orientations", "n_shifts", "repeats")
_OPTIONAL = ("n_references", "x_range")
BENCHES = (
    "squared_difference", "significant", "fine", "backproject", "iteration", "refine", "weights", "memory", "mra",
)  # fmt: skip


@dataclass
class Settings:
    """What is measured; numbers that are not given are the benchmark's own."""

    bench: str = "squared_difference"  # significant, fine, backproject, iteration, refine, weights, memory, mra
    n_particles: int | None = None
    box: int | None = None  # px
    n_orientations: int | None = None  # fine, backproject: a particle's
    n_shifts: int | None = None
    n_references: int | None = None  # mra
    x_range: float | None = None  # mra: px on either side, in x and y
    # squared_difference: fp16, split, three, tf32, fp32, fp64, correlation, plain; others: single, double
    precision: str | None = None
    backend: str | None = None  # squared_difference: triton, matmul, reference
    repeats: int | None = None  # of which the median is taken: 5; iteration, refine, weights, memory: most iterations
    csv: str = "outputs/bench/${bench}.csv"
    plot: bool = False

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises
        ------
        InputError
            Option, value, remedy.
        """
        if self.bench not in BENCHES:
            raise InputError(f"bench={self.bench}: must be one of {', '.join(BENCHES)}")
        for name in (*_NUMBERS, "n_references"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1")
        mine, others = (self.n_references, self.x_range), (self.n_orientations, self.n_shifts)
        if self.bench != "mra" and mine != (None, None):
            raise InputError(f"bench={self.bench}: n_references and x_range are for bench=mra")
        if self.bench == "mra" and others != (None, None):
            raise InputError("bench=mra: give n_references and x_range, not n_orientations and n_shifts")
        if self.x_range is not None and not 0 <= self.x_range < 50:
            raise InputError(f"x_range={self.x_range}: must be between 0 and 50 px")
        if self.bench != "squared_difference":
            kinds = ("single",) if self.bench == "mra" else ("single", "double")
            if self.precision not in (None, *kinds):
                raise InputError(f"precision={self.precision}: must be {' or '.join(kinds)} for bench={self.bench}")
            if self.backend is not None:
                raise InputError(f"backend={self.backend}: only bench=squared_difference has a choice")


ConfigStore.instance().store(name="bench_schema", node=Settings)

_INTERRUPTED = "what was measured so far is not kept"


def main() -> None:
    """Run the command; whatever the user can mend is told without a traceback."""
    with telling(_INTERRUPTED):
        check_option_names(sys.argv[1:], [field.name for field in fields(Settings)])
        _command()


@hydra.main(version_base="1.3", config_path="pkg://torchem.configs", config_name="bench")
def _command(config: DictConfig) -> None:
    with telling(_INTERRUPTED):
        run(to_options(Settings, OmegaConf.to_container(config, resolve=True)))


def run(settings: Settings) -> None:
    """Check, measure, print and append to the CSV file.

    Raises
    ------
    InputError
        Options that cannot be used, or a CSV file of something else.
    """
    settings.check()
    import pandas as pd
    import torch

    from torchem.benchmarks.measure import DEVICE, Case, table

    benchmark = importlib.import_module(f"torchem.benchmarks.{settings.bench}")
    own = dict(zip(_NUMBERS, (*benchmark.SIZES[DEVICE.type], benchmark.REPEATS), strict=True))
    chosen = {name: getattr(settings, name) for name in (*_NUMBERS, *_OPTIONAL) if getattr(settings, name) is not None}
    case = Case(**own | chosen, precision=settings.precision, backend=settings.backend)

    torch.backends.cuda.matmul.allow_tf32 = False
    benchmark.check_parity()
    rows = list(benchmark.rows(case))
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{settings.bench} on {device}, torch {torch.__version__}\n{table(rows)}", flush=True)
    path = Path(settings.csv)
    measured = _append(path, pd.DataFrame(rows).assign(device=device, torch=torch.__version__))
    if settings.plot:
        from torchem.benchmarks.plot import draw

        draw(measured, benchmark.PLOTTED, path.with_suffix(".png"))


def _append(path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Everything that the file holds then."""
    import pandas as pd

    if path.is_file():
        before = pd.read_csv(path)
        if list(before) != list(rows):
            raise InputError(f"csv={path}: holds other columns; give another csv=FILE.csv, or move it away")
        rows = pd.concat([before, rows.astype(object)], ignore_index=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False)
    return pd.read_csv(path)


if __name__ == "__main__":
    main()
