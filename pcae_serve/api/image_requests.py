"""Image requests: query parameters, reading of bodies, and the answer to one image."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Depends, Header, Query, Request, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from pcae_serve.api import proxy_delay, server_timing
from pcae_serve.api.body import announced_bytes, limited, unless_disconnected
from pcae_serve.api.state import service_of
from pcae_serve.errors import TooLarge, UnreadableImage, UnsupportedType, one_line
from pcae_serve.runtime.requests import InferenceRequest, InferenceResult
from pcae_serve.runtime.uploads import Upload
from pcae_serve.settings import Settings

_FILE = {"type": "string", "format": "binary"}


def _multipart(image: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a form whose field `image` has the schema `image`."""
    return {"schema": {"type": "object", "required": ["image"], "properties": {"image": image}}}


#: OpenAPI: the body is an image file, or a form with one.
ONE_IMAGE = {
    "requestBody": {
        "required": True,
        "content": {"image/*": {"schema": _FILE}, "multipart/form-data": _multipart(_FILE)},
    }
}
#: OpenAPI: the body is a form with several image files.
SEVERAL_IMAGES = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": _multipart({"type": "array", "items": _FILE})},
    }
}

_BUDGET = {"gt": 0, "le": 3_600_000, "allow_inf_nan": False}
BudgetQuery = Annotated[
    float | None,
    Query(
        description="milliseconds from the arrival of the headers until the answer is due;"
        " default: the server's budget_ms (see /tiers)",
        **_BUDGET,
    ),
]
BudgetHeader = Annotated[
    float | None,
    Header(description="same as the query parameter budget_ms, which takes precedence", **_BUDGET),
]
TierName = Annotated[
    str, Query(description="name of a tier, or auto: the most accurate one that meets the budget")
]
MinTier = Annotated[
    str | None,
    Query(
        description="cheapest tier that auto may use; if it cannot meet the budget, the request"
        " is refused"
    ),
]
TopK = Annotated[int, Query(ge=1, description="number of classes to return, most probable first")]
Explain = Annotated[
    bool, Query(description="also return the indices of the patches kept after each stage")
]


async def requested(
    request: Request,
    tier: TierName = "auto",
    budget_ms: BudgetQuery = None,
    min_tier: MinTier = None,
    x_latency_budget_ms: BudgetHeader = None,
) -> InferenceRequest:
    """Return the inference request that the query and the headers describe."""
    arrival_s = proxy_delay.arrival_s(request.scope.get("state", {}))
    budget = budget_ms or x_latency_budget_ms or service_of(request).settings.budget_ms
    return InferenceRequest(arrival_s, budget, tier, min_tier)


Requested = Annotated[InferenceRequest, Depends(requested)]


async def answer_image(
    request: Request,
    response: Response,
    inference: InferenceRequest,
    answers: Literal["logits", "features"],
) -> InferenceResult:
    """Read the image in the body, run it, and record its timing in `response`."""
    service = service_of(request)
    read = partial(read_image, request, body_limit(service.settings))
    with service.offer(replace(inference, answers=answers)) as offered:
        image = await offered.receive(read, announced_bytes(request))
        answer = await unless_disconnected(request, offered.run(image))
    server_timing.record_timing(request, response, [answer])
    return answer


def body_limit(settings: Settings) -> int:
    """Return how many bytes a body may have."""
    return int(settings.max_body_mb * 1e6)


async def read_image(request: Request, limit: int, upload: Upload) -> bytes:
    """Return the image file in the body: the body itself, or its multipart field `image`.

    Raise TooLarge if the body has more than `limit` bytes.
    """
    if not _is_multipart(request):
        return b"".join([chunk async for chunk in limited(request, limit, upload)])
    return (await read_images(request, limit, 1, upload))[0]


async def read_images(request: Request, limit: int, max_images: int, upload: Upload) -> list[bytes]:
    """Return the image files in the multipart fields `image`, in order.

    Raise TooLarge if the body has more than `limit` bytes or `max_images` files.
    """
    if not _is_multipart(request):
        raise UnsupportedType("send multipart/form-data with each image in a file field 'image'")
    chunks = limited(request, limit, upload)
    parser = MultiPartParser(request.headers, chunks, max_files=max_images)
    parser.spool_max_size = limit + 1  # keep it in memory, which `limit` bounds
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        if "Too many files" in str(error):
            raise TooLarge(f"the body has more than {max_images} files; send fewer") from None
        raise UnreadableImage(f"the multipart body cannot be parsed: {one_line(error)}") from None
    try:
        fields = [field for field in form.getlist("image") if isinstance(field, UploadFile)]
        if not fields:
            raise UnreadableImage("the multipart body has no file field 'image'")
        return [await field.read() for field in fields]
    finally:
        await form.close()


def _is_multipart(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")
