"""GET /tiers: the bundle, the device and the tiers."""

import asyncio

from fastapi import APIRouter, Request

from pcae_serve import schemas
from pcae_serve.api import problems
from pcae_serve.api.state import service_of
from pcae_serve.engines.base import BACKEND_NOTES
from pcae_serve.runtime.service import Service
from pcae_serve.runtime.tier_info import describe_tier

router = APIRouter(tags=["Server"], responses=problems.documented(problems.KEY_PROBLEMS))


@router.get("/tiers")
async def tiers(request: Request) -> schemas.Tiers:
    """Return the bundle, the device and all tiers with accuracy and latency, cheapest first."""
    service = service_of(request)
    bundle, engine = service.bundle, service.engines[0]
    return schemas.Tiers(
        bundle=bundle.manifest.name,
        digest=bundle.digest,
        backend=engine.name,
        backend_version=engine.version,
        backend_note=BACKEND_NOTES.get(engine.name),
        device=service.device,
        policy=service.settings.policy,
        budget_ms=service.settings.budget_ms,
        image_size=bundle.image_size,
        resize=bundle.preprocess.resize,
        squash=bundle.preprocess.squash,
        answers=bundle.answers,
        width=bundle.width,
        labels=list(bundle.labels),
        tiers=[_tier(service, i) for i in range(len(bundle.tiers))],
    )


def _tier(service: Service, index: int) -> schemas.TierInfo:
    latency = service.latency
    now_s = asyncio.get_running_loop().time()
    return describe_tier(
        service.bundle,
        index,
        service.engines[0],
        None if latency is None else latency.forecast(now_s),
        service.settings.max_batch,
        in_service=index not in service.disabled_tiers,
    )
