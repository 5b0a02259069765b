"""Where an iteration's time goes: the stages of the first iterations of a refinement of the phantom."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from torchem.benchmarks.measure import Case, synchronize
from torchem.benchmarks.refine import SIZES, check_parity, make_refiner
from torchem.em import refiner
from torchem.em.expectation import Expectation
from torchem.em.refiner import Refiner

__all__ = ["PLOTTED", "REPEATS", "SIZES", "check_parity", "rows"]

REPEATS, PLOTTED = 5, ("seconds",)
STAGES = (
    (Refiner, "_estimate_accuracy", "accuracy"), (refiner, "prepare_images", "images"),
    (Expectation, "_coarse_pass", "coarse pass"), (Expectation, "_fine_pass", "fine pass"),
    (Expectation, "_accumulate", "sums"), (Refiner, "_maximization", "maximization"),
)  # fmt: skip


def rows(case: Case) -> Iterator[dict]:
    """A row for each stage of ``repeats`` iterations; the device is waited for around each stage."""
    run = make_refiner(case)
    for _ in range(case.repeats):
        with timed_stages() as seconds:
            whole = run.step()
        seconds["rest"] = whole.seconds - sum(seconds.values())
        for stage, time_ in (*seconds.items(), ("whole", whole.seconds)):
            yield {
                "n_particles": case.n_particles, "box": case.box, "precision": case.precision or "single",
                "iteration": whole.number, "healpix_order": whole.healpix_order, "local": whole.local,
                "current_size": whole.current_size, "coarse_size": whole.coarse_size, "stage": stage,
                "seconds": time_, "of_iteration": time_ / whole.seconds,
            }  # fmt: skip
        if whole.converged:
            return


@contextmanager
def timed_stages() -> Iterator[dict[str, float]]:
    """Seconds by stage of what runs inside."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(call: Callable, stage: str) -> Callable:
        def run(*arguments: object, **options: object) -> object:
            synchronize()
            start = time.perf_counter()
            result = call(*arguments, **options)
            synchronize()
            seconds[stage] += time.perf_counter() - start
            return result

        return run

    with ExitStack() as stack:
        for owner, name, stage in STAGES:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), stage)))
        yield seconds
