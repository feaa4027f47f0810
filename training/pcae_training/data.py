"""Labelled images from Hugging Face `datasets`: class folders, parquet files or a hub name.

Pixels come out as the server would make them: every image goes through `pcae_serve.preprocess`.
It knows nothing of models or of augmentation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import datasets  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from pcae_serve.errors import PcaeError, RequestError, one_line
from pcae_serve.preprocess import Preprocess

#: Decoded data sets up to this many bytes are kept in memory and never wait for a loader.
MEMORY_LIMIT_BYTES = 2 * 1024**3


class DataError(PcaeError):
    """The data set cannot be read, or has not what was asked for."""


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """uint8 pixels [3, H, W] and a label each, decoded on access, or all at once by `in_memory`."""

    def __init__(self, rows: datasets.Dataset, preprocess: Preprocess, name: str) -> None:
        self.name, self.preprocess = name, preprocess
        self.image_column, label_column = _columns(rows.features, name)
        self.classes: list[str] = list(rows.features[label_column].names)
        if len(rows) == 0:
            raise DataError(f"{name} has no rows")
        self.labels = torch.tensor(rows.with_format(None)[label_column][:])
        if (unlabelled := int((self.labels < 0).sum())) > 0:
            raise DataError(f"{name}: {unlabelled} of its {len(rows)} images have no label")
        self._rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        self._pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def body(self, index: int) -> bytes:
        """The image file's bytes, as a client would send them."""
        cell = self._rows[index][self.image_column]
        if cell is None:
            raise DataError(f"{self.name}, row {index}: there is no image")
        if cell["bytes"] is not None:
            return cast(bytes, cell["bytes"])
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise DataError(f"{self.name}, row {index}: {error}") from None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._pixels is not None:
            return self._pixels[index], int(self.labels[index])
        body = self.body(index)
        try:
            pixels = torch.from_numpy(self.preprocess(body).copy())
        except RequestError as error:
            path = self._rows[index][self.image_column]["path"] or "bytes in the table"
            raise DataError(f"{self.name}, row {index} ({path}): {error}") from None
        return pixels.permute(2, 0, 1), int(self.labels[index])

    def in_memory(self) -> "LabelledImages":
        """Decode everything now, where it fits MEMORY_LIMIT_BYTES; otherwise leave it on disk."""
        size = self.preprocess.image_size
        shape = (len(self), 3, size, size)
        if self._pixels is None and math.prod(shape) <= MEMORY_LIMIT_BYTES:
            pixels = torch.empty(shape, dtype=torch.uint8)  # filled in place: the data fits once
            for i in tqdm(range(len(self)), f"decoding {self.name}", unit="img", leave=False):
                pixels[i] = self[i][0]
            self._pixels = pixels
        return self

    def batches(
        self, order: Sequence[int], batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels [B, 3, H, W] uint8 and labels [B] int64 of rows in `order`; the last is short."""
        if self._pixels is not None:
            for index in torch.split(torch.as_tensor(order), batch_size):
                yield self._pixels[index], self.labels[index]
        else:
            loader = DataLoader(Subset(self, list(order)), batch_size, num_workers=workers)
            try:
                yield from loader
            except DataError as error:  # a loader process sends its traceback along: the last line
                line = str(error).strip().splitlines()[-1]
                raise DataError(line.removeprefix(f"{__name__}.DataError: ")) from None


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


def load(source: str, split: str, preprocess: Preprocess) -> LabelledImages:
    """Open `source` (class folders, folder of parquet, .parquet file or hub name) at `split`.

    Raises DataError where there is no such data, split, image column or label column.
    """
    path = Path(source)
    try:
        if path.suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files={split: source}, split=split)
        else:
            rows = datasets.load_dataset(source, split=split)
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetsError, OSError) as error:
        reason = one_line(error)
        raise DataError(f"cannot read split {split!r} of data set {source!r}: {reason}") from None
    return LabelledImages(rows, preprocess, f"{path.name}/{split}")


def _columns(features: datasets.Features, name: str) -> tuple[str, str]:
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{name} needs one image and one class-label column, but its columns are"
            f" {', '.join(f'{key} ({type(kind).__name__})' for key, kind in features.items())}"
        )
    return images[0], labels[0]
