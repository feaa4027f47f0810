"""The images of a data set that could not be read, and how many of them are too many.

A few damaged files among a million are no reason to end a run, a share of them is. It knows names
and reasons, nothing of files or pixels.
"""

import math
from collections.abc import Hashable, Mapping

from pcae_training.source import DataError

#: Unreadable images that end no run, whatever their share: one of 50 is no broken data set.
FLOOR = 10

#: Unreadable images in a row after which no other is tried.
PATIENCE = 1000

#: The share of unreadable images above which a run ends.
MAX_UNREADABLE = 0.01


class Skipped:
    """What was skipped so far, each image once, by this process."""

    def __init__(self, name: str, max_share: float, images: float = math.inf) -> None:
        """images: how many different ones there are; what is seen again counts once."""
        self.name, self.max_share, self.images = name, max_share, images
        self.reasons: dict[Hashable, str] = {}  # by image
        self.seen = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def note(self, reasons: Mapping[Hashable, str], seen: int) -> None:
        """Add what was unreadable among `seen` images.

        Raises DataError above FLOOR and above the share allowed.
        """
        self.reasons.update(reasons)
        self.seen += seen
        count, images = len(self.reasons), min(self.seen, self.images)
        if count > FLOOR and count > self.max_share * images:
            raise DataError(
                f"{self.name}: {count:,} of {images:,} images cannot be read"
                f" ({count / images:.1%}; --max-unreadable allows {self.max_share:.1%});"
                f" the first: {next(iter(self.reasons.values()))}"
            )


def none_readable(name: str, reasons: Mapping[Hashable, str]) -> DataError:
    """The error where image after image is unreadable and none can stand in."""
    first = next(iter(reasons.values()))
    return DataError(f"{name}: {len(reasons):,} images in a row cannot be read; the first: {first}")
