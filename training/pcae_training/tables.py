"""Tables of labelled image files: rows of `datasets`, and class folders.

A table gives the bytes of each row's image file; `data.LabelledImages` decodes them.
"""

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Unpack

import datasets  # type: ignore[import-untyped]
import torch
from torch import Tensor

from pcae_training.class_folders import ClassFolders, Entry, Layout, list_class_folders
from pcae_training.columns import UNLABELLED, Columns, DataChoice, check_value, choose_columns
from pcae_training.image_files import Use, display, unreadable_reason
from pcae_training.inventory import Inventory, count_folders, count_rows
from pcae_training.label_sets import encode_sets
from pcae_training.labels import Labels, encode_integers, encode_names
from pcae_training.source import DataError, open_source, title


class ImageTable(Protocol):
    """Rows of image files with labels."""

    name: str
    #: int64 [rows], UNLABELLED if the table has no classes; or bool [rows, classes]: label sets.
    labels: Tensor
    classes: list[str]  # empty if unlabelled
    unreadable: Mapping[int, str]  # rows that are known not to be readable, and why
    inventory: Inventory

    def __len__(self) -> int:
        """Return the number of rows."""

    def body(self, row: int) -> bytes:
        """Return the image file of a row. Raise OSError if it cannot be read."""

    def path(self, row: int) -> Path | None:
        """Return the row's file, or None if it is bytes in a table."""

    def place(self, row: int) -> str:
        """Return where the row's image comes from, such as its path."""

    def groups(self, by: str) -> list[str]:
        """Return the group of each row. Raise DataError if there are no groups `by` this name."""


class RowTable:
    """Rows of a data set of `datasets`."""

    def __init__(
        self, rows: datasets.Dataset, columns: Columns, name: str, labels: Labels | None
    ) -> None:
        """labels: None if the images have none."""
        self.name = name
        self.labels = labels.values if labels else unlabelled(len(rows))
        self.classes = labels.classes if labels else []
        self.unreadable: Mapping[int, str] = {}
        *_, split = name.rpartition("/")
        self.inventory = count_rows(name, split, self.classes, self.labels)
        self._columns, self._all = columns, rows
        images = rows.select_columns([columns.image])
        self._rows = images.cast_column(columns.image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def body(self, row: int) -> bytes:
        return self._columns.body(self._rows[row])

    def path(self, row: int) -> Path | None:
        return None

    def place(self, row: int) -> str:
        path = self._rows[row][self._columns.image]["path"]
        return display(path) if path else "bytes in the table"

    def groups(self, by: str) -> list[str]:
        """Return the values in the column `by`."""
        others = [name for name in self._all.column_names if name != self._columns.image]
        if by not in others:
            names = ", ".join(others) or "none"
            raise DataError(f"{self.name} has no column {by!r} to group by; its columns: {names}")
        values = self._all.with_format(None)[by][:]
        if missing := sum(value is None or value == "" for value in values):
            raise DataError(f"{self.name}: {missing} of its {len(values)} images have no {by!r}")
        return [str(value) for value in values]


class FileTable:
    """Files below a folder."""

    def __init__(
        self,
        root: Path,
        entries: Sequence[Entry],
        name: str,
        labels: Labels | None,
        inventory: Inventory,
        class_depth: int = 1,
    ) -> None:
        """labels: None if the images have none. class_depth: folders down to that of a class."""
        self.name, self._root, self.inventory = name, root, inventory
        self._class_depth = class_depth
        self.labels = labels.values if labels else unlabelled(len(entries))
        self.classes = labels.classes if labels else []
        self.unreadable: Mapping[int, str] = {
            row: f"{name}, row {row} ({display(self._join(entry))}): {unreadable_reason(kind)}"
            for row, entry in enumerate(entries)
            if entry.type and entry.type.use is Use.UNREADABLE and (kind := entry.type.name)
        }
        self._paths = _Paths(os.path.join(*entry.parts) for entry in entries)  # noqa: PTH118

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, row: int) -> Path:
        return self._root / self._paths[row]

    def body(self, row: int) -> bytes:
        return self.path(row).read_bytes()

    def place(self, row: int) -> str:
        return display(self.path(row))

    def groups(self, by: str) -> list[str]:
        """Return the first folder below that of each file's class, with it; else the file's own.

        Only `folder` can be grouped by.
        """
        if by != "folder":
            raise DataError(f"{self.name} is folders; --group can only be folder, not {by!r}")
        names: list[str] = []
        for row in range(len(self)):
            *folders, file = Path(self._paths[row]).parts
            below = folders[self._class_depth :]
            names.append("/".join([*folders[: self._class_depth], *(below[:1] or [file])]))
        if len(set(names)) == len(names):
            raise DataError(
                f"{self.name} has no folders below its classes to group by: CLASS/GROUP/FILE"
            )
        return names

    def _join(self, entry: Entry) -> str:
        return str(self._root.joinpath(*entry.parts))


class _Paths:
    """Paths in one block of memory: loader processes share it, and it is an eighth of the size."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._text, self._ends = bytearray(), array("q", [0])
        for path in paths:
            self._text += os.fsencode(path)
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(bytes(self._text[self._ends[number] : self._ends[number + 1]]))


def open_table(source: str, split: str, **choice: Unpack[DataChoice]) -> ImageTable:
    """Open the images of `source` at `split`: class folders, else as `source.open_source` does.

    Raise DataError if there is no such data, split, image column or label column.
    """
    name, labelled = title(source, split), choice.get("labelled", True)
    classes = choice.get("classes")
    found = find_folders(source, choice.get("layout", "auto"))
    if found is not None:
        return open_folders(found, split, name, labelled=labelled, classes=classes)
    return row_table(open_source(source, split), name, **choice)


def find_folders(source: str, layout: Layout = "auto") -> ClassFolders | None:
    """List the class folders at `source`, or return None if it is something else."""
    root = Path(source)
    return list_class_folders(root, layout) if root.is_dir() else None


def row_table(rows: datasets.Dataset, name: str, **choice: Unpack[DataChoice]) -> RowTable:
    """Return the rows of a data set with the columns that `choice` names, or those detected."""
    columns = choose_columns(
        rows.features,
        name,
        labelled=choice.get("labelled", True),
        image_column=choice.get("image_column"),
        label_column=choice.get("label_column"),
    )
    if len(rows) == 0:
        raise DataError(f"{name} has no rows")
    if not columns.label:
        return RowTable(rows, columns, name, None)
    return RowTable(rows, columns, name, _read_labels(rows, columns, name, choice.get("classes")))


def _read_labels(
    rows: datasets.Dataset, columns: Columns, name: str, classes: Sequence[str] | None
) -> Labels:
    column = columns.label[0]
    cells = rows.with_format(None)[column][:]
    if columns.several:
        return encode_sets(
            [columns.values({column: cell}) for cell in cells], columns, name, classes
        )
    values = [columns.value({column: cell}) for cell in cells]
    missing = sum(
        value == UNLABELLED or (bool(columns.classes) and int(value) < 0) for value in values
    )
    if missing:
        raise DataError(f"{name}: {missing} of its {len(rows)} images have no label")
    if columns.words:
        words = [str(value) for value in values]
        return encode_names(words, sorted(set(words)), name, classes)
    numbers = torch.tensor([int(value) for value in values])
    if not columns.classes:
        return encode_integers(numbers, name, classes)
    row = int(numbers.argmax())
    check_value(int(numbers[row]), columns.classes, f"{name}, row {row}")
    own = columns.classes
    return encode_names([own[int(value)] for value in values], own, name, classes)


def unlabelled(rows: int) -> Tensor:
    """Return the labels of images without a class."""
    return torch.full((rows,), UNLABELLED)


def open_folders(
    found: ClassFolders,
    split: str,
    name: str,
    *,
    labelled: bool = True,
    classes: Sequence[str] | None = None,
) -> FileTable:
    """Return the images of a split.

    labelled: if False, images outside class folders count too. classes: all class names, in the
    order of their numbers. Raise DataError if there is no such split, or a class is not one of
    `classes`.
    """
    files = found.find(split)
    place = display(found.root / files.folder)
    inventory = count_folders(found, name.rpartition("/")[0], split, labelled)
    if not labelled:
        every = sorted(files.files + files.unclassed, key=lambda e: (e.parts[:-1], e.parts[-1]))
        if not every:
            raise DataError(f"{place} contains no images")
        return FileTable(found.root, every, name, None, inventory)
    if not files.files:
        if files.unclassed:
            raise DataError(
                f"{place} contains {len(files.unclassed):,} images, but no class folders with"
                f" images; put each class into a folder: {place}/CLASS/FILE"
                + _hint(found, files.folder)
                + _metadata(found.root / files.folder)
            )
        raise DataError(f"{place} contains no images")
    labels = encode_names(files.names, found.classes(files), name, classes)
    depth = 2 if files.folder else 1
    return FileTable(found.root, files.files, name, labels, inventory, depth)


def _metadata(folder: Path) -> str:
    """Return a hint if the folder has a table of labels in the convention of `datasets`."""
    names = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
    found = next((name for name in names if (folder / name).exists()), None)
    return f"; labels in {found} are not read" if found else ""


def _hint(found: ClassFolders, folder: str) -> str:
    """Return how to read folders named as splits, if they can be classes."""
    if folder and len(found.splits) > 1:
        return f" (if {', '.join(map(display, found.splits))} are classes: --layout classes)"
    return ""
