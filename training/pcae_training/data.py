"""Labelled images from Hugging Face `datasets`: class folders, parquet files or a hub name.

Pixels come out as the server would make them: every image goes through `pcae_serve.preprocess`.
It knows nothing of models or of augmentation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from pcae_serve.errors import PcaeError
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
        self.labels = torch.tensor(rows[label_column][:])
        self._rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        self._pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def body(self, index: int) -> bytes:
        """The image file's bytes, as a client would send them."""
        cell = self._rows[index][self.image_column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._pixels is not None:
            return self._pixels[index], int(self.labels[index])
        pixels = torch.from_numpy(self.preprocess(self.body(index)).copy())
        return pixels.permute(2, 0, 1), int(self.labels[index])

    def in_memory(self) -> "LabelledImages":
        """Decode everything now, where it fits MEMORY_LIMIT_BYTES; otherwise leave it on disk."""
        if self._pixels is None and len(self) * 3 * self.preprocess.image_size**2 <= MEMORY_LIMIT_BYTES:
            rows = tqdm(range(len(self)), desc=f"decoding {self.name}", unit="img", leave=False)
            self._pixels = torch.stack([self[i][0] for i in rows])
        return self

    def batches(
        self, order: Sequence[int], batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels [B, 3, H, W] uint8 and labels [B] int64 of the rows in `order`; the last is short."""
        if self._pixels is not None:
            for index in torch.as_tensor(order).split(batch_size):
                yield self._pixels[index], self.labels[index]
        else:
            yield from DataLoader(Subset(self, list(order)), batch_size, num_workers=workers)


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
        reason = str(error).splitlines()[0]
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
