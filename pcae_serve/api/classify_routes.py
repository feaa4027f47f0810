"""POST /classify and /classify/batch: class probabilities of images."""

import asyncio
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request, Response

from pcae_serve import schemas
from pcae_serve.api import problems, results, server_timing
from pcae_serve.api.body import announced_bytes, unless_disconnected
from pcae_serve.api.image_requests import (
    ONE_IMAGE,
    SEVERAL_IMAGES,
    Explain,
    Requested,
    TopK,
    answer_image,
    body_limit,
    read_images,
)
from pcae_serve.api.state import service_of
from pcae_serve.errors import RequestError
from pcae_serve.observability.logs import join_counts
from pcae_serve.runtime.request_group import RequestGroup
from pcae_serve.runtime.requests import InferenceResult

router = APIRouter(tags=["Images"], responses=problems.documented(problems.IMAGE_PROBLEMS))


@router.post("/classify", openapi_extra=ONE_IMAGE)
async def classify(
    request: Request,
    response: Response,
    inference: Requested,
    top_k: TopK = 5,
    explain: Explain = False,
) -> schemas.Classification:
    """Classify one image. The body is the image file, or a form with the file field `image`."""
    answer = await answer_image(request, response, inference, "logits")
    return results.classification(answer, inference, top_k, explain)


@router.post("/classify/batch", openapi_extra=SEVERAL_IMAGES)
async def classify_batch(
    request: Request,
    response: Response,
    inference: Requested,
    top_k: TopK = 5,
    explain: Explain = False,
) -> schemas.Batch:
    """Classify several images, sent as file fields `image` of a form; each is scheduled separately.

    The status is 200 if the body could be read. Each result has a status of its own and either an
    answer or a problem; results are in the order of the fields.
    """
    service = service_of(request)
    logits = replace(inference, answers="logits")
    service.bundle.allowed_tiers(
        inference.tier, inference.min_tier
    )  # refuse before anything is uploaded

    answers: list[InferenceResult] = []

    async def classify_one(group: RequestGroup, image: bytes) -> schemas.BatchItem:
        try:
            with group.offer(logits) as offered:
                answer = await offered.run(image)
        except RequestError as error:
            return schemas.BatchItem(status=error.status, problem=problems.document(error))
        answers.append(answer)
        answered = results.classification(answer, inference, top_k, explain)
        return schemas.BatchItem(status=200, answer=answered)

    limit, max_images = body_limit(service.settings), service.settings.max_images
    read = partial(read_images, request, limit, max_images)
    with service.offer_group() as group:
        images = await group.receive(read, announced_bytes(request))
        running = asyncio.gather(*(classify_one(group, image) for image in images))
        items = await unless_disconnected(request, running)
    server_timing.record_timing(request, response, answers)
    request.state.images = join_counts([item.status for item in items])
    return schemas.Batch(results=items)
