"""A request for several images, each of which is admitted or refused on its own."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from pcae_serve.errors import RequestError
from pcae_serve.observability.outcomes import Outcome
from pcae_serve.runtime import refusals
from pcae_serve.runtime.offered import OfferedRequest
from pcae_serve.runtime.refusals import Refusal, Refused
from pcae_serve.runtime.requests import InferenceRequest
from pcae_serve.runtime.resources import Resources
from pcae_serve.runtime.uploads import Upload

log = logging.getLogger(__name__)

T = TypeVar("T")


class RequestGroup:
    """A request whose body holds several images."""

    def __init__(
        self,
        upload_s: float,
        count: Callable[[Outcome], None],
        take: Callable[[int], Refusal | None],
        resources: Resources,
        offer: Callable[..., AbstractContextManager[OfferedRequest]],
    ) -> None:
        """upload_s: maximum time to receive the body. offer: offers one image.

        count: counts the request as a whole, if it ends before its images are offered. take: counts
        the images in the rate of the request's key, or refuses them.
        """
        self._take, self._taken = take, False
        self._upload_s, self._count, self._resources = upload_s, count, resources
        self._offer, self._bytes = offer, resources.memory.reserve()
        self._refusal: Refusal | None = None  # of the request as a whole
        self._offered = False  # its images, which are counted instead

    async def receive(
        self, read: Callable[[Upload], Awaitable[T]], length: int, copies: int = 1
    ) -> T:
        """Await the body of the whole request, whose bytes are held until the request ends.

        read: reads it. length: as announced, 0 if it was not. copies: how many of the body are in
        memory at a time. Raises UploadTimeout, Dropped, Overloaded, TooLarge, or what `read`
        raises.
        """
        until_s = asyncio.get_running_loop().time() + self._upload_s
        try:
            async with asyncio.timeout_at(until_s):
                return await self._resources.uploads.receive(
                    read, self._bytes, length=length, copies=copies, until_s=until_s
                )
        except TimeoutError:
            hint = "send it faster or send fewer images"
            raise self._refused(refusals.upload_timeout(self._upload_s, hint)) from None
        except Refused as refused:
            raise self._refused(refused.refusal) from None

    def take(self, images: int) -> None:
        """Count all images in the rate of the request's key at once, before they are offered.

        Raises RateLimited or TooLarge.
        """
        if (refusal := self._take(images)) is not None:
            raise self._refused(refusal)
        self._taken = True

    def offer(self, request: InferenceRequest) -> AbstractContextManager[OfferedRequest]:
        """Offer one image of the group, during a drain as well. Raises a RequestError."""
        self._offered = True
        return self._offer(request, counted=self._taken)

    @contextmanager
    def until_end(self) -> Iterator[None]:
        """End the request with the context. Raises OutOfMemory in place of a MemoryError."""
        outcome: Outcome | None = Outcome.CANCELLED  # unless it ends otherwise
        try:
            yield
            outcome = None
        except MemoryError:
            log.error("too little memory for a request")
            refusal = refusals.out_of_memory()
            outcome = refusal.outcome
            raise refusal.error from None
        except RequestError as error:
            outcome = self._refusal.outcome if self._refusal else refusals.outcome_of(error)
            raise
        finally:
            self._bytes.release()
            if not self._offered and outcome is not None:
                self._count(outcome)

    def _refused(self, refusal: Refusal) -> RequestError:
        self._refusal = refusal
        return refusal.error
