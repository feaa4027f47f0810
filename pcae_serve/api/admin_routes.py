"""POST /admin/reload: routes that need an admin key."""

from fastapi import APIRouter, Depends, Request

from pcae_serve import schemas
from pcae_serve.api import problems
from pcae_serve.api.auth import require_admin_key
from pcae_serve.api.state import service_of

router = APIRouter(prefix="/admin", tags=["Server"], dependencies=[Depends(require_admin_key)])


@router.post(
    "/reload",
    responses=problems.documented(
        {
            401: "the request has no API key",
            403: "the key is not an admin key, or admin routes are disabled",
            409: "another reload is running",
            422: "the new bundle cannot be served; the old one stays",
            503: "the server is starting or shutting down",
        }
    ),
)
async def reload(request: Request) -> schemas.Reload:
    """Reload the bundle folder without dropping a request. SIGHUP does the same."""
    done = await service_of(request).reload()
    return schemas.Reload(
        bundle=done.bundle.manifest.name,
        digest=done.bundle.digest,
        tiers=[tier.name for tier in done.bundle.tiers],
        seconds=round(done.seconds, 3),
    )
