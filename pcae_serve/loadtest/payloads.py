"""Request bodies of a replay: images from a file, a folder or a parquet file, optionally labelled.

Images are not decoded here; the server rejects what it cannot read.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bounded_file import read_regular
from pcae_serve.errors import StartError, one_line

#: Suffixes of the images in a folder.
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
#: Size of an image, at most.
MAX_IMAGE_BYTES = 200_000_000
#: Values of --labels other than a file name.
FOLDERS, COLUMN = "folders", "column"


@dataclass(frozen=True)
class Payloads:
    """Encoded images to send."""

    bodies: Sequence[bytes]
    labels: NDArray[np.int64] | None = None  # indices into the server's labels

    @classmethod
    def load(cls, path: Path | None, labels: str | None, known: Sequence[str]) -> Self:
        """Read a file, a folder or a parquet file, by default the sample image.

        labels: the value of --labels. known: the server's labels; a label that is not one of them
        may also be an index. Raise StartError if images or labels cannot be read.
        """
        path = path or Path(str(files("pcae_serve"))) / "sample.png"
        if path.suffix == ".parquet":
            bodies, words = _read_parquet(path, labels)
        elif labels == COLUMN:
            raise StartError("--labels column needs a parquet file")
        else:
            bodies, words = _read_files(path, labels)
        if not bodies:
            raise StartError(f"{path} contains no images ({', '.join(sorted(SUFFIXES))})")
        if words is None:
            return cls(bodies)
        numbers = {str(i): i for i in range(len(known))}
        index = numbers | {label: i for i, label in enumerate(known)}
        unknown = next((word for word in words if word not in index), None)
        if unknown is not None:
            raise StartError(
                f"the server has no label {unknown!r}; its labels are {', '.join(known[:5])}"
                + (", …" if len(known) > 5 else "")
            )
        return cls(bodies, np.array([index[word] for word in words]))


def _read_files(path: Path, labels: str | None) -> tuple[list[bytes], list[str] | None]:
    try:
        if path.is_dir():
            names = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        else:
            names = [path]
        bodies = [read_regular(name, MAX_IMAGE_BYTES) for name in names]
        if labels is None:
            return bodies, None
        if labels == FOLDERS:
            return bodies, [name.parent.name for name in names]
        with Path(labels).open(newline="", encoding="utf-8-sig") as file:
            by_name = {row["file"]: row["label"] for row in csv.DictReader(file)}
    except (OSError, UnicodeError) as error:
        raise StartError(f"cannot read the images: {one_line(error)}") from None
    except KeyError as error:
        raise StartError(
            f"{labels} has no column {error}; the columns must be file,label"
        ) from None
    root = path if path.is_dir() else path.parent
    words = []
    for name in names:
        if (word := by_name.get(str(name.relative_to(root)))) is None:
            raise StartError(f"{labels} has no line for {name.relative_to(root)}")
        words.append(word)
    return bodies, words


def _read_parquet(path: Path, labels: str | None) -> tuple[list[bytes], list[str] | None]:
    """Read a parquet file in the Hugging Face layout: `image` structs with `bytes`, and `label`."""
    if labels not in (None, COLUMN):
        raise StartError(f"{path} is a parquet file; its labels need --labels {COLUMN}")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise StartError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.read_table(path)
        bodies = [image["bytes"] for image in table["image"].to_pylist()]
        indices = None if labels is None else table["label"].to_pylist()
    except (OSError, KeyError, TypeError, ArrowException) as error:
        raise StartError(f"cannot read images from {path}: {one_line(error)}") from None
    return bodies, None if indices is None else [str(index) for index in indices]
