"""Images with random access from Hugging Face `datasets`, with or without labels.

Every image is preprocessed by `pcae_serve.bundle.preprocess`, as in the server, at any size. Data
that fit into memory are decoded once and stay on the training device.
"""

import copy
import math
import os
import signal
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, Unpack

import datasets  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import RequestError
from pcae_training.columns import (
    UNLABELLED,
    ColumnChoice,
    Columns,
    check_classes,
    check_value,
    choose_columns,
)
from pcae_training.progress import Progress
from pcae_training.sample_rng import generator
from pcae_training.skipped import MAX_UNREADABLE, PATIENCE, Skipped, none_readable
from pcae_training.source import DataError as DataError
from pcae_training.source import open_source, title

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

    def epoch(
        self,
        seed: int,
        epoch: int,
        slices: Sequence[slice],
        device: torch.device,
        workers: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels uint8 [b, 3, S, S] and labels int64 [b] for each of the ascending `slices`.

        Both are on `device`; labels are -1 if the data have none. The order depends on `seed` and
        `epoch` alone: processes take slices of the same order, and a resumed run takes later ones.
        An unreadable image is replaced by the next readable one in that order. Raise DataError if
        too many are unreadable.
        """


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Pixels uint8 [3, S, S] and labels, decoded on access, or all at once by `in_memory`.

    Indices count the images of this object, of which `subset` returns fewer.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocess: Preprocess,
        name: str,
        columns: Columns | None = None,
        max_unreadable: float = MAX_UNREADABLE,
    ) -> None:
        """Raise DataError if there are no rows, or a label is missing or not one of the classes."""
        if len(rows) == 0:
            raise DataError(f"{name} has no rows")
        self.name, self.preprocess = name, preprocess
        self._columns = columns or choose_columns(rows.features, name)
        self.image_column = self._columns.image
        self.labels, self.classes = _labels(rows, self._columns, name)
        images = rows.select_columns([self.image_column])
        self._rows = images.cast_column(self.image_column, datasets.Image(decode=False))
        self._numbers: Sequence[int] = range(len(rows))  # row in the data set, by index
        self._pixels: Tensor | None = None  # [len, 3, S, S], on any device; zero if unreadable
        self._skipped = Skipped(name, max_unreadable, len(rows))  # by row in the data set

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unreadable(self) -> int:
        """Number of images that this process has skipped; in memory, all unreadable ones."""
        return len(self._skipped)

    def body(self, index: int) -> bytes:
        """Return the bytes of the image file."""
        number = self._numbers[index]
        try:
            return self._columns.body(self._rows[number])
        except OSError as error:
            raise DataError(f"{self.name}, row {number}: {error}") from None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return pixels [3, S, S] and label. Raise DataError if the image cannot be read."""
        number = self._numbers[index]
        if number in self._skipped.reasons:
            raise DataError(self._skipped.reasons[number])
        if self._pixels is not None:
            return self._pixels[index], int(self.labels[index])
        body = self.body(index)
        try:
            return to_pixels(self.preprocess, body), int(self.labels[index])
        except RequestError as error:
            path = self._rows[number][self.image_column]["path"] or "bytes in the table"
            raise DataError(f"{self.name}, row {number} ({path}): {error}") from None

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

        Labels are on the CPU, pixels where `in_memory` put them. Raise DataError for an unreadable
        image: a score must be that of exactly these images.
        """
        if self._pixels is None:
            slices = [slice(i, i + batch_size) for i in range(0, len(order), batch_size)]
            for batch in _Slices(self, list(order), patience=1).load(slices, workers):
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
        order = torch.randperm(len(self), generator=generator(seed, epoch, "order"))
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
        batches = _Slices(self, order, PATIENCE).load(slices, workers, pin=device.type == "cuda")
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


class _Batch(NamedTuple):
    pixels: Tensor  # [b, 3, S, S] uint8; empty if no readable image was found
    labels: Tensor  # [b] int64
    reasons: dict[Hashable, str]  # of unreadable images, by row in the data set


class _Slices(Dataset[_Batch]):
    """A batch for each slice of an order, decoded in loader processes if there are any.

    Errors are returned as values: an exception in a loader process would block it and print a
    traceback.
    """

    def __init__(self, images: LabelledImages, order: list[int], patience: int) -> None:
        """patience: images of the order to try in place of an unreadable one; 1: do not replace."""
        self.images, self.order, self.patience = images, order, min(patience, len(order))

    def load(self, slices: Sequence[slice], workers: int, pin: bool = False) -> Iterator[_Batch]:
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

    def __getitem__(self, part: slice) -> _Batch:
        places, size = range(*part.indices(len(self.order))), self.images.preprocess.image_size
        pixels = torch.empty(len(places), 3, size, size, dtype=torch.uint8)
        labels = torch.empty(len(places), dtype=torch.int64)
        reasons: dict[Hashable, str] = {}
        for i, place in enumerate(places):
            sample = self._readable(place, reasons)
            if sample is None:
                return _Batch(pixels[:0], labels[:0], reasons)
            pixels[i], labels[i] = sample
        return _Batch(pixels, labels, reasons)

    def _readable(self, place: int, reasons: dict[Hashable, str]) -> tuple[Tensor, int] | None:
        """Return the image at `place` of the order, or the next readable one."""
        for i in range(self.patience):
            index = self.order[(place + i) % len(self.order)]
            try:
                return self.images[index]
            except DataError as error:
                reasons[self.images._numbers[index]] = str(error)
        return None


@dataclass(frozen=True)
class Split:
    """Rows to train on, and rows held out for all choices."""

    train: list[int]
    holdout: list[int]


def hold_out(images: LabelledImages, count: int, seed: int = 0) -> Split:
    """Draw `count` rows to hold out; the same seed gives the same rows."""
    if not 0 < count < len(images):
        raise DataError(f"cannot hold out {count} of the {len(images)} images of {images.name}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return Split(train=sorted(order[count:]), holdout=sorted(order[:count]))


def load(
    source: str,
    split: str,
    preprocess: Preprocess,
    *,
    max_unreadable: float = MAX_UNREADABLE,
    **choice: Unpack[ColumnChoice],
) -> LabelledImages:
    """Open `source` (see `open_source`) at `split`.

    preprocess: how images are decoded; for random crops, larger than the model's input. choice:
    fields of `ColumnChoice`. Raise DataError if there is no such data, split, image column or label
    column.
    """
    name = title(source, split)
    rows = open_source(source, split)
    return LabelledImages(
        rows, preprocess, name, choose_columns(rows.features, name, **choice), max_unreadable
    )


def to_pixels(preprocess: Preprocess, body: bytes) -> Tensor:
    """Decode an image file to uint8 [3, S, S], as the server does. Raise RequestError."""
    return torch.from_numpy(preprocess(body).copy()).permute(2, 0, 1)


def _ignore_signals(_: int) -> None:
    """Leave stopping to the process that a loader works for: signals reach the whole group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _labels(rows: datasets.Dataset, columns: Columns, name: str) -> tuple[Tensor, list[str]]:
    """Return labels int64 [rows] and the class names, which default to the label numbers."""
    if not columns.label:
        return torch.full((len(rows),), UNLABELLED), []
    column = columns.label[0]
    cells = rows.with_format(None)[column][:]
    labels = torch.tensor([columns.value({column: cell}) for cell in cells])
    if (unlabelled := int((labels < 0).sum())) > 0:
        raise DataError(f"{name}: {unlabelled} of its {len(rows)} images have no label")
    largest = int(labels.max())
    if columns.classes:
        row = int(labels.argmax())
        check_value(largest, columns.classes, f"{name}, row {row}")
        return labels, list(columns.classes)
    if largest >= len(rows):  # not class labels; a name for each could fill the memory
        raise DataError(
            f"{name} has labels up to {largest} in {len(rows)} rows; name the classes with"
            " --classes, or choose another --label-column"
        )
    classes = [str(value) for value in range(largest + 1)]
    check_classes(classes, name)
    return labels, classes


def _room_bytes(device: torch.device) -> int:
    """Return how much memory decoded images may take on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(GPU_SHARE * free)
    return MEMORY_LIMIT_BYTES


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
