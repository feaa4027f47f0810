"""Find byte-identical image files: in two splits, twice in one, or in two classes.

Files of one size are compared by their last bytes, then by a hash of the whole file.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from pcae_training.image_files import display

#: With more files, opening them would take minutes on a network drive.
MAX_FILES = 200_000

_TAIL_BYTES = 512


class ImageFile(NamedTuple):
    """An image file in a split."""

    path: str
    split: str
    label: str  # name of its class; "" without one


@dataclass(frozen=True)
class Duplicates:
    """Identical files among those of a data set."""

    across: int = 0  # images of the split to use that are also in another one
    within: int = 0  # images of the split to use beyond the first of each
    classes: int = 0  # different images that are in two or more classes
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, int]:
        """Return the figures as JSON."""
        return {
            "images_also_in_another_split": self.across,
            "copies_within_the_split": self.within,
            "images_in_several_classes": self.classes,
        }


def find_duplicates(files: Sequence[ImageFile], used: str) -> Duplicates:
    """Compare all `files`; `used` is the name of the split to use."""
    if len(files) > MAX_FILES:
        return Duplicates(
            notes=(f"not checked for identical files: more than {MAX_FILES:,} files",)
        )
    across = within = classes = 0
    examples: dict[str, tuple[ImageFile, ImageFile]] = {}
    for group in _identical(files):
        own = [file for file in group if file.split == used]
        others = [file for file in group if file.split != used]
        labels = {file.label: file for file in group if file.label}
        if own and others:
            across += len(own)
            examples.setdefault("across", (own[0], others[0]))
        if len(own) > 1:
            within += len(own) - 1
            examples.setdefault("within", (own[0], own[1]))
        if len(labels) > 1:
            classes += 1
            first, second, *_ = labels.values()
            examples.setdefault("classes", (first, second))
    texts = {
        "across": f"images of {display(used)} that are also in another split: {across:,}",
        "within": f"images of {display(used)} that are copies of others in it: {within:,}",
        "classes": f"images that are in several classes: {classes:,}",
    }
    notes = (
        f"byte-identical {texts[kind]}, such as {display(one.path)} and {display(other.path)}"
        for kind, (one, other) in sorted(examples.items())
    )
    return Duplicates(across, within, classes, tuple(notes))


def _identical(files: Iterable[ImageFile]) -> Iterator[list[ImageFile]]:
    """Yield the groups of two or more files with the same content."""
    groups = _split_groups([list(files)], lambda file: _size(file.path))
    groups = _split_groups(groups, lambda file: _tail(file.path))
    yield from _split_groups(groups, lambda file: _digest(file.path))


def _split_groups(
    groups: Iterable[list[ImageFile]], key: Callable[[ImageFile], Hashable]
) -> Iterator[list[ImageFile]]:
    """Divide groups by a key, and yield those that still have two or more files."""
    for group in groups:
        parts: dict[Hashable, list[ImageFile]] = defaultdict(list)
        for file in group:
            try:
                parts[key(file)].append(file)
            except OSError:  # reported as unreadable when it is decoded
                continue
        yield from (part for part in parts.values() if len(part) > 1)


def _size(path: str) -> int:
    return Path(path).stat().st_size


def _tail(path: str) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        return file.read()


def _digest(path: str) -> bytes:
    return blake2b(Path(path).read_bytes(), digest_size=16).digest()
