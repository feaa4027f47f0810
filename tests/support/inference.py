"""One image through a service, without HTTP."""

import asyncio

from pcae_serve.runtime.requests import InferenceRequest, InferenceResult
from pcae_serve.runtime.service import Service
from tests.support.images import image_bytes


async def infer(
    service: Service,
    budget_ms: float,
    body: bytes | None = None,
    *,
    min_tier: str | None = None,
    upload_s: float = 0.0,
    caller: str = "",
) -> InferenceResult:
    """Offer, upload and run an image. upload_s: how long its upload takes."""
    image = image_bytes() if body is None else body
    arrival_s = asyncio.get_running_loop().time()
    request = InferenceRequest(arrival_s, budget_ms, min_tier=min_tier, caller=caller)
    with service.offer(request) as offered:
        body = await offered.receive(lambda _: asyncio.sleep(upload_s, image), len(image))
        return await offered.run(body)
