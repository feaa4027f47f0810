"""List the images of class folders: SPLIT/CLASS/**/FILE, or CLASS/**/FILE without splits.

The rules are those of torchvision's and timm's readers. The split is the first level if its folders
have the usual names of splits, the class is the next level, and all that lies deeper belongs to the
class. Classes are sorted by name as Python sorts strings, files by folder, then by name. Links are
followed. Hidden files and what systems leave in folders are skipped, and all that is skipped is
counted. What could be either splits or classes is an error that names --layout.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from pcae_training.image_files import FileType, Use, display, file_type, is_system, suffix
from pcae_training.source import DataError

Layout = Literal["auto", "splits", "classes"]

#: The usual names of splits, in lower case, by the name that --split uses.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
    "holdout": ("holdout", "hold-out", "heldout", "held-out"),
}
_ENDING = r"(?:[ _-]?(?:set|split|data|images?))?"
_SPLITS = {
    name: re.compile(rf"(?:{'|'.join(words)}){_ENDING}", re.IGNORECASE)
    for name, words in _SPLIT_WORDS.items()
}

#: Files that `datasets` reads; a folder of these without images is left to it.
TABLE_SUFFIXES = (".parquet", ".tar", ".arrow")


class Entry(NamedTuple):
    """A file below the root, or a folder of its first two levels."""

    parts: tuple[str, ...]  # names from the root on, as `os.fsdecode` returns them
    type: FileType | None  # None: a folder

    @property
    def is_image(self) -> bool:
        return self.type is not None and self.type.use is not Use.LEFT_OUT


@dataclass
class SplitFiles:
    """The images of one split, sorted by class, then by folder and name."""

    folder: str  # name of the split's folder; "" if the root is the only split
    classes: list[str] = field(default_factory=list)  # its class folders, also empty ones
    files: list[Entry] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # each file's class
    unclassed: list[Entry] = field(default_factory=list)  # images outside class folders


@dataclass
class ClassFolders:
    """All images below a folder."""

    root: Path
    splits: dict[str, SplitFiles]  # by folder name; "" alone if there are no split folders
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)  # by reason and suffix
    notes: list[str] = field(default_factory=list)

    def classes(self, used: SplitFiles) -> list[str]:
        """Return the class names of all splits, so that a class has the same number in each.

        A split that does not have one of the usual names counts only if it is `used`.
        """
        counted = [s for s in self.splits.values() if s is used or split_name(s.folder)]
        return sorted({name for split in counted for name in split.classes})

    def find(self, split: str) -> SplitFiles:
        """Return the split of that name, or of another usual name for it.

        Without split folders, all images are any split. Raise DataError if there is no such split,
        or several.
        """
        if split not in self.splits and re.search(r"[\[+]", split):
            raise DataError(f"class folders have no slices or sums of splits, such as {split!r}")
        if "" in self.splits:
            return self.splits[""]
        wanted = split_name(split)
        alike = [name for name in self.splits if wanted and split_name(name) == wanted]
        if split in self.splits and (split != wanted or len(alike) == 1):
            return self.splits[split]
        if len(alike) == 1:
            return self.splits[alike[0]]
        shown = display(self.root)
        if alike:
            folders = ", ".join(map(display, alike))
            raise DataError(
                f"{shown} has {len(alike)} folders for the split {split!r}: {folders}; rename all"
                " but one, or name a folder of another name as the split"
            )
        raise DataError(
            f"{shown} has no split {split!r}; its splits are"
            f" {', '.join(map(display, self.splits))}; choose one with --split (or --eval-split),"
            " or --layout classes if these are classes"
        )


def split_name(folder: str) -> str | None:
    """Return the split that a folder's name means, or None."""
    return next((name for name, words in _SPLITS.items() if words.fullmatch(folder)), None)


def _split_order(folder: str) -> tuple[int, str]:
    """Return the place of a split: training first, the test last."""
    usual = list(_SPLITS)
    name = split_name(folder)
    return (usual.index(name) if name else len(usual), folder)


def list_class_folders(root: Path, layout: Layout = "auto") -> ClassFolders | None:
    """List the images below `root`.

    layout: splits if the first level is splits, classes if it is classes. Return None if there are
    no images, but files that `datasets` reads. Raise DataError if there are no images, or if the
    layout is not clear.
    """
    found = ClassFolders(root, {})
    entries = list(_walk(root, found.left_out))
    images = [entry for entry in entries if entry.is_image]
    for entry in entries:
        if entry.type and not entry.is_image:
            found.left_out[entry.type.name, suffix(entry.parts[-1])] += 1
    tables = [e for e in entries if e.type and suffix(e.parts[-1]) in TABLE_SUFFIXES]
    if tables and not images and layout == "auto":
        return None
    if not images:
        raise DataError(f"{display(root)} contains no images{_list_left_out(found.left_out)}")
    parquet = [e for e in tables if e.parts[-1].endswith(".parquet")]
    if layout == "auto" and any(e.parts[-1] != "metadata.parquet" for e in parquet):
        raise DataError(
            f"{display(root)} contains images and parquet files; name the files"
            f" ('{display(root)}/*.parquet'), or read the images with --layout splits or classes"
        )
    chosen = _guess_layout(root, images) if layout == "auto" else layout
    if chosen == "splits":
        folders = {entry.parts[0] for entry in images if len(entry.parts) > 1}
        named = {e.parts[0] for e in entries if len(e.parts) > 1 and split_name(e.parts[0])}
        _sort_into_splits(found, entries, splits=folders | named)
    else:
        _sort_into_splits(found, entries, splits=None)
        if layout == "auto":
            found.notes.extend(_doubts(found.splits[""].classes, entries))
    return found


def _doubts(classes: Sequence[str], entries: Iterable[Entry]) -> Iterator[str]:
    """Yield what suggests that folders of the first level are no classes."""
    if named := [name for name in classes if split_name(name)]:
        yield (
            f"folders named as splits count as classes: {', '.join(map(display, named))}; move them"
            " elsewhere if they are none"
        )
    below: dict[str, set[str]] = {}
    for entry in entries:
        if entry.is_image and len(entry.parts) > 1:
            below.setdefault(entry.parts[0], set()).update(entry.parts[1:-1][:1])
    shared, *others = below.values() or [set()]
    if others and len(shared) > 1 and all(folders == shared for folders in others):
        few = ", ".join(sorted(map(display, shared))[:3])
        yield (
            f"all class folders contain the same folders ({few}); if these are the classes, give"
            " --layout splits"
        )


def _guess_layout(root: Path, images: Sequence[Entry]) -> Layout:
    """Return whether the first level is splits or classes. Raise DataError if it is not clear."""
    folders = {entry.parts[0] for entry in images if len(entry.parts) > 1}
    nested = {entry.parts[0] for entry in images if len(entry.parts) > 2}
    splits = {name for name in folders if split_name(name)}
    if not splits or not (splits & nested or splits == folders):
        return "classes"
    if splits == folders:
        return "splits"
    others = ", ".join(sorted(map(display, folders - splits))[:3])
    raise DataError(
        f"{display(root)} has folders named as splits ({', '.join(sorted(map(display, splits)))})"
        f" that contain folders, next to others ({others}); state which they are with --layout"
        " splits or --layout classes (--eval-layout for --eval-data of pcae-export)"
    )


def _sort_into_splits(
    found: ClassFolders, entries: Iterable[Entry], splits: set[str] | None
) -> None:
    """Fill `found.splits`, with the class of each image.

    splits: folders of the first level that are splits; None if the first level is classes.
    """
    level = 0 if splits is None else 1  # where the class is
    names: dict[tuple[str, ...], str] = {}  # of classes, by folder
    below = set()  # folders named as splits, in class folders
    for name in sorted(splits or {""}, key=_split_order):
        found.splits[name] = SplitFiles(name)
    for entry in sorted(entries, key=lambda entry: (entry.parts[:-1], entry.parts[-1])):
        parts, is_folder = entry.parts, entry.type is None
        if splits is not None and (len(parts) == 1 or parts[0] not in splits):
            if entry.is_image:
                found.left_out["images outside the split folders", suffix(parts[-1])] += 1
            continue
        split = found.splits["" if splits is None else parts[0]]
        if len(parts) == level + 1 and not is_folder:
            if entry.is_image:
                split.unclassed.append(entry)
            continue
        folder = parts[: level + 1]
        if folder not in names:
            names[folder] = _class_name(found.root, folder)
        name = names[folder]
        if name not in split.classes:
            split.classes.append(name)
        if entry.is_image:
            split.files.append(entry)
            split.names.append(name)
            if splits is None and len(parts) > 2 and split_name(parts[1]):
                below.add(f"{parts[0]}/{parts[1]}")
    for split in found.splits.values():
        split.classes.sort()
        order = sorted(range(len(split.names)), key=split.names.__getitem__)  # stable
        split.files = [split.files[i] for i in order]
        split.names = [split.names[i] for i in order]
    if renamed := {name for folder, name in names.items() if name != folder[-1]}:
        shown = ", ".join(sorted(renamed)[:3])
        found.notes.append(f"names of classes are compared in Unicode's composed form: {shown}")
    if below:
        found.notes.append(
            f"folders named as splits lie below the classes ({display(min(below))}), and all their"
            " images belong to the class; for splits, put them first: train/CLASS/FILE"
        )


def _class_name(root: Path, parts: Sequence[str]) -> str:
    """Return the class of a folder, in Unicode's composed form: macOS writes the other one."""
    name = parts[-1]
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the name of the class folder {display(root.joinpath(*parts))} is not valid UTF-8;"
            " rename it"
        ) from None
    return unicodedata.normalize("NFC", name)


def _walk(root: Path, left_out: Counter[tuple[str, str]]) -> Iterator[Entry]:
    """Yield the files below `root`, and the folders of its first two levels; count what is skipped.

    A folder that is its own ancestor through a link is skipped. Raise DataError if a folder cannot
    be read.
    """
    pending: list[tuple[tuple[str, ...], frozenset[tuple[int, int]]]] = [((), frozenset())]
    while pending:
        parts, above = pending.pop()
        folder = os.path.join(root, *parts)  # noqa: PTH118 (a Path per file would double the time)
        try:
            status = os.stat(folder)  # noqa: PTH116
            here = above | {(status.st_dev, status.st_ino)}
            with os.scandir(folder) as entries:
                for entry in entries:
                    found = _visit(entry, (*parts, entry.name), here, left_out)
                    if found is None:
                        continue
                    if found.type is not None or len(found.parts) <= 2:
                        yield found
                    if found.type is None:
                        pending.append((found.parts, here))
        except OSError as error:
            path = display(error.filename or folder)
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _visit(
    entry: "os.DirEntry[str]",
    parts: tuple[str, ...],
    above: frozenset[tuple[int, int]],
    left_out: Counter[tuple[str, str]],
) -> Entry | None:
    """Return the entry's file or folder, or None if it is skipped, and counted."""
    name = entry.name
    if is_system(name):
        left_out["hidden and system files", suffix(name) or display(name)] += 1
        return None
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself
        is_folder = is_file = False
    if is_folder:
        if entry.is_symlink():
            status = entry.stat()
            if (status.st_dev, status.st_ino) in above:
                left_out["links to a folder above", ""] += 1
                return None
        return Entry(parts, None)
    if is_file:
        return Entry(parts, file_type(entry.path, name))
    reason = "broken links" if entry.is_symlink() else "not regular files"
    left_out[reason, suffix(name)] += 1
    return None


def _list_left_out(left_out: Counter[tuple[str, str]]) -> str:
    """Return what else there is, for an error message."""
    if not left_out:
        return ""
    counts = Counter[str]()
    for (reason, _), count in left_out.items():
        counts[reason] += count
    return " (" + ", ".join(f"{reason}: {count:,}" for reason, count in counts.items()) + ")"
