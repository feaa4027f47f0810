"""A bundle's tiers as the documents of schemas, for the REST API and `pcae_serve.load`."""

from pcae_serve import schemas
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import GPU_BACKENDS, Engine
from pcae_serve.scheduling.latency import Forecast

#: Batch sizes whose latencies are reported.
LATENCY_BATCHES = (1, 8)


def describe_tier(
    bundle: Bundle,
    index: int,
    engine: Engine,
    forecast: Forecast | None,
    max_batch: int,
    *,
    in_service: bool = True,
) -> schemas.TierInfo:
    """Return the quality and latency of a tier. forecast: None if latencies are not measured."""
    tier = bundle.tiers[index]
    model = bundle.manifest.models[tier.model]
    half = model.half if engine.name in GPU_BACKENDS else None
    return schemas.TierInfo(
        name=tier.name,
        model=tier.model,
        reduction=model.reduction,
        precision=half or tier.precision,
        keep_ratio=tier.keep_ratio,
        tokens=list(tier.token_counts),
        patches=model.patches,
        macs=tier.macs,
        accuracy=tier.accuracy,
        agreement=tier.agreement,
        fidelity=tier.fidelity,
        dominated=tier.dominated,
        in_service=in_service,
        latency_ms=None
        if forecast is None
        else {n: round(forecast.p50(index, n) * 1e3, 2) for n in LATENCY_BATCHES if n <= max_batch},
    )
