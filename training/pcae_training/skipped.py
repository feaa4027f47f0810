"""Count unreadable images, and stop a run if there are too many.

A few damaged files in a large data set are skipped; a large share of them is an error.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any

from pcae_training.source import DataError

#: Number of unreadable images that is always allowed, so that 1 of 50 does not end a run.
FLOOR = 10

#: Unreadable images in a row after which reading fails.
PATIENCE = 1000

#: The largest share of unreadable images, by default.
MAX_UNREADABLE = 0.01


class Skipped:
    """The images that this process has skipped, each counted once."""

    def __init__(self, name: str, max_share: float, images: float = math.inf) -> None:
        """images: number of different images; infinite if unknown."""
        self.name, self.max_share, self.images = name, max_share, images
        self.reasons: dict[Hashable, str] = {}  # by image
        self.seen = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, reasons: Mapping[Any, str], seen: int) -> None:
        """Add the unreadable images among `seen` ones.

        Raise DataError if they are more than FLOOR and more than the share allowed.
        """
        self.reasons.update(reasons)
        self.seen += seen
        count, images = len(self.reasons), min(self.seen, self.images)
        if count > FLOOR and count > self.max_share * images:
            raise DataError(
                f"{self.name}: {count:,} of {images:,} images cannot be read"
                f" ({count / images:.1%}; --max-unreadable allows {self.max_share:.1%});"
                f" the first one: {next(iter(self.reasons.values()))}"
            )


def none_readable(name: str, reasons: Mapping[Hashable, str]) -> DataError:
    """Return the error for images in a row that are all unreadable and cannot be replaced."""
    first, count = next(iter(reasons.values())), len(reasons)
    return DataError(f"{name}: {count:,} images in a row cannot be read; the first one: {first}")
