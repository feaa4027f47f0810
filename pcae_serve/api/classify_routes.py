"""POST /classify and /classify/batch: class probabilities of images."""

import asyncio

from fastapi import APIRouter, Request, Response

from pcae_serve import schemas
from pcae_serve.api import problems, server_timing
from pcae_serve.api.body import announced_bytes, unless_disconnected
from pcae_serve.api.form import read_images, require_plain_body
from pcae_serve.api.image_requests import (
    Answered,
    ParameterReader,
    answer_image,
    body_limit,
    one_image,
    several_images,
)
from pcae_serve.api.parameters import ClassifyParameters
from pcae_serve.api.state import service_of
from pcae_serve.errors import RequestError
from pcae_serve.observability.logs import join_counts
from pcae_serve.runtime import results
from pcae_serve.runtime.request_group import RequestGroup
from pcae_serve.runtime.requests import InferenceResult
from pcae_serve.runtime.uploads import Upload

router = APIRouter(tags=["Images"], responses=problems.documented(problems.IMAGE_PROBLEMS))


@router.post("/classify", openapi_extra=one_image(ClassifyParameters))
async def classify(request: Request, response: Response) -> schemas.Classification:
    """Classify one image. The body is the image file, or a form with the file field `image`.

    Parameters are given in the query or as fields of the form.
    """
    answered = await answer_image(request, response, ClassifyParameters, "logits")
    return _classification(answered)


@router.post("/classify/batch", openapi_extra=several_images(ClassifyParameters))
async def classify_batch(request: Request, response: Response) -> schemas.Batch:
    """Classify several images, sent as file fields `image` of a form; each is scheduled separately.

    The status is 200 if the body could be read. Each result has a status of its own and either an
    answer or a problem; results are in the order of the fields.
    """
    service = service_of(request)
    reader = ParameterReader(request, ClassifyParameters, "logits")
    require_plain_body(request)
    given = reader.parameters
    service.bundle.allowed_tiers(given.tier, given.min_tier)  # refuse before anything is uploaded

    answers: list[InferenceResult] = []

    async def classify_one(group: RequestGroup, image: bytes) -> schemas.BatchItem:
        try:
            with group.offer(reader.inference) as offered:
                answer = await offered.run(image)
        except RequestError as error:
            return schemas.BatchItem(status=error.status, problem=problems.document(error))
        answers.append(answer)
        answered = Answered(reader.parameters, reader.inference, answer)
        return schemas.BatchItem(status=200, answer=_classification(answered))

    limit, max_images = body_limit(service.settings), service.settings.max_images

    async def read(upload: Upload) -> list[bytes]:
        form = await read_images(request, limit, max_images, ClassifyParameters, upload)
        inference = reader.complete(form.fields)
        service.bundle.allowed_tiers(inference.tier, inference.min_tier)
        return form.images

    with service.offer_group(reader.inference) as group:
        copies = 2  # the form, and the files in it
        images = await group.receive(read, announced_bytes(request), copies)
        running = asyncio.gather(*(classify_one(group, image) for image in images))
        items = await unless_disconnected(request, running)
    server_timing.record_timing(request, response, answers)
    request.state.images = join_counts([item.status for item in items])
    return schemas.Batch(results=items)


def _classification(answered: Answered[ClassifyParameters]) -> schemas.Classification:
    given = answered.parameters
    return results.classification(answered.result, answered.inference, given.top_k, given.explain)
