"""A simulated engine: answers at once or after chosen times, without a graph.

It ships beside the real ones: tests, load trials and policies run on it. It knows how long a batch
should take, nothing of what is on the images.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Output, Pixels

#: A device that batches well: seconds of one batch, and of one ViT-B/16 image's 17.56 GMACs.
OVERHEAD_S = 0.002
SECONDS_PER_MAC = 0.5e-3 / 17.56e9


def by_macs(tier: Tier, batch: int) -> float:
    """Seconds of a batch: an overhead, and time in proportion to the MACs."""
    return OVERHEAD_S + batch * tier.macs * SECONDS_PER_MAC


class SimulatedEngine:
    """Sleeps as long as `seconds` says; the largest number follows from the mean pixel."""

    name = "simulated"
    version = "1"
    threads = 0
    sizes: Sequence[int] = (1,)

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        seconds: Callable[[Tier, int], float] = by_macs,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.device, self._seconds, self._sleep = device, seconds, sleep
        self._width = bundle.width

    def terminate(self) -> None:
        """Nothing: it sleeps to its end."""

    def close(self) -> None:
        """Nothing to give back."""

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        batch = len(pixels)
        self._sleep(self._seconds(tier, batch))
        vectors = np.zeros((batch, self._width), dtype=np.float32)
        brightest = pixels.reshape(batch, -1).mean(axis=1) * self._width // 256
        vectors[np.arange(batch), brightest.astype(int)] = 5.0
        kept = tuple(
            np.tile(np.arange(count, dtype=np.int32), (batch, 1)) for count in tier.token_counts
        )
        return Output(vectors, kept)
