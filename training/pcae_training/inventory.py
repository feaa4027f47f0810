"""Report the images of a data set before they are used: by class and split, and what is left out.

The report is plain text for standard error, and JSON for the run's folder.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pcae_training.class_folders import ClassFolders
from pcae_training.duplicates import Duplicates, ImageFile, find_duplicates
from pcae_training.image_files import Use, display, suffix

#: Classes that the table lists; of more, the smallest ones.
MAX_CLASSES = 30

#: Suffixes, and names in notes, that are listed of each kind.
MAX_LISTED = 8

#: Name of the only split of a folder without split folders.
ALL = "all"

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Inventory:
    """The images of a data set, of all its splits as far as they are known."""

    name: str  # of the data set, without the split
    used: str  # name of the split to use
    layout: str  # what the splits and classes were taken from
    splits: Mapping[str, Counts]  # images by class, by split; "" for images without a class
    left_out: Mapping[str, Counts] = field(default_factory=dict)  # files by suffix, by reason
    unreadable: Mapping[str, Counts] = field(default_factory=dict)  # files by suffix, by type
    converted: Mapping[str, Counts] = field(default_factory=dict)  # the same
    notes: Sequence[str] = ()
    duplicates: Duplicates = field(default_factory=Duplicates)
    #: Images of the split to use, where an image can have several labels; else their sum.
    images: int | None = None

    def with_classes(self, classes: Sequence[str]) -> "Inventory":
        """Return the inventory with all of these classes in the split to use, also without images.

        They may be a model's.
        """
        used = dict.fromkeys(classes, 0) | dict(self.splits[self.used])
        return replace(self, splits={**self.splits, self.used: used})

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return {
            "name": self.name,
            "split": self.used,
            "layout": self.layout,
            "images": {split: dict(counts) for split, counts in self.splits.items()},
            "left_out": {reason: dict(counts) for reason, counts in self.left_out.items()},
            "unreadable_types": {kind: dict(counts) for kind, counts in self.unreadable.items()},
            "converted_types": {kind: dict(counts) for kind, counts in self.converted.items()},
            "duplicates": self.duplicates.to_json(),
            "notes": list(self.remarks()),
        }

    def remarks(self) -> Iterator[str]:
        """Yield a line for each thing that may be a mistake in the data."""
        used = self.splits[self.used]
        classes = [name for name in used if name]
        if empty := [name for name in classes if not used[name]]:
            yield f"no image in {display(self.used)} of {list_classes(empty)}"
        for split, counts in self.splits.items():
            others = [other for name, other in self.splits.items() if name != split]
            alone = [
                name for name in counts
                if name and counts[name] and not any(other.get(name) for other in others)
            ]  # fmt: skip
            if alone and any(any(other.values()) for other in others):
                yield f"images in {display(split)} only of {list_classes(alone)}"
        yield from self.notes
        yield from self.duplicates.notes

    def lines(self) -> Iterator[str]:
        """Yield the report, line by line."""
        used = self.splits[self.used]
        named = [name for name in used if name]
        classes = f"{len(named):,} classes" if named else "no labels"
        images = sum(used.values()) if self.images is None else self.images
        yield (
            f"data {display(self.name)}: {images:,} images of {display(self.used)},"
            f" {classes} ({self.layout})"
        )
        yield from self._table()
        for title, kinds in (
            ("left out", self.left_out),
            ("cannot be read", self.unreadable),
            ("converted to PNG, not accepted by the server", self.converted),
        ):
            for kind, counts in kinds.items():
                yield f"  {title}: {kind}: {sum(counts.values()):,} ({list_suffixes(counts)})"
        for remark in self.remarks():
            yield f"  note: {remark}"

    def _table(self) -> Iterator[str]:
        """Yield a line per class and a column per split."""
        splits = list(self.splits.values())
        every = list(dict.fromkeys(name for counts in splits for name in counts))
        shown = every
        if len(every) > MAX_CLASSES:
            used = self.splits[self.used]
            shown = sorted(every, key=lambda name: used.get(name, 0))[:MAX_CLASSES]
        header = ("class", *map(display, self.splits))
        rows = [
            (display(name) or "(no class)", *(f"{counts.get(name, 0):,}" for counts in splits))
            for name in shown
        ]
        total = (
            "all" if self.images is None else "all labels",
            *(f"{sum(counts.values()):,}" for counts in splits),
        )
        widths = [max(map(len, column)) for column in zip(header, *rows, total, strict=True)]
        for row in (header, *rows):
            yield "  " + _format(row, widths)
        if len(every) > MAX_CLASSES:
            yield f"  … {len(every) - len(shown):,} classes with as many images or more"
        yield "  " + _format(total, widths)


def count_folders(found: ClassFolders, name: str, split: str, labelled: bool) -> Inventory:
    """Return the inventory of class folders, of which `split` is used."""
    used = found.find(split)
    classes = found.classes(used)
    kinds: dict[Use, dict[str, Counter[str]]] = {Use.UNREADABLE: {}, Use.CONVERTED: {}}
    splits: dict[str, dict[str, int]] = {}
    left_out: dict[str, Counter[str]] = {}
    for (reason, ending), count in found.left_out.items():
        left_out.setdefault(reason, Counter())[ending] += count
    for files in found.splits.values():
        counts = Counter(files.names)
        table = {each: counts[each] for each in classes} | dict(counts)
        for entry in files.files + files.unclassed:
            assert entry.type is not None
            if entry.type.use in kinds:
                of_type = kinds[entry.type.use].setdefault(entry.type.name, Counter())
                of_type[suffix(entry.parts[-1])] += 1
        if files.unclassed and not labelled:
            table[""] = len(files.unclassed)
        for entry in files.unclassed if labelled else ():
            outside = left_out.setdefault("images outside class folders", Counter())
            outside[suffix(entry.parts[-1])] += 1
        splits[files.folder or ALL] = table
    notes = list(found.notes)
    if "" in found.splits:
        notes.append("there are no split folders: every split is all of these images")
    return Inventory(
        name,
        used.folder or ALL,
        "folders SPLIT/CLASS" if used.folder else "folders CLASS, one split",
        splits,
        left_out,
        kinds[Use.UNREADABLE],
        kinds[Use.CONVERTED],
        notes,
        find_duplicates(_image_files(found), used.folder or ALL),
    )


def _image_files(found: ClassFolders) -> list[ImageFile]:
    """Return the files of all splits that can be read."""
    files = []
    for split in found.splits.values():
        labels = [*split.names, *[""] * len(split.unclassed)]
        for entry, label in zip(split.files + split.unclassed, labels, strict=True):
            if entry.type and entry.type.use is not Use.UNREADABLE:
                path = str(found.root.joinpath(*entry.parts))
                files.append(ImageFile(path, split.folder or ALL, label))
    return files


def count_rows(name: str, split: str, classes: Sequence[str], labels: Tensor) -> Inventory:
    """Return the inventory of the rows of one split; the others are not known.

    labels: int64 [rows], or bool [rows, classes] if a row has a list of labels.
    """
    if labels.ndim == 2:
        table = dict(zip(classes, labels.sum(dim=0).tolist(), strict=True))
        layout = "rows of a table, each with a list of labels"
        return Inventory(name, split, layout, {split: table}, images=len(labels))
    counts = Counter(labels.tolist())
    table = {each: counts[number] for number, each in enumerate(classes)} or {"": len(labels)}
    return Inventory(name, split, "rows of a table", {split: table})


def print_inventory(inventory: Inventory | None) -> None:
    """Print the inventory to standard error, in the first of several processes only."""
    if inventory is not None:
        print_lines(*inventory.lines())


def print_lines(*lines: str) -> None:
    """Print lines to standard error, in the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _format(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = row
    cells = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))
    return "  ".join([name.ljust(widths[0]), *cells])


def list_suffixes(counts: Counts) -> str:
    """Return the most frequent suffixes, with the number of files of each."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{display(end) or 'no suffix'} {n:,}" for end, n in most[:MAX_LISTED])
    return shown + (", …" if len(most) > MAX_LISTED else "")


def list_classes(names: Sequence[str]) -> str:
    """Return the first names of classes, for a message."""
    shown = ", ".join(map(display, names[:MAX_LISTED]))
    more = f", … ({len(names):,} classes)" if len(names) > MAX_LISTED else ""
    return f"class{'es' if len(names) > 1 else ''} {shown}{more}"
