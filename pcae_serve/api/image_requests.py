"""Image requests: what they may carry, and the answer to one image."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from fastapi import Request, Response

from pcae_serve.api import auth, parameters, proxy_delay, server_timing
from pcae_serve.api.body import announced_bytes, unless_disconnected
from pcae_serve.api.form import IMAGE, is_form, read_image, read_images, require_plain_body
from pcae_serve.api.parameters import (
    MAX_BUDGET_MS,
    ClassifyParameters,
    EmbedParameters,
    ImageParameters,
)
from pcae_serve.api.state import service_of
from pcae_serve.errors import RequestError
from pcae_serve.observability.logs import join_counts
from pcae_serve.runtime.memory_budget import Reservation
from pcae_serve.runtime.request_group import RequestGroup
from pcae_serve.runtime.requests import InferenceRequest, InferenceResult
from pcae_serve.runtime.uploads import Upload
from pcae_serve.settings import Settings

P = TypeVar("P", bound=ImageParameters)
Output = Literal["logits", "features"]

_FILE = {"type": "string", "format": "binary"}


def one_image(kind: type[ImageParameters]) -> dict[str, Any]:
    """Return the OpenAPI of an operation whose body is an image file, or a form with one."""
    content = {"image/*": {"schema": _FILE}, "multipart/form-data": _form(_FILE, kind)}
    return _operation(content, kind)


def several_images(kind: type[ImageParameters]) -> dict[str, Any]:
    """Return the OpenAPI of an operation whose body is a form with several image files."""
    return _operation({"multipart/form-data": _form({"type": "array", "items": _FILE}, kind)}, kind)


def _operation(content: dict[str, Any], kind: type[ImageParameters]) -> dict[str, Any]:
    return {
        "parameters": parameters.openapi(kind),
        "requestBody": {"required": True, "content": content},
    }


def _form(image: dict[str, Any], kind: type[ImageParameters]) -> dict[str, Any]:
    """Return the schema of a form whose field `image` has the schema `image`."""
    properties = {IMAGE: image, **parameters.openapi_fields(kind)}
    return {"schema": {"type": "object", "required": [IMAGE], "properties": properties}}


@dataclass(frozen=True)
class Answered(Generic[P]):
    """An answered request: its parameters as they applied, and the result."""

    parameters: P
    inference: InferenceRequest
    result: InferenceResult
    held: Reservation | None = None  # of its patch grid; to be released when it has been sent


async def answer_image(
    request: Request,
    response: Response,
    kind: type[P],
    answers: Output,
    check: Callable[[P], None] = lambda _: None,
    number_bytes: int = 0,
) -> Answered[P]:
    """Read the image in the body, run it, and record its timing in `response`.

    kind: the parameters that the request may have. check: raises InvalidParameter for parameters
    that it must not have. number_bytes: see InferenceRequest.
    """
    service = service_of(request)
    reader = ParameterReader(request, kind, answers, check, number_bytes)
    require_plain_body(request)

    async def read(upload: Upload) -> bytes:
        form = await read_image(request, body_limit(service.settings), kind, upload)
        offered.revise(reader.complete(form.fields))
        return form.images[0]

    with service.offer(reader.inference) as offered:
        copies = 2 if is_form(request) else 1  # the form, and the file in it
        work = offered.run(await offered.receive(read, announced_bytes(request), copies))
        result = await unless_disconnected(request, work)
        held = offered.hand_over_answer() if reader.inference.patches else None
    server_timing.record_timing(request, response, [result])
    return Answered(reader.parameters, reader.inference, result, held)


async def answer_images(
    request: Request,
    response: Response,
    kind: type[P],
    answers: Output,
    check: Callable[[P], None] = lambda _: None,
    number_bytes: int = 0,
) -> list[Answered[P] | RequestError]:
    """Read the images in the form, run each on its own, and record the slowest in `response`.

    Returns what became of each, in their order. kind, check, number_bytes: see `answer_image`.
    """
    service = service_of(request)
    reader = ParameterReader(request, kind, answers, check, number_bytes)
    require_plain_body(request)
    given = reader.parameters
    service.bundle.allowed_tiers(given.tier, given.min_tier)  # refuse before anything is uploaded

    async def answer_one(group: RequestGroup, image: bytes) -> Answered[P] | RequestError:
        try:
            with group.offer(reader.inference) as offered:
                result = await offered.run(image)
                held = offered.hand_over_answer() if reader.inference.patches else None
        except RequestError as error:
            return error
        return Answered(reader.parameters, reader.inference, result, held)

    limit, max_images = body_limit(service.settings), service.settings.max_images

    async def read(upload: Upload) -> list[bytes]:
        form = await read_images(request, limit, max_images, kind, upload)
        inference = reader.complete(form.fields)
        service.bundle.allowed_tiers(inference.tier, inference.min_tier)
        return form.images

    with service.offer_group(reader.inference) as group:
        copies = 2  # the form, and the files in it
        images = await group.receive(read, announced_bytes(request), copies)
        running = asyncio.gather(*(answer_one(group, image) for image in images))
        outcomes = await unless_disconnected(request, running)
    results = [each.result for each in outcomes if isinstance(each, Answered)]
    server_timing.record_timing(request, response, results)
    request.state.images = join_counts(
        [200 if isinstance(each, Answered) else each.status for each in outcomes]
    )
    return outcomes


class ParameterReader(Generic[P]):
    """The parameters of a request: those of query and header, later those of its form as well.

    Until a form is complete, the budget that it may hold is taken to be the largest.
    """

    def __init__(
        self,
        request: Request,
        kind: type[P],
        answers: Output,
        check: Callable[[P], None] = lambda _: None,
        number_bytes: int = 0,
    ) -> None:
        """Read query and header. Raises InvalidParameter, also what `check` raises."""
        self._number_bytes = number_bytes
        self._request, self._kind, self._answers, self._check = request, kind, answers, check
        self._arrival_s = proxy_delay.arrival_s(request.scope.get("state", {}))
        self._default_ms = service_of(request).settings.budget_ms
        self.parameters = parameters.read(kind, request)
        check(self.parameters)
        self.inference = self._inference(MAX_BUDGET_MS if is_form(request) else self._default_ms)

    def complete(self, fields: Iterable[tuple[str, str]]) -> InferenceRequest:
        """Add the fields of the form, and return what is requested. Raises InvalidParameter."""
        self.parameters = parameters.read(self._kind, self._request, fields)
        self._check(self.parameters)
        self.inference = self._inference(self._default_ms)
        return self.inference

    def _inference(self, default_ms: float) -> InferenceRequest:
        given = self.parameters
        return InferenceRequest(
            self._arrival_s,
            given.budget_ms or default_ms,
            given.tier,
            given.min_tier,
            self._answers,
            *callers_of(self._request),
            patches=isinstance(given, EmbedParameters) and given.patches,
            number_bytes=self._number_bytes,
            smaller="omit patches, or accept application/octet-stream",
            max_looks=given.max_looks if isinstance(given, ClassifyParameters) else None,
        )


def callers_of(request: Request) -> tuple[str, str | None]:
    """Return caller and key_name of a request's InferenceRequest."""
    mode = service_of(request).settings.callers
    return auth.caller(request, mode), auth.key_name(request)


def body_limit(settings: Settings) -> int:
    """Return how many bytes a body may have."""
    return int(settings.max_body_mb * 1e6)
