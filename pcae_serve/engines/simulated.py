"""A simulated engine: returns dummy outputs after a chosen time, without a graph.

For tests, load tests and the development of policies.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Output, Pixels

#: A device that batches well: seconds per batch, and per ViT-B/16 image of 17.56 GMACs.
OVERHEAD_S = 0.002
SECONDS_PER_MAC = 0.5e-3 / 17.56e9


def seconds_by_macs(tier: Tier, batch: int) -> float:
    """Return the seconds of a batch: an overhead, plus time proportional to the MACs."""
    return OVERHEAD_S + batch * tier.macs * SECONDS_PER_MAC


class SimulatedEngine:
    """Sleeps for `seconds(tier, batch)`. The largest output depends on the mean pixel."""

    name = "simulated"
    version = "1"
    threads = 0
    sizes: Sequence[int] = (1,)

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        seconds: Callable[[Tier, int], float] = seconds_by_macs,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.device, self._seconds, self._sleep = device, seconds, sleep
        self._width, self._patch_grid = bundle.width, bundle.patch_grid

    def terminate(self) -> None:
        """Do nothing: the sleep cannot be interrupted."""

    def close(self) -> None:
        """Do nothing: there is no memory to release."""

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

    def run_densely(self, tier: Tier, pixels: Pixels) -> Output:
        """Run a batch; the state of each patch is its number, counted row by row from 1."""
        assert self._patch_grid is not None
        height, width, _ = self._patch_grid
        numbers = np.arange(1, height * width + 1, dtype=np.float32).reshape(height, width, 1)
        patches = np.broadcast_to(numbers, (len(pixels), *self._patch_grid))
        return self.run(tier, pixels)._replace(patches=patches)
