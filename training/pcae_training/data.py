"""Images opened at random from Hugging Face `datasets`, with labels or without.

Pixels come out as the server would make them: every image goes through
`pcae_serve.bundle.preprocess`, at whatever size is asked for, which need not be a model's. Data
that fit live decoded on the device that asks for them.
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
    choose,
)
from pcae_training.progress import Progress
from pcae_training.sample_rng import generator
from pcae_training.skipped import MAX_UNREADABLE, PATIENCE, Skipped, none_readable
from pcae_training.source import DataError as DataError
from pcae_training.source import open_source, title

#: Decoded data sets up to this many bytes are kept in memory and never wait for a loader.
MEMORY_LIMIT_BYTES = 2 * 1024**3

#: The share of a GPU's free memory that decoded images may take: the rest is the model's.
GPU_SHARE = 0.5

#: Images decoded together: enough that handing them to a thread costs little.
CHUNK = 128


class TrainingData(Protocol):
    """The data of a training run: map-style data sets and streams."""

    name: str
    classes: list[str]  # empty if unlabelled
    preprocess: Preprocess

    def __len__(self) -> int:
        """Images an epoch."""

    @property
    def unreadable(self) -> int:
        """Images skipped so far by this process."""

    def epoch(
        self,
        seed: int,
        epoch: int,
        slices: Sequence[slice],
        device: torch.device,
        workers: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of `slices` of the epoch's order, which rise: pixels uint8 [b, 3, S, S] and
        labels int64 [b] (-1 where unlabelled), both on `device`.

        The order depends on `seed` and `epoch` alone: processes take slices of the same one, and a
        resumed run takes later ones. The next readable image in that order stands in for one that
        cannot be read. Raises DataError where too many cannot.
        """


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """uint8 pixels [3, S, S] and a label each, decoded on access, or all at once by `in_memory`.

    `len`, `labels` and every index are of the rows it holds; `subset` holds fewer of them.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocess: Preprocess,
        name: str,
        columns: Columns | None = None,
        max_unreadable: float = MAX_UNREADABLE,
    ) -> None:
        """Raises DataError where there are no rows, or labels are missing or beyond the classes."""
        if len(rows) == 0:
            raise DataError(f"{name} has no rows")
        self.name, self.preprocess = name, preprocess
        self._columns = columns or choose(rows.features, name)
        self.image_column = self._columns.image
        self.labels, self.classes = _labels(rows, self._columns, name)
        images = rows.select_columns([self.image_column])
        self._rows = images.cast_column(self.image_column, datasets.Image(decode=False))
        self._numbers: Sequence[int] = range(len(rows))  # the data set's row at each index
        self._pixels: Tensor | None = None  # [len, 3, S, S], on any device; unreadable ones zero
        self._skipped = Skipped(name, max_unreadable, len(rows))  # by the data set's row

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unreadable(self) -> int:
        """Images skipped so far by this process; in memory, all there are."""
        return len(self._skipped)

    def body(self, index: int) -> bytes:
        """The image file's bytes, as a client would send them."""
        number = self._numbers[index]
        try:
            return self._columns.body(self._rows[number])
        except OSError as error:
            raise DataError(f"{self.name}, row {number}: {error}") from None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Pixels [3, S, S] and label. Raises DataError where the image cannot be read."""
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
        """The same images at `indices` alone, in that order. Raises DataError on none."""
        if len(indices) == 0:
            raise DataError(f"{self.name}: none of its {len(self)} images are left")
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
        """Decode everything now and keep it on `device` (the CPU), where it fits; else leave it.

        It fits in MEMORY_LIMIT_BYTES, or in GPU_SHARE of what the GPU has free. Unreadable images
        are noted: `epoch` has others stand in, all other access raises DataError.
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
        """The same images without those that cannot be read; all are read now to know."""
        if self.in_memory()._pixels is None:
            self._decode_all(None)
        bad = self._skipped.reasons
        return self.subset([i for i, number in enumerate(self._numbers) if number not in bad])

    def batches(
        self, order: Sequence[int], batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels [B, 3, S, S] uint8 and labels [B] int64 of rows in `order`; the last is short.

        Labels are on the CPU, pixels where `in_memory` put them. An unreadable image raises
        DataError: a score is of the images it names.
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
        """As TrainingData. workers: loader processes for data that do not fit `device`."""
        order = torch.randperm(len(self), generator=generator(seed, epoch, "order"))
        pixels = self.in_memory(device)._pixels
        if pixels is None:
            yield from self._load(order.tolist(), slices, device, workers)
            return
        index = self._stand_ins(order).to(device)  # sent once: a batch waits for nothing
        labels = self.labels.to(device)
        for part in slices:
            yield pixels.index_select(0, index[part]), labels.index_select(0, index[part])

    def _load(
        self, order: list[int], slices: Sequence[slice], device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The slices' batches, decoded by loader processes and sent to `device`."""
        batches = _Slices(self, order, PATIENCE).load(slices, workers, pin=device.type == "cuda")
        for pixels, labels, reasons in batches:
            if len(labels) == 0 and reasons:
                raise none_readable(self.name, reasons)
            self._skipped.note(reasons, len(labels))
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _stand_ins(self, order: Tensor) -> Tensor:
        """`order` with the next readable index in place of each that is not."""
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
        """Decode every image, into `pixels` [len, 3, S, S] where given; note the unreadable."""
        chunks = [range(i, min(i + CHUNK, len(self))) for i in range(0, len(self), CHUNK)]
        reasons: dict[Hashable, str] = {}
        progress = Progress(f"decoding {self.name}", len(self))
        with progress, ThreadPoolExecutor(_cores()) as pool:
            unread = pool.map(partial(self._decode, pixels), chunks)
            for chunk, found in zip(chunks, unread, strict=True):
                reasons.update(found)
                progress.update(len(chunk))
        self._skipped.note(reasons, len(self))

    def _decode(self, pixels: Tensor | None, chunk: range) -> dict[Hashable, str]:
        """Decode the images of `chunk` into their places; why, for each that has no pixels."""
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
    pixels: Tensor  # [b, 3, S, S] uint8; none where `reasons` left nothing to stand in
    labels: Tensor  # [b] int64
    reasons: dict[Hashable, str]  # why images could not be read, by row of the data set


class _Slices(Dataset[_Batch]):
    """A whole batch for each slice of an order, in loader processes where there are any.

    Errors come back as values: an exception of a process would keep it waiting, and bring its
    traceback along.
    """

    def __init__(self, images: LabelledImages, order: list[int], patience: int) -> None:
        """patience: images of the order that are tried for a place; 1: none stands in."""
        self.images, self.order, self.patience = images, order, min(patience, len(order))

    def load(self, slices: Sequence[slice], workers: int, pin: bool = False) -> Iterator[_Batch]:
        """A batch for each of `slices`, in page-locked memory where `pin`."""
        loader = DataLoader(
            self,
            batch_size=None,  # an item is a whole batch
            sampler=slices,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=_undisturbed,
            generator=torch.Generator(),  # of its own: torch's global one is left as it was
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
        """The image at `place` of the order, or the next one that can be read."""
        for i in range(self.patience):
            index = self.order[(place + i) % len(self.order)]
            try:
                return self.images[index]
            except DataError as error:
                reasons[self.images._numbers[index]] = str(error)
        return None


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out for every choice, disjoint."""

    train: list[int]
    holdout: list[int]


def hold_out(images: LabelledImages, count: int, seed: int = 0) -> Split:
    """Draw `count` rows for choosing epochs and tiers; the same seed draws the same rows."""
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
    **wanted: Unpack[ColumnChoice],
) -> LabelledImages:
    """Open `source` (as `source.open_source` takes it) at `split`.

    preprocess: its image_size is the side of the pixels that come out; a trainer that crops asks
    for more than its model takes. wanted: `labelled`, `image_column`, `label_column`, `classes`,
    as in `columns.ColumnChoice`. Raises DataError if there is no such data, split, image column
    or label column.
    """
    name = title(source, split)
    rows = open_source(source, split)
    return LabelledImages(
        rows, preprocess, name, choose(rows.features, name, **wanted), max_unreadable
    )


def to_pixels(preprocess: Preprocess, body: bytes) -> Tensor:
    """uint8 [3, S, S] of an image file's bytes, as the server makes them. Raises RequestError."""
    return torch.from_numpy(preprocess(body).copy()).permute(2, 0, 1)


def _undisturbed(_: int) -> None:
    """A loader process leaves stopping to the one it loads for: signals reach the whole group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _labels(rows: datasets.Dataset, columns: Columns, name: str) -> tuple[Tensor, list[str]]:
    """Labels [rows] int64 and the class names; without names, the numbers up to the largest."""
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
    if largest >= len(rows):  # numbers of another kind, and names for each would fill memory
        raise DataError(
            f"{name} has labels up to {largest} in {len(rows)} rows: name the classes with"
            " --classes, or choose another --label-column"
        )
    classes = [str(value) for value in range(largest + 1)]
    check_classes(classes, name)
    return labels, classes


def _room_bytes(device: torch.device) -> int:
    """What decoded images may take on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(GPU_SHARE * free)
    return MEMORY_LIMIT_BYTES


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
