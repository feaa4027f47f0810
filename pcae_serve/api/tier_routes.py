"""GET /tiers: the bundle, the device and the tiers."""

import asyncio

from fastapi import APIRouter, Request

from pcae_serve import schemas
from pcae_serve.api import problems
from pcae_serve.api.state import service_of
from pcae_serve.runtime.tier_info import describe_bundle

router = APIRouter(tags=["Server"], responses=problems.documented(problems.KEY_PROBLEMS))


@router.get("/tiers")
async def tiers(request: Request) -> schemas.Tiers:
    """Return the bundle, the device and all tiers with accuracy and latency, cheapest first."""
    service = service_of(request)
    latency = service.latency
    return describe_bundle(
        service.bundle,
        service.engines[0],
        None if latency is None else latency.forecast(asyncio.get_running_loop().time()),
        service.settings.max_batch,
        device=service.device,
        policy=service.settings.policy,
        budget_ms=service.settings.budget_ms,
        max_looks=service.settings.max_looks,
        disabled=service.disabled_tiers,
    )
