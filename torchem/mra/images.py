"""The images of a run in batches on its device: kept there if there is room, else read while others are worked on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from torchem.data.images import Images

log = logging.getLogger(__name__)

# share of a device's memory that images may take
KEPT = 0.5
BATCH = {"cpu": 512, "cuda": 2048}


class Batches:
    """Batches of some of the images around 0 at their border, the same in every iteration; what is no number is 0.

    Parameters
    ----------
    images
        the whole set.
    numbers
        which of them are this process's.
    """

    def __init__(self, images: Images, numbers: range, device: torch.device) -> None:
        self._images, self._device = images, device
        size = BATCH[device.type]
        self.parts = [torch.arange(i, min(i + size, numbers.stop)) for i in range(numbers.start, numbers.stop, size)]
        needed = 4 * len(numbers) * images.box**2
        self._kept: dict[int, Tensor] | None = None
        if device.type == "cuda" and needed <= KEPT * torch.cuda.mem_get_info(device)[0]:
            self._kept = {}
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers `(n,)` on the host and images `(n, L, L)` on the device, the next batch read ahead."""
        with ThreadPoolExecutor(1) as reader:
            ahead = None
            for part in range(len(self.parts) + 1):
                ready = ahead
                ahead = reader.submit(self._read, part) if part < len(self.parts) else None
                if ready is not None:
                    images, event = ready.result()
                    if event is not None:
                        present = torch.cuda.current_stream(self._device)
                        present.wait_event(event)
                        images.record_stream(present)
                    yield self.parts[part - 1], images

    def _read(self, part: int) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._kept is not None and part in self._kept:
            return self._kept[part], None
        if self._device.type != "cuda":
            return self.read(self.parts[part]), None
        images = self._stored(self.parts[part])
        with torch.cuda.stream(self._stream):
            moved = _less_border(images.to(self._device, non_blocking=True))
            event = self._stream.record_event()
        if self._kept is not None:
            self._kept[part] = moved
        return moved, event

    def read(self, numbers: Tensor) -> Tensor:
        """Images of any numbers `(n,)` on the host."""
        return _less_border(self._stored(numbers))

    def _stored(self, numbers: Tensor) -> Tensor:
        """Images as they are stored; those that hold what is not a number are named, and become 0.

        For a GPU in pinned memory: it is used again and again, and sent without being copied once more.
        """
        box = self._images.box
        images = torch.empty((len(numbers), box, box), pin_memory=self._device.type == "cuda")
        self._images.read(numbers.numpy(), images.numpy())
        good = torch.isfinite(images.sum((1, 2)))
        for number in numbers[~good].tolist():
            log.warning("image %d (%s) holds what is no number: taken as empty", number + 1, self._images.names[number])
        images[~good] = 0
        return images


def _less_border(images: Tensor) -> Tensor:
    """Images `(n, L, L)` less the mean of their outermost pixels, in place: the 0 beside them is then no edge."""
    border = torch.cat((images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]), 1)
    return images.sub_(border.mean(1)[:, None, None])
