"""How much of the data is worked on at once: batch and chunk sizes from the memory there is, and what they need."""

from dataclasses import dataclass, field

import torch

from torchem.em.schedule import ACCURACY_PARTICLES, TRIALS
from torchem.errors import InputError
from torchem.runtime import memory

# bytes held at once for each complex pixel of a chunk: slices, products and interpolation points
BYTES_PER_CHUNK_ELEMENT = 96
# bytes held for each pixel of a batch: both transforms, CTFs, operands of the scores; more where noise fills the masks
BYTES_PER_BATCH_PIXEL, BYTES_PER_NOISE_PIXEL = 120, 220
# of them, those of what stays for the whole batch
BYTES_PER_PREPARED_PIXEL = 20
# bytes held for each value of a table of slices, and while it is cut
BYTES_PER_SLICE_PIXEL, BYTES_WHILE_CUT = 24, {"cpu": 24, "cuda": 56}
# bytes for each voxel of a map at Nyquist, padding 2: maps and voxel lists; volume and both halves' sums; the M-step,
# and what it takes more for copies by symmetry
BYTES_PER_VOXEL, BYTES_OF_COPIES = {"run": 70, "iteration": 150, "chunk": 215}, 105
# bytes for each significant coarse sample, twice while those of several chunks are joined, and while they are found
BYTES_PER_SAMPLE, BYTES_WHILE_FOUND = 56, 64
# lists of pixels, grids of samples; on a GPU also what its libraries keep for products
LISTS_BYTES = {"cpu": 2**20, "cuda": 2**27}
# errors of a pose that are tried at once
ERRORS = 45
# bytes of voxels that are looked up at once to symmetrise a volume
SYMMETRY_BYTES = {"cpu": 2**25, "cuda": 2**30}
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
        needs = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.needs.items())
        return f"batches of {self.batch_particles} particles, chunks of {chunks}; {kept}; at most, in GiB: {needs}"


def make_plan(
    n_particles: int, box: int, device: torch.device, dtype: torch.dtype, *, map_box: int | None = None,
    symmetric: bool = False, samples: int = 0, children: int = 32, table: int = 0, lists: int = 0, noise: bool = False,
    limit: int = 0,
) -> Plan:  # fmt: skip
    """Divide the free memory beside the volumes: a quarter each for images, a batch, and a chunk or fine weights.

    Where all together then need more than there is, an eighth each, and so on.

    Parameters
    ----------
    n_particles
        of this process.
    box
        pixels, of the largest images.
    map_box
        pixels, of the maps; None: as the images.
    symmetric
        the point group is not C1.
    samples
        coarse samples of a particle that may be significant.
    children
        fine samples of each.
    table
        complex values in the largest table of coarse slices.
    lists
        bytes of phase ramps and of particles' poses, for an iteration.
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
    voxels = width * ((map_box or box) + 2) ** 3
    volumes = {name: size * voxels for name, size in BYTES_PER_VOXEL.items()}
    volumes["run"] += LISTS_BYTES[device.type]
    volumes["iteration"] += width * BYTES_PER_SLICE_PIXEL * table + lists
    volumes["chunk"] += BYTES_OF_COPIES * voxels * symmetric + SYMMETRY_BYTES[device.type]
    # on a CPU larger batches than this gain nothing
    usable = min(free, 64 << 30) if device.type == "cpu" else free
    rest = max(0, usable - volumes["run"] - volumes["iteration"])
    # a batch also holds whole transforms of its images while it is prepared
    pixels, image_bytes = width * box * box // 2, 4 * box * box * width
    per_particle = (BYTES_PER_NOISE_PIXEL if noise else BYTES_PER_BATCH_PIXEL) * pixels
    # more than this gains nothing
    most_chunk, most_weights = (2**24, 2**24) if device.type == "cpu" else (2**27, 2**28)
    # a table of slices, or as many as tell how accurate poses can be
    trials = min(TRIALS[device.type], ERRORS * ACCURACY_PARTICLES * box * box // 2)
    cut = width * BYTES_WHILE_CUT[device.type] * max(table, trials)
    for shares in (4, 8, 16, 32, 64):
        share = rest // shares
        keep = n_particles * image_bytes <= share
        batch = max(1, min(n_particles, share // per_particle))
        chunk = max(2**16, min(most_chunk, share // (BYTES_PER_CHUNK_ELEMENT * width)))
        weights = max(2**16, min(most_weights, share // (BYTES_PER_FINE_WEIGHT * width)))
        # a run that goes on later, or on another allocator, finds about as much memory, and then adds in the same order
        chunk, weights, batch = _power_of_two(chunk), _power_of_two(weights), _power_of_two(batch, n_particles)
        # the fine pass by dense matrix products holds slices of all orientations, too, as many as there may be weights
        fine = width * (BYTES_PER_FINE_WEIGHT + BYTES_WHILE_CUT[device.type]) * weights
        # samples are found a chunk at a time, those of a particle at least, and held until they fill a fine pass
        found = min(max(chunk, samples), samples * batch)
        held = min(found + weights // children, samples * batch)
        work = max(width * BYTES_PER_CHUNK_ELEMENT * chunk, fine, cut, BYTES_WHILE_FOUND * found)
        # of images one batch is worked on and two are read ahead
        needs = {
            "run": volumes["run"] + image_bytes * (n_particles if keep else 3 * batch),
            "iteration": volumes["iteration"],
            "chunk": max(volumes["chunk"], (BYTES_PER_BATCH_PIXEL - BYTES_PER_PREPARED_PIXEL) * pixels * batch + work),
            "batch": BYTES_PER_PREPARED_PIXEL * pixels * batch + BYTES_PER_SAMPLE * held,
        }
        plan = Plan(chunk, weights, batch, keep, needs)
        if sum(needs.values()) <= free:
            return plan
    raise InputError(
        f"{sum(needs.values()) / 2**30:.2f} GiB of memory are needed and {free / 2**30:.2f} are there ({plan}); "
        "take a device with more, a larger memory.limit, or particles of a smaller box"
    )


def _power_of_two(size: int, most: int | None = None) -> int:
    """The largest power of two up to `size`; `most` itself where that is what fits."""
    return size if size == most else 2 ** (size.bit_length() - 1)
