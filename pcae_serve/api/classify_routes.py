"""POST /classify and /classify/batch: class probabilities of images."""

from fastapi import APIRouter, Request, Response

from pcae_serve import schemas
from pcae_serve.api import problems
from pcae_serve.api.direct_route import DirectRoute
from pcae_serve.api.image_requests import (
    Answered,
    answer_image,
    answer_images,
    one_image,
    several_images,
)
from pcae_serve.api.parameters import ClassifyParameters
from pcae_serve.errors import RequestError
from pcae_serve.runtime import results

router = APIRouter(
    tags=["Images"],
    responses=problems.documented(problems.IMAGE_PROBLEMS),
    route_class=DirectRoute,
)


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
    outcomes = await answer_images(request, response, ClassifyParameters, "logits")
    return schemas.Batch(results=[_item(outcome) for outcome in outcomes])


def _item(outcome: Answered[ClassifyParameters] | RequestError) -> schemas.BatchItem:
    if isinstance(outcome, RequestError):
        return schemas.BatchItem(status=outcome.status, problem=problems.document(outcome))
    return schemas.BatchItem(status=200, answer=_classification(outcome))


def _classification(answered: Answered[ClassifyParameters]) -> schemas.Classification:
    given = answered.parameters
    return results.classification(answered.result, answered.inference, given.top_k, given.explain)
