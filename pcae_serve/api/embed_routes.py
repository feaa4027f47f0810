"""POST /embed and /embed/batch: features of images."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic_core import to_json

from pcae_serve import schemas
from pcae_serve.api import array_answers, problems
from pcae_serve.api.array_answers import (
    MET_BUDGET,
    NUMBER_BYTES,
    STATUS,
    TIER,
    Format,
    HeldResponse,
    accepted_format,
    array_response,
    embedding_json,
)
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
from pcae_serve.runtime.memory_budget import Reservation

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
    answered = await answer_image(
        request,
        response,
        EmbedParameters,
        "features",
        partial(_check, form),
        NUMBER_BYTES[form],
    )
    response.headers["Vary"] = "Accept"
    given, result = answered.parameters, answered.result
    held = [answered.held] if answered.held is not None else []
    if form != "json":
        headers = {TIER: result.tier.name, MET_BUDGET: _word(result.met_budget)}
        features = convert(result.vector, given.normalize, given.dtype)
        patches = _convert_patches(answered)
        answer = array_response(form, features, patches, headers, held)
    elif given.patches:
        answer = HeldResponse(await _dense_json(answered), "application/json", {}, held)
    else:
        return _embedding(answered)
    answer.headers.update(response.headers)
    return answer


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
    outcomes = await answer_images(
        request,
        response,
        EmbedParameters,
        "features",
        partial(_check, form),
        NUMBER_BYTES[form],
    )
    response.headers["Vary"] = "Accept"
    held = [each.held for each in outcomes if isinstance(each, Answered) and each.held is not None]
    if form != "json":
        answer = _arrays_of_several(form, outcomes, held)
    elif held:
        items = [await _dense_item(outcome) for outcome in outcomes]
        content = b'{"results":[' + b",".join(items) + b"]}"
        answer = HeldResponse(content, "application/json", {}, held)
    else:
        return schemas.EmbeddingBatch(results=[_item(outcome) for outcome in outcomes])
    answer.headers.update(response.headers)
    return answer


def _check(form: Format, given: EmbedParameters) -> None:
    """Raise InvalidParameter for what only JSON can state."""
    if given.explain and form != "json":
        raise InvalidParameter("explain needs an answer in JSON; omit it, or accept JSON")


def _embedding(answered: Answered[EmbedParameters]) -> schemas.Embedding:
    """Return the document of an answer, without patches. Raises InvalidParameter."""
    given = answered.parameters
    return results.embedding(
        replace(answered.result, patches=None),
        answered.inference,
        given.explain,
        given.normalize,
        given.dtype,
    )


def _convert_patches(answered: Answered[EmbedParameters]) -> NDArray[Any] | None:
    """Return the patch grid in the form that was asked for. Raises InvalidParameter."""
    given, patches = answered.parameters, answered.result.patches
    return None if patches is None else convert(patches, given.normalize, given.dtype)


async def _dense_json(answered: Answered[EmbedParameters]) -> bytes:
    """Return the document of an answer with patches. Raises InvalidParameter."""
    patches = _convert_patches(answered)
    assert patches is not None
    return await embedding_json(_embedding(answered), patches)


def _item(outcome: Answered[EmbedParameters] | RequestError) -> schemas.EmbeddingItem:
    try:
        if not isinstance(outcome, RequestError):
            return schemas.EmbeddingItem(status=200, answer=_embedding(outcome))
    except RequestError as error:  # a feature that float16 cannot hold
        outcome = error
    return schemas.EmbeddingItem(status=outcome.status, problem=problems.document(outcome))


async def _dense_item(outcome: Answered[EmbedParameters] | RequestError) -> bytes:
    """Return what `_item` does as JSON, with patches."""
    try:
        if not isinstance(outcome, RequestError):
            answer = await _dense_json(outcome)
            return b'{"status":200,"problem":null,"answer":' + answer + b"}"
    except RequestError as error:
        outcome = error
    return to_json(_item(outcome))


def _arrays_of_several(
    form: Format,
    outcomes: list[Answered[EmbedParameters] | RequestError],
    held: Sequence[Reservation],
) -> Response:
    """Return arrays with a row for each image that was answered.

    Raises InvalidParameter, or OutOfService if the images were answered by different bundles.
    """
    answered = [each for each in outcomes if isinstance(each, Answered)]
    if len({id(each.result.bundle) for each in answered}) > 1:
        raise OutOfService("the bundle was reloaded between the images; retry", retry_after_s=1)
    statuses = [200 if isinstance(each, Answered) else each.status for each in outcomes]
    features, patches = np.zeros((0, 0), np.float32), None
    if answered:
        vectors = np.stack([each.result.vector for each in answered])  # [N, D]
        given = answered[0].parameters
        features = convert(vectors, given.normalize, given.dtype)
        if given.patches:
            grids = [each.result.patches for each in answered if each.result.patches is not None]
            patches = convert(np.stack(grids), given.normalize, given.dtype)  # [N, H, W, D]
    headers = {
        STATUS: ",".join(map(str, statuses)),
        TIER: ",".join(each.result.tier.name for each in answered),
        MET_BUDGET: ",".join(_word(each.result.met_budget) for each in answered),
    }
    return array_response(form, features, patches, headers, held)


def _word(value: bool) -> str:
    return "true" if value else "false"
