"""GET /livez and /readyz: probes for an orchestrator."""

from fastapi import APIRouter, Request
from starlette.types import Scope

from pcae_serve import schemas
from pcae_serve.api import problems
from pcae_serve.api.request_line import route_path
from pcae_serve.api.state import service_of

#: Paths of probes, which are answered whatever the state of the server; those of /v2 included.
_PATHS = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})

router = APIRouter(tags=["Server"])


def is_probe(scope: Scope) -> bool:
    """Return whether a request is a probe, also behind the prefix of a proxy."""
    return route_path(scope) in _PATHS


@router.get(
    "/livez",
    responses=problems.documented({503: "a device is lost until the process is restarted"}),
)
async def livez(request: Request) -> schemas.Health:
    """Report whether the process works; 503 if a device never returned from a call."""
    service_of(request).require_alive()
    return schemas.Health(status="alive")


@router.get(
    "/readyz",
    responses=problems.documented({503: "starting, shutting down, or every tier has failed"}),
)
async def readyz(request: Request) -> schemas.Health:
    """Report whether requests are accepted: latencies are measured and a tier works."""
    service_of(request).require_ready()
    return schemas.Health(status="ready")
