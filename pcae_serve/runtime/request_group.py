"""A request for several images, each of which is admitted on its own."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from pcae_serve.errors import RequestError
from pcae_serve.observability.metrics import Metrics
from pcae_serve.observability.outcomes import Outcome
from pcae_serve.runtime import refusals
from pcae_serve.runtime.admitted import AdmittedRequest
from pcae_serve.runtime.requests import InferenceRequest

T = TypeVar("T")


class RequestGroup:
    """A request whose body holds several images."""

    def __init__(
        self,
        upload_s: float,
        metrics: Metrics,
        admit: Callable[[InferenceRequest], AbstractContextManager[AdmittedRequest]],
    ) -> None:
        """upload_s: maximum time to receive the body. admit: admits one image."""
        self._upload_s, self._metrics, self._admit = upload_s, metrics, admit

    async def receive(self, upload: Awaitable[T]) -> T:
        """Await the body of the whole request. Raises UploadTimeout, or what `upload` raises."""
        try:
            async with asyncio.timeout(self._upload_s):
                return await upload
        except TimeoutError:
            hint = "send it faster or send fewer images"
            error, outcome = refusals.upload_timeout(self._upload_s, hint)
            self._metrics.record_request(outcome)
            raise error from None
        except RequestError:
            self._metrics.record_request(Outcome.UNREADABLE)
            raise

    def admit(self, request: InferenceRequest) -> AbstractContextManager[AdmittedRequest]:
        """Admit one image of the group, during a drain as well. Raises a RequestError."""
        return self._admit(request)
