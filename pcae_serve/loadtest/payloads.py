"""The images that a replay sends: a file, a folder or a parquet file, with labels where asked for.

It knows files and a server's list of labels. It does not decode: what is no image, the server says.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pcae_serve.errors import StartError, one_line

#: What images in a folder end in.
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
#: For --labels: what tells them, where it is no file.
FOLDERS, COLUMN = "folders", "column"


@dataclass(frozen=True)
class Images:
    """Encoded images to send."""

    bodies: Sequence[bytes]
    labels: NDArray[np.int64] | None = None  # by the server's list, where right answers count

    @classmethod
    def load(cls, path: Path | None, labels: str | None, known: Sequence[str]) -> Self:
        """From a file, a folder or a parquet file; labels as the flag says."""
        path = path or Path(str(files("pcae_serve"))) / "sample.png"
        if path.suffix == ".parquet":
            bodies, words = _of_parquet(path, labels)
        elif labels == COLUMN:
            raise StartError("--labels column is for a parquet file")
        else:
            bodies, words = _of_files(path, labels)
        if not bodies:
            raise StartError(f"{path} holds no image ({', '.join(sorted(ENDINGS))})")
        if words is None:
            return cls(bodies)
        numbers = {str(i): i for i in range(len(known))}
        index = numbers | {label: i for i, label in enumerate(known)}
        strange = next((word for word in words if word not in index), None)
        if strange is not None:
            raise StartError(
                f"the server has no label {strange!r}; it has {', '.join(known[:5])}"
                + (", …" if len(known) > 5 else "")
            )
        return cls(bodies, np.array([index[word] for word in words]))


def _of_files(path: Path, labels: str | None) -> tuple[list[bytes], list[str] | None]:
    try:
        if path.is_dir():
            names = sorted(f for f in path.rglob("*") if f.suffix.lower() in ENDINGS)
        else:
            names = [path]
        bodies = [name.read_bytes() for name in names]
        if labels is None:
            return bodies, None
        if labels == FOLDERS:
            return bodies, [name.parent.name for name in names]
        with Path(labels).open(newline="", encoding="utf-8-sig") as file:
            by_name = {row["file"]: row["label"] for row in csv.DictReader(file)}
    except (OSError, UnicodeError) as error:
        raise StartError(f"cannot read the images: {one_line(error)}") from None
    except KeyError as error:
        raise StartError(f"{labels} has no column {error}; it needs file,label") from None
    root = path if path.is_dir() else path.parent
    words = []
    for name in names:
        if (word := by_name.get(str(name.relative_to(root)))) is None:
            raise StartError(f"{labels} has no line for {name.relative_to(root)}")
        words.append(word)
    return bodies, words


def _of_parquet(path: Path, labels: str | None) -> tuple[list[bytes], list[str] | None]:
    """As Hugging Face writes images: a struct with `bytes`, and names of the labels beside."""
    if labels not in (None, COLUMN):
        raise StartError(f"the labels of a parquet file are its own: --labels {COLUMN}")
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
