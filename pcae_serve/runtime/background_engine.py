"""An engine beside another one: its batches run behind the live traffic of the servable in service.

It lets a new bundle be tried and measured on the device that the old one serves from. It knows a
servable's errands and a clock that counts compute only.
"""

import asyncio
import time

from pcae_serve.bundle.manifest import Tier
from pcae_serve.engines.base import Engine, Output, Pixels
from pcae_serve.runtime.servable import Servable

#: What an image may take, until one has been seen.
IMAGE_S = 0.05


class BackgroundEngine:
    """Runs batches as errands; blocks the calling thread, which may not be the event loop's."""

    def __init__(self, engine: Engine, servable: Servable, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._servable, self._loop = engine, servable, loop
        self._spent_s, self._image_s = 0.0, IMAGE_S
        self.name, self.version = engine.name, engine.version
        self.device, self.threads, self.sizes = engine.device, engine.threads, engine.sizes

    def clock(self) -> float:
        """Seconds of compute so far: what a batch waits for its turn is not in them."""
        return self._spent_s

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        def work(_: int) -> Output:
            begin_s = time.perf_counter()
            output = self._engine.run(tier, pixels)
            seconds = time.perf_counter() - begin_s
            self._spent_s += seconds
            self._image_s = max(self._image_s / 2, seconds / len(pixels))
            return output

        seconds = self._image_s * len(pixels)
        task = self._servable.background.submit(seconds, work, self._engine.terminate)
        return asyncio.run_coroutine_threadsafe(task, self._loop).result()

    def terminate(self) -> None:
        self._engine.terminate()

    def close(self) -> None:
        self._engine.close()
