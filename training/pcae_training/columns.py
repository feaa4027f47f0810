"""Choose a data set's columns of images and labels, and read both from a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import datasets  # type: ignore[import-untyped]
import fsspec  # type: ignore[import-untyped]

from pcae_training.source import DataError

#: Columns that are taken as labels by default if they hold words or integers; the last two are
#: WebDataset's.
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target", "cls", "json.label")

#: Types of labels that are words.
_WORDS = ("string", "large_string")

#: Types of columns that hold a list of labels per row.
_LISTS = (datasets.List, datasets.LargeList)

#: The label of an image without one.
UNLABELLED = -1


class DataChoice(TypedDict, total=False):
    """Choices that flags make on how to read data; the others are detected."""

    layout: Literal["auto", "splits", "classes"]  # what the first level of folders is
    labelled: bool  # False: images alone, for pretraining
    image_column: str | None
    label_column: str | None  # words, integers or lists; json.label is a field in a column
    classes: Sequence[str] | None  # all names in the order of their numbers, or VALUE=NAME


@dataclass(frozen=True)
class Columns:
    """The columns to read."""

    image: str
    label: tuple[str, ...] = ()  # column, then fields in it; empty: unlabelled
    classes: tuple[str, ...] = ()  # names of a ClassLabel; empty for words and plain integers
    words: bool = False  # the labels are words
    several: bool = False  # a row has a list of labels, which may be empty

    def body(self, row: Mapping[str, Any]) -> bytes:
        """Return the image file's bytes of a row with undecoded images. Raise OSError."""
        cell = row[self.image]
        if cell is None or cell["bytes"] is cell["path"] is None:
            raise OSError("the row has no image")
        if cell["bytes"] is not None:
            return cast(bytes, cell["bytes"])
        if "://" in cell["path"]:  # a stream from the hub
            with fsspec.open(cell["path"], "rb") as file:
                return cast(bytes, file.read())
        return Path(cell["path"]).read_bytes()

    def value(self, row: Mapping[str, Any]) -> int | str:
        """Return the row's label, or UNLABELLED if it has none. Raise DataError for other types."""
        return self._value(self._cell(row))

    def values(self, row: Mapping[str, Any]) -> list[int | str] | None:
        """Return the row's list of labels, or None if it has none. Raise DataError."""
        cell = self._cell(row)
        return None if cell is None else [self._value(label) for label in cell]

    def _cell(self, row: Mapping[str, Any]) -> Any:
        """Return what is in the label column of a row, or None."""
        cell: Any = row if self.label else None
        for key in self.label:
            cell = None if cell is None else cell[key]
        return cell

    def _value(self, cell: Any) -> int | str:
        """Return a label, or UNLABELLED if there is none."""
        if cell is None or cell == "" or cell != cell:  # NaN, as of pandas
            return UNLABELLED
        if self.words:
            return str(cell)
        if not -(2**63) <= cell < 2**63 or int(cell) != cell:  # infinity too
            column = ".".join(self.label)
            raise DataError(f"label {cell!r} in column {column} is not an integer of 64 bits")
        return int(cell)


def choose_columns(
    features: datasets.Features | None,
    name: str,
    *,
    labelled: bool = True,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Columns:
    """Return the columns of `features` to read.

    Raise DataError if there is no suitable column, or several and none is named.
    """
    features = features or {}
    image = _image(features, name, image_column)
    if not labelled:
        return Columns(image)
    label = _label(features, name, label_column)
    kind = _kind(features, label)
    several = isinstance(kind, _LISTS)
    kind = kind.feature if several else kind
    own = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else ()
    return Columns(image, label, own, words=not own and kind.dtype in _WORDS, several=several)


def check_classes(classes: Sequence[str], name: str) -> None:
    """Raise DataError if there are fewer than two classes, or two of the same name."""
    if len(classes) < 2:
        raise DataError(f"{name} has only one class, {classes[0]!r}: at least two are needed")
    if len(set(classes)) < len(classes):
        twice = next(label for label in classes if list(classes).count(label) > 1)
        raise DataError(f"{name} has two classes named {twice!r}; give each a unique name")


def check_value(value: int, classes: Sequence[str], place: str) -> None:
    """Raise DataError, naming `place`, unless `value` is the index of a class."""
    if value < 0:
        raise DataError(f"{place}: the image has no label")
    if value >= len(classes):
        raise DataError(
            f"{place}: label {value} is not one of the {len(classes)} classes, 0 to"
            f" {len(classes) - 1}"
        )


def _image(features: Mapping[str, Any], name: str, chosen: str | None) -> str:
    found = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    files = [key for key, kind in features.items() if _holds_files(kind)]
    found = found or files
    if chosen in files:
        return chosen
    if chosen is not None:
        if chosen not in found:
            raise DataError(f"{name} has no image column {chosen!r}: {_list(features)}")
        return chosen
    if len(found) > 1:
        raise DataError(
            f"{name} has {len(found)} image columns, {', '.join(found)};"
            " choose one with --image-column"
        )
    if not found:
        raise DataError(f"{name} has no image column: {_list(features)}")
    return found[0]


def _label(features: Mapping[str, Any], name: str, chosen: str | None) -> tuple[str, ...]:
    if chosen is not None:
        path = _path(features, chosen)
        if not _holds_labels(_kind(features, path)):
            raise DataError(
                f"{name} has no column {chosen!r} of class labels, words or integers:"
                f" {_list(features)}"
            )
        return path
    paths: list[tuple[str, ...]]
    paths = [(key,) for key, kind in features.items() if _names_classes(kind)]
    if not paths:
        known = (_path(features, column) for column in LABEL_NAMES)
        paths = [path for path in known if _holds_labels(_kind(features, path))]
    one = [path for path in paths if not isinstance(_kind(features, path), _LISTS)]
    paths = one or paths  # a label comes before a list of labels
    if len(paths) > 1:
        raise DataError(
            f"{name} has {len(paths)} label columns, {', '.join('.'.join(p) for p in paths)};"
            " choose one with --label-column"
        )
    if not paths:
        raise DataError(
            f"{name} has no label column; name one with --label-column: {_list(features)}"
        )
    return paths[0]


def _path(features: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Split the name of a column, or of a column and fields in it."""
    return (column,) if column in features else tuple(column.split("."))


def _kind(features: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Return the type at `path`, or None if there is nothing."""
    kind: Any = features
    for key in path:
        kind = kind.get(key) if isinstance(kind, Mapping) else None
    return kind


def _names_classes(kind: Any) -> bool:
    """Return whether the type is a class of `datasets`, or a list of them."""
    return isinstance(kind.feature if isinstance(kind, _LISTS) else kind, datasets.ClassLabel)


def _holds_labels(kind: Any) -> bool:
    kind = kind.feature if isinstance(kind, _LISTS) else kind
    if isinstance(kind, datasets.ClassLabel):
        return True
    return isinstance(kind, datasets.Value) and kind.dtype.startswith(
        ("int", "uint", "bool", "float", *_WORDS)
    )


def _holds_files(kind: Any) -> bool:
    """Return whether the type holds bytes that may be image files, not marked as such."""
    if isinstance(kind, Mapping):
        return set(kind) <= {"bytes", "path"} and _holds_files(kind.get("bytes"))
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def _list(features: Mapping[str, Any]) -> str:
    """List the columns, for the end of an error message."""
    kinds = (f"{key} ({_word(kind)})" for key, kind in features.items())
    return f"its columns are {', '.join(kinds) or 'not known'}"


def _word(kind: Any) -> str:
    return kind.dtype if isinstance(kind, datasets.Value) else type(kind).__name__
