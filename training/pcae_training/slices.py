"""Load batches of an epoch's order in the foreground or in loader processes."""

import signal
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pcae_training.source import DataError


class Images(Protocol):
    """Images by index."""

    labels: Tensor  # int64 [rows], or bool [rows, classes]

    @property
    def image_size(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return pixels and label. Raise DataError if the image cannot be read."""

    def row(self, index: int) -> int:
        """Return the row in the data set, which identifies an image in messages."""


class Batch(NamedTuple):
    """Images of a slice."""

    pixels: Tensor  # [b, 3, S, S] uint8; empty if no readable image was found
    labels: Tensor  # [b] int64, or [b, classes] bool
    reasons: dict[Hashable, str]  # of unreadable images, by row in the data set


class Slices(Dataset[Batch]):
    """A batch for each slice of an order, decoded in loader processes if there are any.

    Errors are returned as values: an exception in a loader process would block it and print a
    traceback.
    """

    def __init__(self, images: Images, order: list[int], patience: int) -> None:
        """patience: images of the order to try in place of an unreadable one; 1: do not replace."""
        self.images, self.order, self.patience = images, order, min(patience, len(order))

    def load(self, slices: Sequence[slice], workers: int, pin: bool = False) -> Iterator[Batch]:
        """Yield a batch for each of `slices`, in page-locked memory if `pin`."""
        loader = DataLoader(
            self,
            batch_size=None,  # an item is a whole batch
            sampler=slices,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # so that torch's global one is not used
        )
        yield from loader

    def __getitem__(self, part: slice) -> Batch:
        places, size = range(*part.indices(len(self.order))), self.images.image_size
        pixels = torch.empty(len(places), 3, size, size, dtype=torch.uint8)
        labels = self.images.labels.new_empty(len(places), *self.images.labels.shape[1:])
        reasons: dict[Hashable, str] = {}
        for i, place in enumerate(places):
            sample = self._readable(place, reasons)
            if sample is None:
                return Batch(pixels[:0], labels[:0], reasons)
            pixels[i], labels[i] = sample
        return Batch(pixels, labels, reasons)

    def _readable(self, place: int, reasons: dict[Hashable, str]) -> tuple[Tensor, Tensor] | None:
        """Return the image at `place` of the order, or the next readable one."""
        for i in range(self.patience):
            index = self.order[(place + i) % len(self.order)]
            try:
                return self.images[index]
            except DataError as error:
                reasons[self.images.row(index)] = str(error)
        return None


def _ignore_signals(_: int) -> None:
    """Leave stopping to the process that a loader works for: signals reach the whole group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
