"""How much of the data is worked on at once: batch and chunk sizes from the memory there is."""

import os
from dataclasses import dataclass

import torch

# bytes held at once for each complex pixel of a chunk: slices, products and interpolation points
BYTES_PER_CHUNK_ELEMENT = 96
# bytes held for each pixel of a batch: both transforms, CTFs, operands of the scores
BYTES_PER_BATCH_PIXEL = 120
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
    """

    chunk_elements: int
    fine_weights: int
    batch_particles: int
    keep_images: bool

    def __str__(self) -> str:
        kept = "images stay on the device" if self.keep_images else "images are read again in every iteration"
        chunks = f"{self.chunk_elements / 1e6:.3g} M pixels, {self.fine_weights / 1e6:.3g} M fine weights"
        return f"batches of {self.batch_particles} particles, chunks of {chunks}; {kept}"


def make_plan(n_particles: int, box: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """Divide the free memory: a quarter each for images, a batch, and a chunk or fine weights; the rest for volumes.

    Parameters
    ----------
    n_particles
        of this process.
    box
        pixels, of the largest images.
    """
    free = _free_bytes(device)
    width = torch.finfo(dtype).bits // 32
    quarter = free // 4
    image_bytes = 4 * box * box * width
    keep = n_particles * image_bytes <= quarter
    # a batch also holds whole transforms of its images while it is prepared
    per_particle = (BYTES_PER_BATCH_PIXEL * box * box // 2) * width
    batch = max(1, min(n_particles, quarter // per_particle))
    # more than this gains nothing
    most_chunk, most_weights = (2**24, 2**24) if device.type == "cpu" else (2**27, 2**28)
    chunk = max(2**16, min(most_chunk, quarter // (BYTES_PER_CHUNK_ELEMENT * width)))
    weights = max(2**16, min(most_weights, quarter // (BYTES_PER_FINE_WEIGHT * width)))
    # a run that goes on later finds about as much memory, and then sums up in the same order
    return Plan(_power_of_two(chunk), _power_of_two(weights), _power_of_two(batch, n_particles), keep)


def _power_of_two(size: int, most: int | None = None) -> int:
    """The largest power of two up to `size`; `most` itself where that is what fits."""
    return size if size == most else 2 ** (size.bit_length() - 1)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(pages, 64 * 2**30)
