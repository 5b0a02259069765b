"""PyTorch on the stack on a GPU, each in a process of its own, since CUDA's first allocator stays."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]

START = """
import torch
from torchem.errors import InputError
from torchem.runtime import memory
here = torch.device("cuda", 0)
"""


def python(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START + script, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_installed_before_cuda_starts() -> None:
    python("""
assert not torch.cuda.is_initialized()
memory.install(here, "stack", strict=True)
assert not torch.cuda.is_initialized()
before = torch.ones(1000, device=here)
assert memory.installed().statistics().live >= 4096
memory.warm_up(here)
with memory.scope("iteration"):
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float16):
        with memory.scope("batch"):
            torch.ones((300, 300), dtype=dtype, device=here) @ torch.ones((300, 200), dtype=dtype, device=here)
    with memory.scope("batch"):
        half = torch.ones((300, 300), dtype=torch.float16, device=here)
        torch.mm(half, half, out_dtype=torch.float32)
        del half
    with memory.scope("batch"):
        torch.fft.irfftn(torch.fft.rfftn(torch.ones((64, 64, 64), device=here)))
    with memory.scope("batch"):
        values = torch.randn(100000, device=here)
        torch.unique((values * 10).long(), return_inverse=True), values.sort(), torch.nonzero(values > 0)
        torch.bincount((values.abs() * 10).long()), values.cumsum(0), torch.empty(0, device=here)
        del values
assert memory.installed().statistics().survivors == 0
""")


def test_of_itself_for_one_process() -> None:
    python("""
memory.install(here, "auto", processes=2)
assert memory.installed() is None
memory.install(here, "auto")
kept = torch.ones(1000, device=here)
assert memory.installed().statistics().live >= 4096
memory.install(here, "auto")
""")
    python("""
torch.ones(1, device=here)
memory.install(here, "auto")
assert memory.installed() is None
""")


def test_too_late() -> None:
    python("""
torch.ones(1, device=here)
try:
    memory.install(here, "stack")
except InputError as error:
    assert "CUDA has started" in str(error)
else:
    raise AssertionError
""")


def test_running_out_is_an_exception_with_the_plan_and_the_process_goes_on() -> None:
    python("""
memory.install(here, "stack", limit=256 << 20)
kept = torch.ones(1000, device=here)
try:
    torch.empty(1 << 30, dtype=torch.uint8, device=here)
except RuntimeError as error:
    assert "no room for 1024.0 MiB in the run range" in str(error) and "largest blocks" in str(error), error
else:
    raise AssertionError
assert float((kept + 1).sum()) == 2000
assert memory.installed().statistics().mapped <= 256 << 20
""")


def test_survivor() -> None:
    python("""
memory.install(here, "stack", strict=True)
try:
    with memory.scope("iteration"):
        survivor = torch.ones(1000, device=here)
except memory.ScopeError as error:
    assert "4096 bytes, made at <string>" in str(error), error
else:
    raise AssertionError
""")


def test_memory_recorded_on_another_stream_is_not_used_again_too_early() -> None:
    python("""
memory.install(here, "stack")
side = torch.cuda.Stream(here)
for _ in range(20):
    source = torch.full((1 << 22,), 3.0, device=here)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # the copy comes long after the release
        copied = source * 1
    source.record_stream(side)
    address = source.data_ptr()
    del source
    other = torch.full((1 << 22,), 5.0, device=here)
    assert other.data_ptr() == address
    side.synchronize()
    assert bool((copied == 3).all()) and bool((other == 5).all())
    del copied, other
""")


def test_images_read_ahead_on_a_stream() -> None:
    """As the refinement does: made on one stream, used on another, let go by the main thread."""
    python("""
from concurrent.futures import ThreadPoolExecutor
memory.install(here, "stack", limit=512 << 20, strict=True)
stream = torch.cuda.Stream(here)
def read(number):
    with torch.cuda.stream(stream):
        images = torch.full((1 << 22,), float(number), device=here)
        torch.isfinite(images)
        return images, stream.record_event()
with ThreadPoolExecutor(1) as reader, memory.scope("iteration"):
    ahead = [reader.submit(read, 0)]
    for number in range(50):
        ahead.append(reader.submit(read, number + 1))
        images, ready = ahead.pop(0).result()
        present = torch.cuda.current_stream(here)
        present.wait_event(ready)
        images.record_stream(present)
        with memory.scope("batch"):
            torch.cuda._sleep(1_000_000)
            assert float((images * 2).amax()) == 2 * number == float((images * 2).amin())
        del images, ready
    ahead.pop().result()
now = memory.installed().statistics()
assert now.survivors == 0 and now.elsewhere >= 100 and now.waste == 0, now
assert now.ranges["run"].peak_top < 256 << 20, now
""")


REFINED = """
import sys
from pathlib import Path
from torchem.data.mrc import read_map
from torchem.data.particles import Particles
from torchem.em.options import DatasetOptions, ReferenceOptions, RefineOptions, SamplingOptions
from torchem.em.refiner import Refiner
from torchem.runtime.distributed import be_deterministic
allocator, precision, other = sys.argv[1:]
other = other == "other"
be_deterministic(True)
memory.install(here, allocator, limit=4 << 30, strict=True)
options = RefineOptions(
    dataset=DatasetOptions(particle_diameter=50.0, symmetry="C2" if other else "C1"),
    reference=ReferenceOptions(ini_high=30.0, absolute_greyscale=other),
    sampling=SamplingOptions(healpix_order=0, local_healpix_order=1), device="cuda", precision=precision,
    zero_mask=not other, deterministic=True, max_iterations=12,
)
options.memory.limit = "4GiB"
Path(allocator).mkdir()
refiner = Refiner(options, Particles.read("particles.star"), read_map("reference.mrc")[0], folder=Path(allocator))
local = [iteration.local for iteration in refiner]
assert True in local and False in local, local
if arena := memory.installed():
    now = arena.statistics()
    assert now.survivors == now.waste == now.strays == 0, now
"""


@pytest.mark.parametrize(("precision", "other"), [("single", "usual"), ("single", "other"), ("double", "usual")])
def test_whole_refinement(small_set: Callable, precision: str, other: str) -> None:
    """Strict: no survivor; and the same bytes as with PyTorch's allocator."""
    small_set(n=16)
    for allocator in ("torch", "stack"):
        python(REFINED, allocator, precision, other)
    names = sorted(path.name for path in Path("torch").iterdir() if path.suffix in (".mrc", ".pt"))
    assert len(names) > 10
    for name in names:
        assert (Path("torch") / name).read_bytes() == (Path("stack") / name).read_bytes(), name
