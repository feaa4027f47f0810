"""Choose a data set's columns of images and labels, and read both from a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import datasets  # type: ignore[import-untyped]
import fsspec  # type: ignore[import-untyped]

from pcae_training.source import DataError

#: Integer columns that are taken as labels by default; the last two are WebDataset's.
LABEL_NAMES = ("label", "labels", "cls", "json.label")

#: The label of an image without one.
UNLABELLED = -1


class ColumnChoice(TypedDict, total=False):
    """Choices of columns that flags make; the others are detected."""

    labelled: bool  # False: images alone, for pretraining
    image_column: str | None
    label_column: str | None  # of class labels or integers; json.label is a field in a column
    classes: Sequence[str] | None  # names, in the order of the label values


@dataclass(frozen=True)
class Columns:
    """The columns to read."""

    image: str
    label: tuple[str, ...] = ()  # column, then fields in it; empty: unlabelled
    classes: tuple[str, ...] = ()  # empty: unlabelled, or not named by the data set

    def body(self, row: Mapping[str, Any]) -> bytes:
        """Return the image file's bytes of a row with undecoded images. Raise OSError."""
        cell = row[self.image]
        if cell is None:
            raise OSError("the row has no image")
        if cell["bytes"] is not None:
            return cast(bytes, cell["bytes"])
        if "://" in cell["path"]:  # a stream from the hub
            with fsspec.open(cell["path"], "rb") as file:
                return cast(bytes, file.read())
        return Path(cell["path"]).read_bytes()

    def value(self, row: Mapping[str, Any]) -> int:
        """Return the label's value, or UNLABELLED if the row has none."""
        cell: Any = row if self.label else None
        for key in self.label:
            cell = None if cell is None else cell[key]
        return UNLABELLED if cell is None else int(cell)


def choose_columns(features: datasets.Features | None, name: str, **choice: Any) -> Columns:
    """Return the columns of `features` to read; `choice` has fields of `ColumnChoice`.

    Raise DataError if there is no suitable column, or several and `choice` names none.
    """
    chosen: ColumnChoice = {
        "labelled": True,
        "image_column": None,
        "label_column": None,
        "classes": None,
    }
    chosen.update(cast(ColumnChoice, choice))
    features = features or {}
    image = _image(features, name, chosen["image_column"])
    if not chosen["labelled"]:
        return Columns(image)
    label = _label(features, name, chosen["label_column"])
    kind = _kind(features, label)
    own = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else ()
    named = tuple(chosen["classes"] or own)
    if own and named != own:  # another order would give images the wrong labels
        raise DataError(f"{name} has the classes {_few(own)}, but --classes gives {_few(named)}")
    if named:
        check_classes(named, name)
    return Columns(image, label, named)


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
                f"{name} has no column {chosen!r} of class labels or integers: {_list(features)}"
            )
        return path
    paths: list[tuple[str, ...]]
    paths = [(key,) for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not paths:
        known = (_path(features, column) for column in LABEL_NAMES)
        paths = [path for path in known if _holds_labels(_kind(features, path))]
    if len(paths) > 1:
        raise DataError(
            f"{name} has {len(paths)} label columns, {', '.join('.'.join(p) for p in paths)};"
            " choose one with --label-column"
        )
    if not paths:
        raise DataError(
            f"{name} has no label column (class folders have one if there are at least two):"
            f" {_list(features)}"
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


def _holds_labels(kind: Any) -> bool:
    if isinstance(kind, datasets.ClassLabel):
        return True
    return isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint"))


def _list(features: Mapping[str, Any]) -> str:
    """List the columns, for the end of an error message."""
    kinds = (f"{key} ({_word(kind)})" for key, kind in features.items())
    return f"its columns are {', '.join(kinds) or 'not known'}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")


def _word(kind: Any) -> str:
    return kind.dtype if isinstance(kind, datasets.Value) else type(kind).__name__
