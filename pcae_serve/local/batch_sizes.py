"""Find the batch size with the most images per second, while a run goes on.

On a CPU the best size depends on model, tier and caches, and the largest is rarely it: a batch
whose numbers no longer fit the cache takes longer per image.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

#: Sizes to try if one batch runs on all cores, as well as the largest one.
SIZES = (8, 16)
#: Sizes if each core has a batch of its own. Caches and memory are shared, so they are smaller.
PARALLEL_SIZES = (4, 8, 16)
#: Batches of each size and tier before one size is settled on; of their times, the best counts.
TRIALS = 3


class BatchSizes:
    """Chooses the size of each batch: sizes take turns at first, then the fastest one is used."""

    def __init__(self, largest: int, smaller: Sequence[int] = SIZES) -> None:
        """largest: number of images that a batch may have. smaller: other sizes to try."""
        self.largest = largest
        self._sizes = (*(size for size in smaller if size < largest), largest)
        self._begun = defaultdict[int, Counter[int]](Counter)  # by tier: batches by size
        self._image_s = defaultdict[int, dict[int, float]](dict)  # by tier: seconds by size
        self._tier = -1  # of the last batch; the next one is expected to have the same

    def choose(self) -> int:
        """Return the number of images of the next batch."""
        begun = self._begun[self._tier]
        size: int = min(self._sizes, key=begun.__getitem__)
        if begun[size] >= TRIALS:
            known = self._image_s[self._tier]
            size = min(known, key=known.__getitem__, default=self.largest)
        begun[size] += 1
        return size

    def learn(self, tier: int, images: int, seconds: float) -> None:
        """Record what a batch took. One of another size, such as the last of a run, is ignored."""
        self._tier = tier
        if images in self._sizes:
            known = self._image_s[tier]
            known[images] = min(known.get(images, seconds / images), seconds / images)
