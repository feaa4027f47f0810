"""One device on threads of its own: the batches of all callers run first come, first served.

One batch runs at a time, or as many as the device has engines, each on a thread.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.manifest import Tier
from pcae_serve.engines.base import Engine, Output
from pcae_serve.errors import EngineFailed, PcaeError, one_line
from pcae_serve.runtime import worker

T = TypeVar("T")


class Batch(NamedTuple):
    """What a batch computed, and when it ran, on the monotonic clock."""

    output: Output
    start_s: float
    end_s: float


class Device:
    """Engines that may run at the same time, and a thread for each."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.parallel = len(engines)
        self._engines, self._idle = engines, SimpleQueue[Engine]()
        for engine in engines:
            self._idle.put(engine)
        self._threads = ThreadPoolExecutor(len(engines), "pcae-device")
        self._closed = False

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on a thread of the device in its turn, and return its result.

        Raises PcaeError if the device is closed.
        """
        return self.submit(function).result()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Have a function run on a thread of the device in its turn.

        Raises PcaeError if the device is closed.
        """
        try:
            return self._threads.submit(function)
        except RuntimeError:  # the executor's, once it is shut down
            raise PcaeError("the model is closed") from None

    def compute(
        self, tier: Tier, pixels: Sequence[NDArray[np.uint8]], dense: bool = False
    ) -> Batch:
        """Run a batch of pixels, each uint8 [H, W, 3]. Only on a thread of the device.

        dense: with patch grids. Raises EngineFailed.
        """
        engine, start_s = self._idle.get(), time.monotonic()  # one is idle: a thread for each
        try:
            output = worker.compute(engine, tier, np.stack(pixels), dense)
        except MemoryError:
            raise
        except Exception as error:  # libraries raise types of their own
            raise EngineFailed(f"the model failed on this batch: {one_line(error)}") from None
        finally:
            self._idle.put(engine)
        return Batch(output, start_s, time.monotonic())

    def close(self) -> None:
        """Wait for the batches in progress, and release the engines."""
        if not self._closed:
            self._closed = True
            if self.parallel == 1:  # the engine of a GPU ends on the thread that it ran on
                self._threads.submit(self._engines[0].close)
            self._threads.shutdown()
            if self.parallel > 1:
                for engine in self._engines:
                    engine.close()
