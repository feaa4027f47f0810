"""POST /embed: features of an image."""

from fastapi import APIRouter, Request, Response

from pcae_serve import schemas
from pcae_serve.api import problems, results
from pcae_serve.api.image_requests import ONE_IMAGE, Explain, Requested, answer_image

router = APIRouter(tags=["Images"], responses=problems.documented(problems.IMAGE_PROBLEMS))


@router.post("/embed", openapi_extra=ONE_IMAGE)
async def embed(
    request: Request, response: Response, inference_request: Requested, explain: Explain = False
) -> schemas.Embedding:
    """Return the features of one image, from a bundle without a head. The body is as for /classify.

    The features are not scaled to length 1.
    """
    answer = await answer_image(request, response, inference_request, "features")
    return results.embedding(answer, inference_request, explain)
