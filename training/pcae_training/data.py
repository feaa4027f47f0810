"""Labelled images with random access, decoded on access or all at once.

Every image is preprocessed by `pcae_serve.bundle.preprocess`, as in the server, at any size. Data
that fit into memory are decoded once and stay on the training device.
"""

import copy
import math
import os
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import RequestError
from pcae_training.balanced_order import balanced_order
from pcae_training.columns import DataChoice
from pcae_training.duplicates import ImageFile
from pcae_training.image_files import accepted_body, suffix
from pcae_training.inventory import Inventory, list_classes, list_suffixes, print_lines
from pcae_training.label_sets import align_sets
from pcae_training.labels import Labels, align
from pcae_training.progress import Progress
from pcae_training.sample_rng import generator
from pcae_training.skipped import MAX_UNREADABLE, PATIENCE, Skipped, none_readable
from pcae_training.slices import Slices
from pcae_training.source import DataError as DataError
from pcae_training.tables import ImageTable, open_table

#: Decoded data sets up to this size are kept in memory.
MEMORY_LIMIT_BYTES = 2 * 1024**3

#: The share of a GPU's free memory that decoded images may take; the rest is for the model.
GPU_SHARE = 0.5

#: Images decoded by one task of a thread, so that the overhead per task is small.
CHUNK = 128


class TrainingData(Protocol):
    """The data of a training run: map-style data sets and streams."""

    name: str
    classes: list[str]  # empty if unlabelled
    preprocess: Preprocess

    def __len__(self) -> int:
        """Return the number of images per epoch."""

    @property
    def unreadable(self) -> int:
        """Number of images that this process has skipped."""

    @property
    def inventory(self) -> Inventory | None:
        """The images by split and class; None for a stream of unknown length."""

    def epoch(
        self,
        seed: int,
        epoch: int,
        slices: Sequence[slice],
        device: torch.device,
        workers: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels uint8 [b, 3, S, S] and labels int64 [b] for each of the ascending `slices`.

        Both are on `device`; labels are -1 if the data have none, and bool [b, classes] if an image
        has any number of them. The order depends on `seed` and `epoch` alone: processes take slices
        of the same order, and a resumed run takes later ones.
        An unreadable image is replaced by the next readable one in that order. Raise DataError if
        too many are unreadable.
        """


class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """Pixels uint8 [3, S, S] and labels, decoded on access, or all at once by `in_memory`.

    Indices count the images of this object, of which `subset` returns fewer.
    """

    def __init__(
        self,
        table: ImageTable,
        preprocess: Preprocess,
        max_unreadable: float = MAX_UNREADABLE,
    ) -> None:
        """Raise DataError if there are no rows, or too many are known to be unreadable."""
        if len(table) == 0:
            raise DataError(f"{table.name} has no rows")
        self.name, self.preprocess = table.name, preprocess
        self.labels, self.classes = table.labels, table.classes
        self.balanced = False  # whether `epoch` shows each class equally often
        self._table = table
        self._numbers: Sequence[int] = range(len(table))  # row in the table, by index
        self._pixels: Tensor | None = None  # [len, 3, S, S], on any device; zero if unreadable
        self._skipped = Skipped(self.name, max_unreadable, len(table))  # by row in the table
        if table.unreadable:
            self._skipped.add(table.unreadable, len(table))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        return self.preprocess.image_size

    @property
    def several(self) -> bool:
        """Whether an image has any number of labels: `labels` is bool [len, classes]."""
        return self.labels.ndim == 2

    @property
    def inventory(self) -> Inventory:
        """The images of the whole data set, by split and class, and what is left out."""
        return self._table.inventory.with_classes(self.classes)

    @property
    def unreadable(self) -> int:
        """Number of images that this process has skipped; in memory, all unreadable ones."""
        return len(self._skipped)

    def row(self, index: int) -> int:
        """Return the row of an image in the data set."""
        return self._numbers[index]

    def path(self, index: int) -> Path | None:
        """Return the image's file, or None if it is bytes in a table."""
        return self._table.path(self._numbers[index])

    def place(self, index: int) -> str:
        """Return where an image comes from, such as its path."""
        return self._table.place(self._numbers[index])

    def groups(self, by: str) -> list[str]:
        """Return the group of each image: `folder`, or the value in a column of a table.

        Raise DataError if the data have no such groups, or an image has none.
        """
        every = self._table.groups(by)
        return [every[number] for number in self._numbers]

    def body(self, index: int) -> bytes:
        """Return the bytes of the image file."""
        number = self._numbers[index]
        try:
            return self._table.body(number)
        except OSError as error:
            raise DataError(f"{self.name}, row {number}: {error}") from None

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return pixels uint8 [3, S, S], and a label int64 [] or a set of labels bool [classes].

        Raise DataError if the image cannot be read.
        """
        number = self._numbers[index]
        if number in self._skipped.reasons:
            raise DataError(self._skipped.reasons[number])
        if self._pixels is not None:
            return self._pixels[index], self.labels[index]
        body = self.body(index)
        try:
            return to_pixels(self.preprocess, body), self.labels[index]
        except RequestError as error:
            place = self._table.place(number)
            raise DataError(f"{self.name}, row {number} ({place}): {error}") from None

    def subset(self, indices: Sequence[int]) -> "LabelledImages":
        """Return the images at `indices`, in that order. Raise DataError if there are none."""
        if len(indices) == 0:
            raise DataError(f"{self.name}: none of its {len(self)} images remain")
        fewer, index = copy.copy(self), torch.as_tensor(indices)
        fewer.labels = self.labels[index]
        fewer._numbers = [self._numbers[i] for i in indices]
        if self._pixels is not None:
            fewer._pixels = self._pixels[index]
        fewer._skipped = Skipped(self.name, self._skipped.max_share, len(indices))
        known = self._skipped.reasons
        fewer._skipped.reasons = {n: known[n] for n in fewer._numbers if n in known}
        fewer._skipped.seen = min(self._skipped.seen, len(indices))
        return fewer

    def files(self, split: str) -> list[ImageFile]:
        """Return the image files, as those of `split`; none of tables."""
        paths = [
            (self._table.path(row), label)
            for row, label in zip(self._numbers, self.labels, strict=False)
        ]
        names = self.classes or [""]
        return [ImageFile(str(path), split, names[int(label)]) for path, label in paths if path]

    def decoded_by(self, preprocess: Preprocess) -> "LabelledImages":
        """Return the same images, to be decoded in another way."""
        other = copy.copy(self)
        other.preprocess, other._pixels = preprocess, None
        other._skipped = copy.copy(self._skipped)
        other._skipped.reasons = dict(self._skipped.reasons)
        return other

    def align(self, classes: Sequence[str]) -> None:
        """Renumber the labels as those of `classes`, such as a model's, by their names.

        Raise DataError if the class of an image is not one of them.
        """
        if self.classes:
            number = align_sets if self.several else align
            labels = Labels(self.labels, self.classes)
            self.labels, self.classes = number(labels, classes, self.name)

    def in_memory(self, device: torch.device | None = None) -> "LabelledImages":
        """Decode all images now and keep them on `device` (default: the CPU), if they fit.

        The limit is MEMORY_LIMIT_BYTES, or GPU_SHARE of the GPU's free memory. Unreadable images
        are recorded: `epoch` replaces them, all other access raises DataError.
        """
        device = device or torch.device("cpu")
        size = self.preprocess.image_size
        shape = (len(self), 3, size, size)
        if self._pixels is not None:
            self._pixels = self._pixels.to(device)
        elif math.prod(shape) <= _room_bytes(device):
            pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
            self._decode_all(pixels)
            self._pixels = pixels
        return self

    def readable(self) -> "LabelledImages":
        """Return the images that can be read; all are decoded now to find out."""
        if self.in_memory()._pixels is None:
            self._decode_all(None)
        bad = self._skipped.reasons
        return self.subset([i for i, number in enumerate(self._numbers) if number not in bad])

    def batches(
        self, order: Sequence[int], batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels [B, 3, S, S] uint8 and labels [B] int64 in `order`; the last may be short.

        Labels are bool [B, classes] if an image has any number of them. They are on the CPU, pixels
        where `in_memory` put them. Raise DataError for an unreadable image: a score must be that of
        exactly these images.
        """
        if self._pixels is None:
            slices = [slice(i, i + batch_size) for i in range(0, len(order), batch_size)]
            for batch in Slices(self, list(order), patience=1).load(slices, workers):
                if batch.reasons:
                    raise DataError(next(iter(batch.reasons.values())))
                yield batch.pixels, batch.labels
            return
        bad = self._skipped.reasons
        if unread := [number for i in order if (number := self._numbers[i]) in bad]:
            raise DataError(bad[unread[0]])
        for index in torch.split(torch.as_tensor(order), batch_size):
            yield self._pixels[index], self.labels[index]

    def epoch(
        self,
        seed: int,
        epoch: int,
        slices: Sequence[slice],
        device: torch.device,
        workers: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See TrainingData. workers: loader processes for data that do not fit on `device`."""
        draws = generator(seed, epoch, "order")
        order = (
            balanced_order(self.labels, draws)
            if self.balanced
            else torch.randperm(len(self), generator=draws)
        )
        pixels = self.in_memory(device)._pixels
        if pixels is None:
            yield from self._load(order.tolist(), slices, device, workers)
            return
        index = self._replace_unreadable(order).to(device)  # copied once
        labels = self.labels.to(device)
        for part in slices:
            yield pixels.index_select(0, index[part]), labels.index_select(0, index[part])

    def _load(
        self, order: list[int], slices: Sequence[slice], device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `slices`, decoded by loader processes, on `device`."""
        batches = Slices(self, order, PATIENCE).load(slices, workers, pin=device.type == "cuda")
        for pixels, labels, reasons in batches:
            if len(labels) == 0 and reasons:
                raise none_readable(self.name, reasons)
            self._skipped.add(reasons, len(labels))
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _replace_unreadable(self, order: Tensor) -> Tensor:
        """Return `order` with each unreadable index replaced by the next readable one."""
        bad = self._skipped.reasons
        if not bad:
            return order
        readable = torch.tensor([number not in bad for number in self._numbers])[order]
        if not readable.any():
            raise none_readable(self.name, bad)
        places = torch.arange(len(order))
        last = int(places[readable][0]) + len(order)  # after the end, the first again
        ahead = torch.where(readable, places, last).flip(0).cummin(0).values.flip(0)
        return order[ahead % len(order)]

    def _decode_all(self, pixels: Tensor | None) -> None:
        """Decode all images, into `pixels` [len, 3, S, S] if given; record the unreadable ones."""
        chunks = [range(i, min(i + CHUNK, len(self))) for i in range(0, len(self), CHUNK)]
        reasons: dict[Hashable, str] = {}
        progress = Progress(f"decoding {self.name}", len(self))
        with progress, ThreadPoolExecutor(_cores()) as pool:
            unread = pool.map(partial(self._decode, pixels), chunks)
            for chunk, found in zip(chunks, unread, strict=True):
                reasons.update(found)
                progress.update(len(chunk))
        self._skipped.add(reasons, len(self))
        if reasons:
            bad = (number for number in self._numbers if number in reasons)
            endings = Counter(suffix(self._table.place(number)) for number in bad)
            of = f" ({list_suffixes(endings)})" if any(endings) else ""  # tables have no names
            print_lines(
                f"{self.name}: {len(reasons):,} of {len(self):,} images cannot be read and are"
                f" skipped{of}; the first one: {next(iter(reasons.values()))}"
            )
        if lost := self._lost_classes():
            print_lines(f"{self.name}: note: no image can be read of {list_classes(lost)}")

    def _lost_classes(self) -> list[str]:
        """Return the classes that have images, of which none can be read."""
        bad = self._skipped.reasons
        readable = torch.tensor([number not in bad for number in self._numbers])
        pairs = zip(self.classes, self._count(), self._count(readable), strict=False)
        return [name for name, every, left in pairs if every and not left]

    def _count(self, chosen: Tensor | None = None) -> list[int]:
        """Return the number of images of each class, of all or those `chosen`, bool [len]."""
        labels = self.labels if chosen is None else self.labels[chosen]
        if not self.classes:
            return []
        every = labels.sum(dim=0) if self.several else torch.bincount(labels)
        counts: list[int] = F.pad(every, (0, len(self.classes) - len(every))).tolist()
        return counts

    def _decode(self, pixels: Tensor | None, chunk: range) -> dict[Hashable, str]:
        """Decode the images of `chunk` into `pixels`; return the reasons of the unreadable ones."""
        reasons: dict[Hashable, str] = {}
        size = self.preprocess.image_size
        images = torch.zeros(len(chunk), 3, size, size, dtype=torch.uint8)
        for place, index in enumerate(chunk):
            try:
                images[place] = self[index][0]
            except DataError as error:
                reasons[self._numbers[index]] = str(error)
        if pixels is not None:
            pixels[chunk.start : chunk.stop] = images
        return reasons


def load(
    source: str,
    split: str,
    preprocess: Preprocess,
    *,
    max_unreadable: float = MAX_UNREADABLE,
    **choice: Unpack[DataChoice],
) -> LabelledImages:
    """Open `source` (see `open_table`) at `split`.

    preprocess: how images are decoded; for random crops, larger than the model's input. Raise
    DataError if there is no such data, split, image column or label column.
    """
    return LabelledImages(open_table(source, split, **choice), preprocess, max_unreadable)


def to_pixels(preprocess: Preprocess, body: bytes) -> Tensor:
    """Decode an image file to uint8 [3, S, S], as the server does. Raise RequestError."""
    return torch.from_numpy(preprocess(accepted_body(body)).copy()).permute(2, 0, 1)


def _room_bytes(device: torch.device) -> int:
    """Return how much memory decoded images may take on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(GPU_SHARE * free)
    return MEMORY_LIMIT_BYTES


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
