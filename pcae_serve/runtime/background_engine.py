"""An engine whose batches run as background tasks of the servable in service.

A reload uses it to try and measure a new bundle on the device that serves the old one.
"""

import asyncio
import time

from pcae_serve.bundle.manifest import Tier
from pcae_serve.engines.base import Engine, Output, Pixels
from pcae_serve.runtime.servable import Servable

#: Expected seconds per image until the first batch has been measured.
IMAGE_S = 0.05


class BackgroundEngine:
    """Runs batches as background tasks. Blocks the calling thread, so the loop must not call it."""

    def __init__(self, engine: Engine, servable: Servable, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._servable, self._loop = engine, servable, loop
        self._compute_s, self._image_s = 0.0, IMAGE_S
        self.name, self.version = engine.name, engine.version
        self.device, self.threads, self.sizes = engine.device, engine.threads, engine.sizes

    def clock(self) -> float:
        """Return the seconds of compute so far, without the time that tasks waited."""
        return self._compute_s

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        def work(_: int) -> Output:
            begin_s = time.perf_counter()
            output = self._engine.run(tier, pixels)
            seconds = time.perf_counter() - begin_s
            self._compute_s += seconds
            self._image_s = max(self._image_s / 2, seconds / len(pixels))
            return output

        seconds = self._image_s * len(pixels)
        task = self._servable.background.submit(seconds, work, self._engine.terminate)
        return asyncio.run_coroutine_threadsafe(task, self._loop).result()

    def terminate(self) -> None:
        self._engine.terminate()

    def close(self) -> None:
        self._engine.close()
