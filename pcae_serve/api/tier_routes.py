"""GET /tiers: the bundle, the device and the tiers."""

import asyncio

from fastapi import APIRouter, Request

from pcae_serve import schemas
from pcae_serve.api import problems
from pcae_serve.api.state import service_of
from pcae_serve.engines.base import BACKEND_NOTES, GPU_BACKENDS
from pcae_serve.runtime.service import Service

#: Batch sizes whose latencies are reported.
LATENCY_BATCHES = (1, 8)

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
        answers=bundle.answers,
        width=bundle.width,
        labels=list(bundle.labels),
        tiers=[_tier(service, i) for i in range(len(bundle.tiers))],
    )


def _tier(service: Service, index: int) -> schemas.TierInfo:
    tier, latency = service.bundle.tiers[index], service.latency
    model = service.bundle.manifest.models[tier.model]
    half = model.half if service.engines[0].name in GPU_BACKENDS else None
    now_s, max_batch = asyncio.get_running_loop().time(), service.settings.max_batch
    forecast = None if latency is None else latency.forecast(now_s)
    return schemas.TierInfo(
        name=tier.name,
        model=tier.model,
        reduction=model.reduction,
        precision=half or tier.precision,
        keep_ratio=tier.keep_ratio,
        tokens=list(tier.token_counts),
        macs=tier.macs,
        accuracy=tier.accuracy,
        agreement=tier.agreement,
        fidelity=tier.fidelity,
        dominated=tier.dominated,
        in_service=index not in service.disabled_tiers,
        latency_ms=None
        if forecast is None
        else {n: round(forecast.p50(index, n) * 1e3, 2) for n in LATENCY_BATCHES if n <= max_batch},
    )
