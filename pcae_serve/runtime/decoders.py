"""Decoding as a bounded resource: what an image will cost, when it would be decoded, its pixels."""

import asyncio
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle import decode_cost, image_limits
from pcae_serve.bundle.decode_cost import DecodeCost
from pcae_serve.bundle.preprocess import REDUCED, Preprocess
from pcae_serve.runtime import refusals
from pcae_serve.runtime.memory_budget import MemoryBudget, ParallelWork
from pcae_serve.runtime.refusals import Refused
from pcae_serve.runtime.threads import Threads

#: Limits of the correction of predicted seconds: how much slower or faster this machine may be.
SLOWEST, FASTEST = 20.0, 0.2
#: Predicted seconds of decoding after which a measurement's weight has halved.
MEMORY_S = 1.0


class Decoders:
    """The threads that decode images, and the work that they have accepted."""

    def __init__(self, threads: int, *, max_pixels: int, memory: MemoryBudget) -> None:
        """threads: images that are decoded in parallel. max_pixels: limit per image."""
        self._max_pixels = max_pixels
        self._memory = ParallelWork(memory, threads)
        self._threads, self._count = Threads("decode", threads), threads
        self._speed = _Speed()
        self._backlog_s = 0.0  # predicted seconds of what waits or runs, on the reference machine

    def predict(self, preprocess: Preprocess, body: bytes) -> DecodeCost:
        """Predict what decoding a file costs, from its header, without decoding it.

        Raises UnreadableImage, UnsupportedType or TooLarge.
        """
        layout = image_limits.read_layout(body, self._max_pixels)
        return decode_cost.predict(layout, len(body), REDUCED * preprocess.resize)

    @property
    def busy(self) -> bool:
        """Whether an image is being decoded or waits for it."""
        return self._threads.busy

    def idle_s(self, cost: DecodeCost) -> float:
        """Return the least seconds that decoding an image takes, on an idle server.

        Slowness that was measured may be due to load, so it does not count.
        """
        return min(1.0, self._speed.factor) * cost.seconds

    def wait_s(self, cost: DecodeCost) -> float:
        """Return the predicted seconds until an image that is submitted now would be decoded."""
        return self._speed.factor * (self._backlog_s / self._count + cost.seconds)

    def decode(
        self, preprocess: Preprocess, body: bytes, cost: DecodeCost, on_end: Callable[[], None]
    ) -> asyncio.Future[NDArray[np.uint8]]:
        """Decode a file to pixels uint8 [H, W, 3]. Cancel it if the result is no longer needed.

        cost: as predicted for this file. on_end: called once, when no decoder uses the body any
        more, which may be later than the end of the future. Raises Refused if there is no memory,
        and in the future what `preprocess` raises.
        """
        if not self._memory.try_add(cost.bytes):
            raise Refused(refusals.memory_full())
        self._backlog_s += cost.seconds
        call = _Call(partial(self._timed, preprocess, body, cost))
        return self._threads.submit(call, partial(self._ended, call, cost, on_end))

    async def shutdown(self, limit_s: float) -> bool:
        """Wait at most `limit_s` for running calls; return whether all have ended."""
        return await self._threads.shutdown(limit_s)

    def _timed(self, preprocess: Preprocess, body: bytes, cost: DecodeCost) -> NDArray[np.uint8]:
        start_s = time.monotonic()
        pixels = preprocess(body, self._max_pixels)
        self._speed.add(cost.seconds, time.monotonic() - start_s)
        return pixels

    def _ended(self, call: "_Call", cost: DecodeCost, on_end: Callable[[], None]) -> None:
        call.forget()
        self._backlog_s -= cost.seconds
        self._memory.remove(cost.bytes)
        on_end()


class _Call:
    """A call whose arguments can be forgotten: a pool keeps a cancelled one until its turn."""

    def __init__(self, call: Callable[[], NDArray[np.uint8]]) -> None:
        self._call: Callable[[], NDArray[np.uint8]] | None = call

    def __call__(self) -> NDArray[np.uint8]:
        call, self._call = self._call, None
        assert call is not None  # it is not cancelled
        return call()

    def forget(self) -> None:
        self._call = None


class _Speed:
    """How many times longer decoding takes here than predicted for the reference machine."""

    def __init__(self) -> None:
        self._predicted_s = self._measured_s = MEMORY_S  # 1.0 until something is measured

    def add(self, predicted_s: float, measured_s: float) -> None:
        """Learn from one image. May be called from any thread: a lost update does not matter."""
        kept = 0.5 ** (predicted_s / MEMORY_S)
        self._predicted_s = self._predicted_s * kept + predicted_s
        self._measured_s = self._measured_s * kept + measured_s

    @property
    def factor(self) -> float:
        return min(SLOWEST, max(FASTEST, self._measured_s / self._predicted_s))
