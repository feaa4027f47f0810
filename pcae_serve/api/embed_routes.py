"""POST /embed: features of an image."""

from fastapi import APIRouter, Request, Response

from pcae_serve import schemas
from pcae_serve.api import problems
from pcae_serve.api.image_requests import answer_image, one_image
from pcae_serve.api.parameters import ImageParameters
from pcae_serve.runtime import results

router = APIRouter(tags=["Images"], responses=problems.documented(problems.IMAGE_PROBLEMS))


@router.post("/embed", openapi_extra=one_image(ImageParameters))
async def embed(request: Request, response: Response) -> schemas.Embedding:
    """Return the features of one image, from a bundle without a head. The body is as for /classify.

    The features are not scaled to length 1.
    """
    answered = await answer_image(request, response, ImageParameters, "features")
    return results.embedding(answered.result, answered.inference, answered.parameters.explain)
