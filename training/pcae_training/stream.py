"""Images read sequentially: tar shards and other sources too large for random access.

Every process reads the whole stream and decodes its own share, so an epoch's order is the same for
any number of processes, and a resumed run skips to its position. The order is the shuffling of
`datasets` (shards, then a buffer), seeded by seed and epoch; it can change with the version of
`datasets`.
"""

import copy
import itertools
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Unpack

import datasets  # type: ignore[import-untyped]
import torch
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import RequestError, one_line
from pcae_training.columns import UNLABELLED, Columns, DataChoice, choose_columns
from pcae_training.data import to_pixels
from pcae_training.inventory import Inventory
from pcae_training.labels import few, name_codes
from pcae_training.sample_rng import generator
from pcae_training.skipped import MAX_UNREADABLE, PATIENCE, Skipped, none_readable
from pcae_training.source import READ_ERRORS, DataError, open_source, title
from pcae_training.tables import FileTable, find_folders, open_folders

#: Images in the shuffle buffer, as files in memory: about 0.1 MB each.
BUFFER_SIZE = 1000

#: Slices that are decoded ahead.
AHEAD = 2


class Sample(NamedTuple):
    """One row of the stream, its image not decoded."""

    title: str  # unique; names the image in messages
    row: dict[str, Any]


class Part(NamedTuple):
    """A slice of the epoch that is being decoded."""

    samples: list[Sample]
    decoded: list["Future[Tensor | str]"]
    after: Iterator[Sample]  # the stream after the slice; copied before it is read


class ImageStream:
    """uint8 pixels and labels, decoded in the background, in the epoch's order (TrainingData)."""

    def __init__(
        self,
        rows: "datasets.IterableDataset | FileRows",
        preprocess: Preprocess,
        name: str,
        columns: Columns,
        *,
        epoch_size: int,
        classes: Sequence[str] | None = None,
        buffer_size: int = BUFFER_SIZE,
        max_unreadable: float = MAX_UNREADABLE,
    ) -> None:
        """epoch_size: images per epoch; a shorter stream starts again, in another order.

        classes: all class names, in the order of their numbers (see `name_codes`).
        """
        if epoch_size < 1:
            raise DataError(f"{name}: an epoch must have at least one image, not {epoch_size}")
        self.name, self.preprocess = name, preprocess
        if columns.several:
            raise DataError(
                f"{name} has lists of labels, which --stream does not read; omit --stream"
            )
        self._codes: dict[int | str, int] = {}  # class number of each label
        self.classes: list[str] = []
        if columns.label:
            self._codes, self.classes = name_codes(columns, name, classes)
        self._columns, self._epoch_size, self._buffer_size = columns, epoch_size, buffer_size
        if not isinstance(rows, FileRows):
            needed = (columns.image, *columns.label[:1], "__url__")
            rows = rows.select_columns([key for key in rows.features if key in needed])
            rows = rows.cast_column(columns.image, datasets.Image(decode=False))
        self._rows = rows
        self._skipped = Skipped(name, max_unreadable)

    def __len__(self) -> int:
        return self._epoch_size

    @property
    def inventory(self) -> Inventory | None:
        return self._rows.inventory if isinstance(self._rows, FileRows) else None

    @property
    def unreadable(self) -> int:
        """Number of images that this process has skipped."""
        return len(self._skipped)

    def epoch(
        self,
        seed: int,
        epoch: int,
        slices: Sequence[slice],
        device: torch.device,
        workers: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels uint8 [b, 3, S, S] and labels int64 [b] for each of the ascending `slices`.

        Both are on `device`; labels are -1 if the data have none. workers: decoding threads (at
        least one), which work two slices ahead. An unreadable image is replaced by the next
        readable one. Raise DataError if the stream cannot be read, or has too many unreadable
        images or an invalid label.
        """
        samples = itertools.tee(self._samples(seed, epoch), 1)[0]  # can be copied, to look ahead
        parts: deque[Part] = deque()
        place = 0
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for start, stop, _ in (part.indices(len(self)) for part in slices):
                own = list(itertools.islice(samples, start - place, stop - place))
                place = stop
                decoded = [pool.submit(self._decode, sample) for sample in own]
                parts.append(Part(own, decoded, copy.copy(samples)))
                if len(parts) > AHEAD:
                    yield self._batch(parts.popleft(), device)
            while parts:
                yield self._batch(parts.popleft(), device)

    def _samples(self, seed: int, epoch: int) -> Iterator[Sample]:
        """Yield the samples of an epoch in order, without end."""
        place = 0
        for turn in itertools.count():
            key = generator(seed, epoch, "order", turn).initial_seed()
            begun = place
            try:
                for row in self._rows.shuffle(seed=key, buffer_size=self._buffer_size):
                    yield Sample(self._title(row) or f"image {place} of epoch {epoch}", row)
                    place += 1
            except READ_ERRORS as error:
                raise DataError(f"{self.name}: reading failed: {one_line(error)}") from None
            if place == begun:
                raise DataError(f"{self.name} has no rows")

    def _title(self, row: dict[str, Any]) -> str:
        """Return the image's shard and file, or "" if the row does not name them."""
        path = (row[self._columns.image] or {}).get("path") or ""
        return " ".join(filter(None, (row.get("__url__"), path)))

    def _decode(self, sample: Sample) -> Tensor | str:
        """Return pixels [3, S, S], or the reason if the image cannot be read."""
        try:
            return to_pixels(self.preprocess, self._columns.body(sample.row))
        except (OSError, RequestError) as error:
            return f"{self.name}, {sample.title}: {one_line(error)}"

    def _batch(self, part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
        size = self.preprocess.image_size
        pixels = torch.empty(len(part.samples), 3, size, size, dtype=torch.uint8)
        labels = torch.empty(len(part.samples), dtype=torch.int64)
        reasons: dict[Hashable, str] = {}
        for i, (sample, future) in enumerate(zip(part.samples, part.decoded, strict=True)):
            image = future.result()
            if isinstance(image, str):
                reasons[sample.title] = image
                candidates = itertools.chain(part.samples[i + 1 :], copy.copy(part.after))
                sample, image = self._replace(candidates, reasons)
            pixels[i], labels[i] = image, self._label(sample)
        self._skipped.add(reasons, len(pixels))
        if device.type == "cuda":  # page-locked, for an asynchronous copy
            pixels, labels = pixels.pin_memory(), labels.pin_memory()
        return pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _replace(
        self, candidates: Iterable[Sample], reasons: dict[Hashable, str]
    ) -> tuple[Sample, Tensor]:
        """Return the first readable candidate; add the reasons of the others to `reasons`."""
        for sample in itertools.islice(candidates, PATIENCE):
            image = self._decode(sample)
            if isinstance(image, Tensor):
                return sample, image
            reasons[sample.title] = image
        raise none_readable(self.name, reasons)

    def _label(self, sample: Sample) -> int:
        value = self._columns.value(sample.row)
        if not self._columns.label:
            return UNLABELLED
        if value in self._codes:
            return self._codes[value]
        if value == UNLABELLED:
            raise DataError(f"{self.name}, {sample.title}: the image has no label")
        raise DataError(
            f"{self.name}, {sample.title}: label {value} is not one of the {len(self.classes)}"
            f" classes, {few(list(self._codes))}"
        )


class FileRows:
    """Rows of class folders, in a random order that `datasets` would need all files for."""

    def __init__(self, table: FileTable) -> None:
        self._table, self.inventory = table, table.inventory

    @property
    def columns(self) -> Columns:
        classes = tuple(self._table.classes)
        return Columns("image", ("label",) if classes else (), classes)

    def shuffle(self, seed: int, buffer_size: int) -> Iterator[dict[str, Any]]:
        """Yield all rows in an order that depends on `seed`; `buffer_size` is for streams."""
        draw = torch.Generator().manual_seed(seed)
        for row in torch.randperm(len(self._table), generator=draw).tolist():
            image = {"bytes": None, "path": str(self._table.path(row))}
            yield {"image": image, "label": int(self._table.labels[row])}


def load_stream(
    source: str,
    split: str,
    preprocess: Preprocess,
    *,
    epoch_size: int,
    buffer_size: int = BUFFER_SIZE,
    max_unreadable: float = MAX_UNREADABLE,
    **choice: Unpack[DataChoice],
) -> ImageStream:
    """Open `source` (see `tables.open_table`) for sequential reading.

    Raise DataError if there is no such data, split, image column or label column.
    """
    name, labelled = title(source, split), choice.get("labelled", True)
    classes = choice.get("classes")
    found = find_folders(source, choice.get("layout", "auto"))
    rows: FileRows | datasets.IterableDataset
    if found is not None:
        rows = FileRows(open_folders(found, split, name, labelled=labelled, classes=classes))
        columns = rows.columns
    else:
        rows = open_source(source, split, stream=True)
        columns = choose_columns(
            rows.features,
            name,
            labelled=labelled,
            image_column=choice.get("image_column"),
            label_column=choice.get("label_column"),
        )
    return ImageStream(
        rows,
        preprocess,
        name,
        columns,
        classes=classes,
        epoch_size=epoch_size,
        buffer_size=buffer_size,
        max_unreadable=max_unreadable,
    )
