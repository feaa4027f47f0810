"""Which columns of a data set hold the image and its label, and what the classes are called.

It reads an image's bytes and a label out of a row; it knows nothing of pixels, order or files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import datasets  # type: ignore[import-untyped]
import fsspec  # type: ignore[import-untyped]

from pcae_training.source import DataError

#: Integer columns taken for labels without being asked for; the last two are WebDataset's.
LABEL_NAMES = ("label", "labels", "cls", "json.label")

#: The label of an image that has none.
UNLABELLED = -1


class ColumnChoice(TypedDict, total=False):
    """What a person may say about the columns; all that is left out is found or given up."""

    labelled: bool  # False: images alone, for pretraining
    image_column: str | None
    label_column: str | None  # a class label or integers; json.label is a field inside a column
    classes: Sequence[str] | None  # names in the order of the label values


@dataclass(frozen=True)
class Columns:
    """The columns to read."""

    image: str
    label: tuple[str, ...] = ()  # column, then fields inside it; empty: unlabelled
    classes: tuple[str, ...] = ()  # empty: unlabelled, or not told by the columns

    def body(self, row: Mapping[str, Any]) -> bytes:
        """The image file's bytes, from a row whose image is not decoded. Raises OSError."""
        cell = row[self.image]
        if cell is None:
            raise OSError("there is no image")
        if cell["bytes"] is not None:
            return cast(bytes, cell["bytes"])
        if "://" in cell["path"]:  # a stream from the hub
            with fsspec.open(cell["path"], "rb") as file:
                return cast(bytes, file.read())
        return Path(cell["path"]).read_bytes()

    def value(self, row: Mapping[str, Any]) -> int:
        """The label's value; UNLABELLED where the row has none."""
        cell: Any = row if self.label else None
        for key in self.label:
            cell = None if cell is None else cell[key]
        return UNLABELLED if cell is None else int(cell)


def choose(features: datasets.Features | None, name: str, **wanted: Any) -> Columns:
    """The columns among `features`, as far as `wanted` (fields of `ColumnChoice`) leaves them open.

    Raises DataError where there is none, or more than one and no word which.
    """
    asked: ColumnChoice = {
        "labelled": True,
        "image_column": None,
        "label_column": None,
        "classes": None,
    }
    asked.update(cast(ColumnChoice, wanted))
    features = features or {}
    image = _image(features, name, asked["image_column"])
    if not asked["labelled"]:
        return Columns(image)
    label = _label(features, name, asked["label_column"])
    kind = _kind(features, label)
    own = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else ()
    named = tuple(asked["classes"] or own)
    if own and named != own:  # another order of the same names would teach the wrong ones
        raise DataError(f"{name} calls its classes {_few(own)}, but {_few(named)} are asked for")
    if named:
        check_classes(named, name)
    return Columns(image, label, named)


def check_classes(classes: Sequence[str], name: str) -> None:
    """Raise DataError where there is nothing to tell apart, or nothing to tell it by."""
    if len(classes) < 2:
        raise DataError(f"{name} has only one class, {classes[0]!r}: there is nothing to learn")
    if len(set(classes)) < len(classes):
        twice = next(label for label in classes if list(classes).count(label) > 1)
        raise DataError(f"{name} has two classes called {twice!r}: give each its own name")


def check_value(value: int, classes: Sequence[str], place: str) -> None:
    """Raise DataError, which begins with `place`, where `value` is no label of `classes`."""
    if value < 0:
        raise DataError(f"{place}: the image has no label")
    if value >= len(classes):
        raise DataError(
            f"{place}: label {value} is beyond the {len(classes)} classes, 0 to {len(classes) - 1}"
        )


def _image(features: Mapping[str, Any], name: str, asked: str | None) -> str:
    found = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    if asked is not None:
        if asked not in found:
            raise DataError(f"{name} has no image column {asked!r}: {_list(features)}")
        return asked
    if len(found) > 1:
        raise DataError(
            f"{name} has {len(found)} image columns, {', '.join(found)}:"
            " choose one with --image-column"
        )
    if not found:
        raise DataError(f"{name} needs an image column: {_list(features)}")
    return found[0]


def _label(features: Mapping[str, Any], name: str, asked: str | None) -> tuple[str, ...]:
    if asked is not None:
        path = _path(features, asked)
        if not _holds_labels(_kind(features, path)):
            raise DataError(
                f"{name} has no column {asked!r} of class labels or integers: {_list(features)}"
            )
        return path
    paths: list[tuple[str, ...]]
    paths = [(key,) for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not paths:
        known = (_path(features, column) for column in LABEL_NAMES)
        paths = [path for path in known if _holds_labels(_kind(features, path))]
    if len(paths) > 1:
        raise DataError(
            f"{name} has {len(paths)} label columns, {', '.join('.'.join(p) for p in paths)}:"
            " choose one with --label-column"
        )
    if not paths:
        raise DataError(
            f"{name} needs a label column (class folders have one from two classes on):"
            f" {_list(features)}"
        )
    return paths[0]


def _path(features: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """A column's name, or the names of a column and the fields inside it."""
    return (column,) if column in features else tuple(column.split("."))


def _kind(features: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The type at `path`; None where there is nothing."""
    kind: Any = features
    for key in path:
        kind = kind.get(key) if isinstance(kind, Mapping) else None
    return kind


def _holds_labels(kind: Any) -> bool:
    if isinstance(kind, datasets.ClassLabel):
        return True
    return isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint"))


def _list(features: Mapping[str, Any]) -> str:
    """What there is instead, for the end of a message."""
    kinds = (f"{key} ({_word(kind)})" for key, kind in features.items())
    return f"its columns are {', '.join(kinds) or 'not known'}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")


def _word(kind: Any) -> str:
    return kind.dtype if isinstance(kind, datasets.Value) else type(kind).__name__
