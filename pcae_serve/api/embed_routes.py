"""POST /embed and /embed/batch: features of images."""

from functools import partial

import numpy as np
from fastapi import APIRouter, Request, Response

from pcae_serve import schemas
from pcae_serve.api import array_answers, problems
from pcae_serve.api.array_answers import MET_BUDGET, STATUS, TIER, Format, accepted_format
from pcae_serve.api.image_requests import (
    Answered,
    answer_image,
    answer_images,
    one_image,
    several_images,
)
from pcae_serve.api.parameters import EmbedParameters
from pcae_serve.bundle.features import convert
from pcae_serve.errors import InvalidParameter, OutOfService, RequestError
from pcae_serve.runtime import results

router = APIRouter(tags=["Images"], responses=problems.documented(problems.IMAGE_PROBLEMS))


@router.post(
    "/embed",
    openapi_extra=one_image(EmbedParameters),
    response_model=schemas.Embedding,
    responses={200: array_answers.DOCUMENTED},
)
async def embed(request: Request, response: Response) -> schemas.Embedding | Response:
    """Return the features of one image, from a bundle without a head. The body is as for /classify.

    With `Accept: application/octet-stream` or `application/x-npy` the answer is the array alone.
    """
    form = accepted_format(request)
    response.headers["Vary"] = "Accept"
    answered = await answer_image(
        request, response, EmbedParameters, "features", partial(_check, form)
    )
    if form == "json":
        return _embedding(answered)
    given, result = answered.parameters, answered.result
    headers = {TIER: result.tier.name, MET_BUDGET: _word(result.met_budget)}
    array = convert(result.vector, given.normalize, given.dtype)
    return array_answers.array_response(form, array, headers, response)


@router.post(
    "/embed/batch",
    openapi_extra=several_images(EmbedParameters),
    response_model=schemas.EmbeddingBatch,
    responses={200: array_answers.DOCUMENTED_BATCH},
)
async def embed_batch(request: Request, response: Response) -> schemas.EmbeddingBatch | Response:
    """Return the features of several images, sent as file fields `image` of a form.

    Each is scheduled separately. The status is 200 if the body could be read. Each result has a
    status of its own and either an answer or a problem; results are in the order of the fields.
    With `Accept: application/octet-stream` or `application/x-npy` the answer is an array with a
    row for each image whose status, in the header X-Status, is 200.
    """
    form = accepted_format(request)
    response.headers["Vary"] = "Accept"
    outcomes = await answer_images(
        request, response, EmbedParameters, "features", partial(_check, form)
    )
    if form == "json":
        return schemas.EmbeddingBatch(results=[_item(outcome) for outcome in outcomes])
    return _array_of_several(form, outcomes, response)


def _check(form: Format, given: EmbedParameters) -> None:
    """Raise InvalidParameter for what only JSON can state."""
    if given.explain and form != "json":
        raise InvalidParameter("explain needs an answer in JSON; omit it, or accept JSON")


def _embedding(answered: Answered[EmbedParameters]) -> schemas.Embedding:
    given = answered.parameters
    return results.embedding(
        answered.result, answered.inference, given.explain, given.normalize, given.dtype
    )


def _item(outcome: Answered[EmbedParameters] | RequestError) -> schemas.EmbeddingItem:
    try:
        if not isinstance(outcome, RequestError):
            return schemas.EmbeddingItem(status=200, answer=_embedding(outcome))
    except RequestError as error:  # a feature that float16 cannot hold
        outcome = error
    return schemas.EmbeddingItem(status=outcome.status, problem=problems.document(outcome))


def _array_of_several(
    form: Format, outcomes: list[Answered[EmbedParameters] | RequestError], response: Response
) -> Response:
    """Return an array with a row for each image that was answered.

    Raises InvalidParameter, or OutOfService if the images were answered by different bundles.
    """
    answered = [each for each in outcomes if isinstance(each, Answered)]
    if len({id(each.result.bundle) for each in answered}) > 1:
        raise OutOfService("the bundle was reloaded between the images; retry", retry_after_s=1)
    statuses = [200 if isinstance(each, Answered) else each.status for each in outcomes]
    vectors = np.zeros((0, 0), np.float32)
    if answered:
        vectors = np.stack([each.result.vector for each in answered])  # [N, D]
        given = answered[0].parameters
        vectors = convert(vectors, given.normalize, given.dtype)
    headers = {
        STATUS: ",".join(map(str, statuses)),
        TIER: ",".join(each.result.tier.name for each in answered),
        MET_BUDGET: ",".join(_word(each.result.met_budget) for each in answered),
    }
    return array_answers.array_response(form, vectors, headers, response)


def _word(value: bool) -> str:
    return "true" if value else "false"
