"""GET /metrics: the server's metrics for Prometheus."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from pcae_serve.api import problems
from pcae_serve.api.state import service_of

router = APIRouter(tags=["Server"], responses=problems.documented(problems.KEY_PROBLEMS))


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Return the counters and gauges since the server's start, in Prometheus' text format."""
    content, media_type = service_of(request).metrics.exposition()
    return Response(content, media_type=media_type)
