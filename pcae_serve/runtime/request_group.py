"""A request for several images, each of which is admitted or refused on its own."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from pcae_serve.errors import RequestError
from pcae_serve.observability.metrics import Metrics
from pcae_serve.observability.outcomes import Outcome
from pcae_serve.runtime import refusals
from pcae_serve.runtime.offered import OfferedRequest
from pcae_serve.runtime.refusals import Refused
from pcae_serve.runtime.requests import InferenceRequest
from pcae_serve.runtime.uploads import Upload, Uploads

T = TypeVar("T")


class RequestGroup:
    """A request whose body holds several images."""

    def __init__(
        self,
        upload_s: float,
        metrics: Metrics,
        uploads: Uploads,
        offer: Callable[[InferenceRequest], AbstractContextManager[OfferedRequest]],
    ) -> None:
        """upload_s: maximum time to receive the body. offer: offers one image."""
        self._upload_s, self._metrics, self._uploads = upload_s, metrics, uploads
        self._offer = offer

    async def receive(self, read: Callable[[Upload], Awaitable[T]], length: int) -> T:
        """Await the body of the whole request.

        read: reads it. length: as announced, 0 if it was not. Raises UploadTimeout, Dropped,
        Overloaded, or what `read` raises.
        """
        until_s = asyncio.get_running_loop().time() + self._upload_s
        try:
            async with asyncio.timeout_at(until_s):
                return await self._uploads.receive(read, length=length, until_s=until_s)
        except TimeoutError:
            hint = "send it faster or send fewer images"
            error, outcome = refusals.upload_timeout(self._upload_s, hint)
            self._metrics.record_request(outcome)
            raise error from None
        except Refused as refused:
            error, outcome = refused.refusal
            self._metrics.record_request(outcome)
            raise error from None
        except RequestError:
            self._metrics.record_request(Outcome.UNREADABLE)
            raise

    def offer(self, request: InferenceRequest) -> AbstractContextManager[OfferedRequest]:
        """Offer one image of the group, during a drain as well. Raises a RequestError."""
        return self._offer(request)
