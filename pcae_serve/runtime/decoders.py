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
from pcae_serve.runtime.decode_call import decode_image
from pcae_serve.runtime.decode_processes import DecodeProcesses
from pcae_serve.runtime.decode_worker import Request
from pcae_serve.runtime.memory_budget import MemoryBudget, ParallelWork
from pcae_serve.runtime.refusals import Refused
from pcae_serve.runtime.threads import Threads

#: Largest predicted seconds and bytes of an image that a thread decodes.
THREAD_S, THREAD_BYTES = 0.1, 128 << 20
#: Largest predicted seconds and bytes of an image that the event loop decodes: handing it to a
#: thread and back costs more CPU time.
LOOP_S, LOOP_BYTES = 0.5e-3, 4 << 20
#: CPU time that a process may take for an image: this, and so many times the prediction.
LIMIT_S, LIMIT_TIMES = 2.0, 10.0
#: Limits of the correction of predicted seconds: how much slower or faster this machine may be.
SLOWEST, FASTEST = 20.0, 0.2
#: Predicted seconds of decoding after which a measurement's weight has halved.
MEMORY_S = 1.0


class Decoders:
    """Three lanes: the event loop for tiny images, threads for small and processes for large ones.

    Large images never delay small ones. A process can be killed when a budget has passed; a thread
    cannot, so only what is predicted to take little time and memory is decoded on one.
    """

    def __init__(self, count: int, *, max_pixels: int, memory: MemoryBudget) -> None:
        """count: images that are decoded in parallel, in each lane. max_pixels: limit per image."""
        self._max_pixels = max_pixels
        self._tiny = _Lane(1, memory)
        self._small, self._large = _Lane(count, memory), _Lane(count, memory)
        self._threads = Threads("decode", count)
        self._processes = DecodeProcesses(count)

    def predict(self, preprocess: Preprocess, body: bytes) -> DecodeCost:
        """Predict what decoding a file costs, from its header, without decoding it.

        Raises UnreadableImage, UnsupportedType or TooLarge.
        """
        layout = image_limits.read_layout(body, self._max_pixels)
        return decode_cost.predict(layout, len(body), REDUCED * preprocess.resize)

    def idle_s(self, cost: DecodeCost) -> float:
        """Return the least seconds that decoding an image takes, on an idle server.

        Slowness that was measured may be due to load, so it does not count.
        """
        return min(1.0, self._lane(cost).speed.factor) * cost.seconds

    def busy(self, cost: DecodeCost) -> bool:
        """Return whether an image like this one is being decoded or waits for it."""
        return self._lane(cost).calls > 0

    def wait_s(self, cost: DecodeCost) -> float:
        """Return the predicted seconds until an image that is submitted now would be decoded."""
        lane = self._lane(cost)
        return lane.speed.factor * (lane.backlog_s / lane.parallel + cost.seconds)

    def decode(
        self, preprocess: Preprocess, body: bytes, cost: DecodeCost, on_end: Callable[[], None]
    ) -> asyncio.Future[NDArray[np.uint8]]:
        """Decode a file to pixels uint8 [H, W, 3]. Cancel it if the result is no longer needed.

        cost: as predicted for this file. on_end: called once, when no decoder uses the body any
        more, which may be later than the end of the future. Raises Refused if there is no memory,
        and in the future what `preprocess` raises.
        """
        lane = self._lane(cost)
        lane.add(cost)
        call: _Call | None = None

        def ended(_: object = None) -> None:
            if call is not None:
                call.forget()
            lane.remove(cost)
            on_end()

        if lane is self._large:
            decoding = asyncio.ensure_future(self._decode_large(preprocess, body, cost))
            decoding.add_done_callback(ended)
            return decoding
        call = _Call(partial(self._timed, preprocess, body, cost, lane.speed))
        if lane is self._tiny:
            return _answer_now(call, ended)
        return self._threads.submit(call, ended)

    async def shutdown(self, limit_s: float) -> bool:
        """End all decoding, of threads within `limit_s`; return whether all have ended."""
        await self._processes.stop()
        return await self._threads.shutdown(limit_s)

    def _lane(self, cost: DecodeCost) -> "_Lane":
        if cost.seconds <= LOOP_S and cost.bytes <= LOOP_BYTES:
            return self._tiny
        small = cost.seconds <= THREAD_S and cost.bytes <= THREAD_BYTES
        return self._small if small else self._large

    def _timed(
        self, preprocess: Preprocess, body: bytes, cost: DecodeCost, speed: "_Speed"
    ) -> NDArray[np.uint8]:
        start_s = time.monotonic()
        pixels = decode_image(preprocess, body, self._max_pixels, cost.bytes)
        speed.add(cost.seconds, time.monotonic() - start_s)
        return pixels

    async def _decode_large(
        self, preprocess: Preprocess, body: bytes, cost: DecodeCost
    ) -> NDArray[np.uint8]:
        cpu_s = LIMIT_S + LIMIT_TIMES * cost.seconds
        request = Request(preprocess, body, self._max_pixels, cost.bytes, cpu_s)
        del body
        return await self._processes.decode(request, partial(self._took, cost))

    def _took(self, cost: DecodeCost, seconds: float, finished: bool) -> None:
        """Learn from a large image; one that was cut off took at least this long."""
        speed = self._large.speed
        if finished or seconds > speed.factor * cost.seconds:
            speed.add(cost.seconds, seconds)


def _answer_now(
    call: Callable[[], NDArray[np.uint8]], on_end: Callable[[], None]
) -> asyncio.Future[NDArray[np.uint8]]:
    """Call, and return a future that is done."""
    answer: asyncio.Future[NDArray[np.uint8]] = asyncio.get_running_loop().create_future()
    try:
        answer.set_result(call())
    except Exception as error:
        answer.set_exception(error)
    finally:
        on_end()
    return answer


class _Lane:
    """The work that decoders of one kind have accepted."""

    def __init__(self, parallel: int, memory: MemoryBudget) -> None:
        self.parallel, self.speed = parallel, _Speed()
        self.calls = 0
        self.backlog_s = 0.0  # predicted seconds of what waits or runs, on the reference machine
        self._memory = ParallelWork(memory, parallel)

    def add(self, cost: DecodeCost) -> None:
        """Add an image. Raises Refused if there is no memory for it."""
        if not self._memory.try_add(cost.bytes):
            raise Refused(refusals.memory_full())
        self.calls += 1
        self.backlog_s += cost.seconds

    def remove(self, cost: DecodeCost) -> None:
        """Remove an image that was added."""
        self._memory.remove(cost.bytes)
        self.calls -= 1
        self.backlog_s = self.backlog_s - cost.seconds if self.calls else 0.0


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
