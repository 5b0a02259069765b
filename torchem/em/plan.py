"""How much of the data is worked on at once: batch and chunk sizes from the memory there is, and what they need."""

from dataclasses import dataclass, field

import torch

from torchem.errors import InputError
from torchem.runtime import memory

# bytes held at once for each complex pixel of a chunk: slices, products and interpolation points
BYTES_PER_CHUNK_ELEMENT = 96
# bytes held for each pixel of a batch: both transforms, CTFs, operands of the scores; more where noise fills the masks
BYTES_PER_BATCH_PIXEL, BYTES_PER_NOISE_PIXEL = 120, 220
# of them, those of what stays for the whole batch
BYTES_PER_PREPARED_PIXEL = 20
# bytes held for each value of a table of slices, and beside that while it is made
BYTES_PER_SLICE_PIXEL, BYTES_WHILE_CUT = 24, 40
# bytes for each voxel of a map at Nyquist, padding 2: maps and voxel lists; volume and both halves' sums; the M-step
BYTES_PER_VOXEL = {"run": 70, "iteration": 180, "chunk": 520}
# a GPU looks up this many bytes of voxels at once to symmetrise
SYMMETRY_BYTES = 2**30
# bytes held for each fine weight: the weight, its row, and what finding the significant ones takes
BYTES_PER_FINE_WEIGHT = 64


@dataclass(frozen=True)
class Plan:
    """Sizes that fit the memory for every iteration up to Nyquist.

    Attributes
    ----------
    chunk_elements
        complex values in one temporary of the E-step.
    fine_weights
        fine-pass weights held at once: particles whose weights exceed it go in several parts.
    batch_particles
        particles prepared at once.
    keep_images
        whether all images of this process stay on the device between iterations.
    needs
        bytes that each lifetime takes at most.
    """

    chunk_elements: int
    fine_weights: int
    batch_particles: int
    keep_images: bool
    needs: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kept = "images stay on the device" if self.keep_images else "images are read again in every iteration"
        chunks = f"{self.chunk_elements / 1e6:.3g} M pixels, {self.fine_weights / 1e6:.3g} M fine weights"
        return f"batches of {self.batch_particles} particles, chunks of {chunks}; {kept}"


def make_plan(
    n_particles: int, box: int, device: torch.device, dtype: torch.dtype, *, map_box: int | None = None,
    table: int = 0, noise: bool = False, limit: int = 0,
) -> Plan:  # fmt: skip
    """Divide the free memory beside the volumes: a quarter each for images, a batch, and a chunk or fine weights.

    Parameters
    ----------
    n_particles
        of this process.
    box
        pixels, of the largest images.
    map_box
        pixels, of the maps; None: as the images.
    table
        complex values in the largest table of coarse slices.
    noise
        noise fills the outside of the masks.
    limit
        bytes that all tensors may take; 0: what is free.

    Raises
    ------
    InputError
        It is not enough.
    """
    width = torch.finfo(dtype).bits // 32
    free = memory.available(device, limit)
    needs = {name: width * size * (map_box or box) ** 3 for name, size in BYTES_PER_VOXEL.items()}
    needs["iteration"] += width * BYTES_PER_SLICE_PIXEL * table
    if device.type == "cuda":
        needs["chunk"] += SYMMETRY_BYTES
    quarter = max(0, free - needs["run"] - needs["iteration"]) // 4
    image_bytes = 4 * box * box * width
    keep = n_particles * image_bytes <= quarter
    # a batch also holds whole transforms of its images while it is prepared
    pixels = width * box * box // 2
    per_particle = (BYTES_PER_NOISE_PIXEL if noise else BYTES_PER_BATCH_PIXEL) * pixels
    batch = max(1, min(n_particles, quarter // per_particle))
    # larger chunks than this gain nothing: on a CPU they should stay near its caches
    largest = 2**21 if device.type == "cpu" else 2**27
    chunk = max(2**16, min(largest, quarter // (BYTES_PER_CHUNK_ELEMENT * width)))
    weights = max(2**16, min(2**28, quarter // (BYTES_PER_FINE_WEIGHT * width)))
    return _checked(Plan(chunk, weights, batch, keep, needs), free, n_particles * image_bytes, pixels, width, table)


def _checked(plan: Plan, free: int, image_bytes: int, pixels: int, width: int, table: int) -> Plan:
    """The plan with what images, batches and chunks need, too; refused if it does not fit."""
    batch, needs = plan.batch_particles, plan.needs
    # one batch is worked on, one waits and one is read
    needs["run"] += image_bytes if plan.keep_images else 3 * 8 * pixels * batch
    needs["batch"] = BYTES_PER_PREPARED_PIXEL * pixels * batch
    # in the E-step: operands, and beside them the largest of what is done with them
    operands = (BYTES_PER_BATCH_PIXEL - BYTES_PER_PREPARED_PIXEL) * pixels * batch
    work = width * max(
        BYTES_PER_CHUNK_ELEMENT * plan.chunk_elements,
        # dense matrix products need a table of slices as large
        (BYTES_PER_FINE_WEIGHT + BYTES_WHILE_CUT) * plan.fine_weights,
        BYTES_WHILE_CUT * table,
    )
    needs["chunk"] = max(needs["chunk"], operands + work)
    if sum(needs.values()) > free:
        shown = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in needs.items())
        raise InputError(
            f"this refinement needs {sum(needs.values()) / 2**30:.2f} GiB of memory in batches of {batch} particles "
            f"({shown}), and there are {free / 2**30:.2f}; take a GPU with more, a larger memory.limit, a smaller box, "
            "or precision=single"
        )
    return plan
