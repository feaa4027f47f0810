"""One engine on a thread of its own: batches of all callers run one at a time, first come first."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    """An engine and its thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, "pcae-device")
        self._closed = False

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the device's thread after those before it, and return its result.

        Raises PcaeError if the device is closed.
        """
        return self.submit(function).result()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Have a function run on the device's thread after those before it.

        Raises PcaeError if the device is closed.
        """
        try:
            return self._thread.submit(function)
        except RuntimeError:  # the executor's, once it is shut down
            raise PcaeError("the model is closed") from None

    def compute(
        self, tier: Tier, pixels: Sequence[NDArray[np.uint8]], dense: bool = False
    ) -> Batch:
        """Run a batch of pixels, each uint8 [H, W, 3]. Only on the device's thread.

        dense: with patch grids. Raises EngineFailed.
        """
        start_s = time.monotonic()
        try:
            output = worker.compute(self.engine, tier, np.stack(pixels), dense)
        except MemoryError:
            raise
        except Exception as error:  # libraries raise types of their own
            raise EngineFailed(f"the model failed on this batch: {one_line(error)}") from None
        return Batch(output, start_s, time.monotonic())

    def close(self) -> None:
        """Wait for the batches in progress, and release the engine."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self.engine.close)
            self._thread.shutdown()
