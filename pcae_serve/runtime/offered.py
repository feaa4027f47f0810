"""One request, from its headers to its result."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.decode_cost import DecodeCost
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Output
from pcae_serve.errors import RequestError
from pcae_serve.observability.outcomes import Outcome
from pcae_serve.runtime import refusals
from pcae_serve.runtime.memory_budget import AnswerReservation, Reservation
from pcae_serve.runtime.refusals import Refusal, Refused
from pcae_serve.runtime.requests import InferenceRequest, InferenceResult
from pcae_serve.runtime.resources import Resources
from pcae_serve.runtime.uploads import Upload
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.settings import Settings

T = TypeVar("T")

#: Called when a request ends with its first answer, without a second look.
OnAnswer = Callable[["OfferedRequest", InferenceResult], None]


class OfferedRequest:
    """A request whose headers have arrived: `receive` its body, then `run` it.

    It holds nothing of the scheduler until its body is complete; then it arrives there, and is
    admitted or refused.
    """

    def __init__(
        self,
        request: InferenceRequest,
        scheduled: Request,
        *,
        settings: Settings,
        bundle: Bundle,
        resources: Resources,
        require: Callable[[InferenceRequest], None],
        arrive: Callable[["OfferedRequest", float, float], None],
        enqueue: Callable[["OfferedRequest"], None],
    ) -> None:
        """Create a request that has neither body nor result.

        scheduled: the same request for the scheduler. require: raises TaskNotSupported for what
        cannot be returned. arrive: asks the scheduler to admit it, or
        refuses it; takes the seconds of decoding on an idle server, and until it will be decoded.
        enqueue: puts it into the scheduler's queue once its pixels are there.
        """
        self.request, self.scheduled = request, scheduled
        self.result: asyncio.Future[InferenceResult] = asyncio.get_running_loop().create_future()
        # until it has ended otherwise; None if it is not counted
        self.outcome: Outcome | None = Outcome.CANCELLED
        self.arrived = False  # at the scheduler
        self.pixels: NDArray[np.uint8] | None = None  # [H, W, 3], once decoded
        self.decode_s = self.queued_s = 0.0
        self.reason = ""  # why its tier was chosen; set at dispatch
        # the first answer, while a second look may replace it
        self.first_answer: InferenceResult | None = None
        self.look_gain = 0.0  # accuracy that a second look is expected to gain over it
        self._answer_at: asyncio.TimerHandle | None = None
        self._settings, self._bundle, self._resources = settings, bundle, resources
        self._require, self._arrive, self._enqueue = require, arrive, enqueue
        self._bytes = resources.memory.reserve()  # of its body, then of its pixels
        self._pixels_bytes = 3 * bundle.image_size**2
        self._answer_handed_over = False
        self._decoding = self._ended = False
        self._on_answer: OnAnswer = lambda *_: None
        self._timeout: asyncio.Timeout | None = None  # of the upload or decoder, while it runs

    @property
    def deadline_s(self) -> float:
        return self.scheduled.deadline_s

    def revise(self, request: InferenceRequest) -> None:
        """Replace what is requested, before the request arrives at the scheduler.

        Raises InvalidParameter if there is no such tier, or TaskNotSupported.
        """
        assert not self.arrived
        self._require(request)
        tiers = self._bundle.allowed_tiers(request.tier, request.min_tier)
        self.request = request
        self.scheduled = replace(self.scheduled, deadline_s=request.deadline_s, tiers=tiers)

    async def receive(
        self, read: Callable[[Upload], Awaitable[bytes]], length: int, copies: int = 1
    ) -> bytes:
        """Await the body until the upload limit or the deadline, whichever is earlier.

        read: reads it. length: as announced, 0 if it was not. copies: how many of the body are in
        memory at a time while it is read. Raises UploadTimeout, DeadlineExceeded, Dropped,
        Overloaded, TooLarge, or what `read` raises.
        """
        upload_s = self._settings.upload_s
        until_s = min(self.deadline_s, self.request.arrival_s + upload_s)
        timeout = partial(refusals.upload_timeout, upload_s)
        upload = self._resources.uploads.receive(
            read, self._bytes, length=length, copies=copies, until_s=until_s
        )
        in_time = until_s == self.deadline_s
        return await self._bounded(upload, until_s, self._expired if in_time else timeout)

    async def extract(self, image: Awaitable[bytes]) -> bytes:
        """Await the image file that is read out of a complete body, until the deadline."""
        return await self._bounded(image, self.deadline_s, self._expired)

    async def run(self, body: bytes) -> InferenceResult:
        """Have the request admitted, decode the image file, queue it and wait for its result.

        Raises a RequestError.
        """
        self.raise_if_refused()
        decoders, limit_bytes = self._resources.decoders, self._resources.memory.limit_bytes
        with self._outcomes():
            cost = decoders.predict(self._bundle.preprocess, body)
            if len(body) + cost.bytes > limit_bytes:
                raise Refused(refusals.over_memory(len(body) + cost.bytes, limit_bytes))
            if self._computed_bytes > limit_bytes:
                refusal = refusals.over_memory(
                    self._computed_bytes, limit_bytes, self.request.smaller
                )
                raise Refused(refusal)
        idle_s = decoders.idle_s(cost)
        self._arrive(self, idle_s, decoders.wait_s(cost) if decoders.busy(cost) else idle_s)
        self.raise_if_refused()
        with self._outcomes():
            if not self._bytes.try_resize(max(self._bytes.held_bytes, self._computed_bytes)):
                raise Refused(refusals.memory_full())
        await self._decode(body, cost)
        if not self.result.done():
            self._enqueue(self)
        return await self.result

    def refuse(self, refusal: Refusal) -> None:
        """End the request with an error, unless it has ended already or has a first answer."""
        if self.first_answer is not None:
            self._send_first()
        elif not self.result.done():
            self.outcome = refusal.outcome
            self.result.set_exception(refusal.error)

    def answer(
        self, output: Output, row: int, tier: Tier, start_s: float, now_s: float
    ) -> InferenceResult:
        """Return the answer in a row of a batch that ran from `start_s` to `now_s`."""
        first = self.first_answer
        total_s = now_s - self.request.arrival_s
        compute_s = now_s - start_s + (0.0 if first is None else first.compute_s)
        return InferenceResult(
            vector=output.vectors[row],
            kept=tuple(kept[row] for kept in output.kept),
            met_budget=now_s <= self.deadline_s,
            bundle=self._bundle,
            tier=tier,
            reason=self.reason,
            looks=1 if first is None else first.looks + 1,
            decode_s=self.decode_s,
            queue_s=now_s - self.queued_s - compute_s,
            compute_s=compute_s,
            total_s=total_s,
            patches=self._own_patches(output, row),
            first_tier=None if first is None else first.tier,
        )

    def deliver(self, result: InferenceResult) -> None:
        """End the request with this result, unless it has ended already."""
        if not self.result.done():
            self.outcome = Outcome.IN_TIME if result.met_budget else Outcome.LATE
            self.result.set_result(result)
        self._forget_first()

    def hold(self, first: InferenceResult, until_s: float, on_answer: OnAnswer) -> None:
        """Keep the first answer until a second look replaces it, at most `until_s`.

        on_answer: called with the request and its answer if it ends with the first one.
        """
        self.first_answer, self._on_answer = first, on_answer
        loop = asyncio.get_running_loop()
        self._answer_at = loop.call_at(until_s, self._send_first)

    def send_first_answer(self) -> None:
        """End the request with its first answer, if it has one."""
        if self.first_answer is not None:
            self._send_first()

    def _send_first(self) -> None:
        assert self.first_answer is not None
        now_s, first = asyncio.get_running_loop().time(), self.first_answer
        waited_s = now_s - self.request.arrival_s - first.total_s  # for the second look
        result = replace(
            first,
            queue_s=first.queue_s + waited_s,
            total_s=first.total_s + waited_s,
            met_budget=now_s <= self.deadline_s,
        )
        ended = self.result.done()
        self.deliver(result)
        self.pixels = None  # the image will not run again
        self._bytes.try_resize(0)
        if not ended:
            self._on_answer(self, result)

    def _forget_first(self) -> None:
        """Hold no first answer any more."""
        if self._answer_at is not None:
            self._answer_at.cancel()
        self.first_answer = self._answer_at = None

    def _own_patches(self, output: Output, row: int) -> NDArray[np.float32] | None:
        """Return a copy of the image's patch grid, so that those of its batch can be freed."""
        if output.patches is None or not self.request.patches:
            return None
        own: NDArray[np.float32] = output.patches[row].copy()
        return own

    def raise_if_refused(self) -> None:
        """Raise the error that the request was refused with, if any."""
        if self.result.done():
            self.result.result()

    def stop_waiting(self) -> None:
        """End the wait for an upload or decoder now. Call it after `refuse`."""
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def end(self) -> None:
        """End the request: what it holds is free, as soon as no decoder works on it."""
        self._ended = True
        if self._answer_at is not None:  # the client left
            self._answer_at.cancel()
            self.first_answer = self._answer_at = None
        if not self._decoding:
            self._bytes.release()

    async def _decode(self, body: bytes, cost: DecodeCost) -> None:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        try:
            with self._outcomes():
                decode = self._start_decoding(body, cost)
                if decode.done():  # the event loop has decoded it
                    self.pixels = decode.result()
            if self.pixels is None:
                self.pixels = await self._bounded(decode, self.deadline_s, self._expired)
        except RequestError:
            raise
        except Exception:
            self.outcome = Outcome.FAILED
            raise
        self.queued_s = loop.time()
        self.decode_s = self.queued_s - start_s

    def _start_decoding(self, body: bytes, cost: DecodeCost) -> asyncio.Future[NDArray[np.uint8]]:
        """Have the file decoded. Raises Refused if there is no memory."""
        self._decoding = True
        try:
            return self._resources.decoders.decode(
                self._bundle.preprocess, body, cost, self._decoder_ended
            )
        except Refused:
            self._decoding = False
            raise

    def _decoder_ended(self) -> None:
        """Hold the pixels instead of the body."""
        self._decoding = False
        if self._ended:
            self._bytes.release()
        else:
            self._bytes.try_resize(self._computed_bytes)

    @property
    def _answer_bytes(self) -> int:
        """Bytes of the patch grid until the answer has been sent; 0 if it is not requested."""
        grid = self._bundle.patch_grid
        if grid is None or not self.request.patches or self._answer_handed_over:
            return 0
        return prod(grid) * self.request.number_bytes

    @property
    def _computed_bytes(self) -> int:
        """Bytes that the request holds once it is decoded."""
        return self._pixels_bytes + self._answer_bytes

    def hand_over_answer(self) -> Reservation:
        """Return the reservation of the patch grid, which then outlives the request.

        Call it once there is a result. The caller releases it when the answer has been sent.
        """
        answer, count = AnswerReservation(self._resources.memory), self._answer_bytes
        self._answer_handed_over = True
        self._bytes.try_resize(self._bytes.held_bytes - count)
        answer.try_resize(count)
        return answer

    def _expired(self) -> Refusal:
        return refusals.expired_before_decoded(self.request.budget_ms)

    async def _bounded(
        self, awaitable: Awaitable[T], until_s: float, timeout: Callable[[], Refusal]
    ) -> T:
        """Await until `until_s` on the loop's clock. On failure, set the outcome and raise."""
        try:
            with self._outcomes():
                async with asyncio.timeout_at(until_s) as self._timeout:
                    return await awaitable
        except TimeoutError:
            self.raise_if_refused()  # if that is why the wait was ended
            error, self.outcome = timeout()
            raise error from None
        finally:
            self._timeout = None

    @contextmanager
    def _outcomes(self) -> Iterator[None]:
        """Set the outcome of what is raised inside, and raise it as a RequestError."""
        try:
            yield
        except Refused as refused:
            error, self.outcome = refused.refusal
            raise error from None
        except RequestError as error:
            self.outcome = refusals.outcome_of(error)
            raise
