"""A bundle's tiers as the documents of schemas, for the REST API and `pcae_serve.load`."""

from collections.abc import Collection

from pcae_serve import schemas
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import BACKEND_NOTES, GPU_BACKENDS, DenseEngine, Engine
from pcae_serve.scheduling.latency import Forecast

#: Batch sizes whose latencies are reported.
LATENCY_BATCHES = (1, 8)


def describe_bundle(
    bundle: Bundle,
    engine: Engine,
    forecast: Forecast | None,
    max_batch: int,
    *,
    device: str,
    policy: str,
    budget_ms: float,
    max_looks: int,
    disabled: Collection[int] = (),
) -> schemas.Tiers:
    """Return a bundle, what runs it and its tiers, the cheapest first.

    forecast: None if latencies are not measured. disabled: indices of the tiers out of service.
    """
    return schemas.Tiers(
        bundle=bundle.manifest.name,
        digest=bundle.digest,
        backend=engine.name,
        backend_version=engine.version,
        backend_note=BACKEND_NOTES.get(engine.name),
        device=device,
        policy=policy,
        budget_ms=budget_ms,
        image_size=bundle.image_size,
        resize=bundle.preprocess.resize,
        squash=bundle.preprocess.squash,
        answers=bundle.answers,
        width=bundle.width,
        patch_grid=list(bundle.patch_grid)
        if bundle.patch_grid is not None and isinstance(engine, DenseEngine)
        else None,
        max_looks=1 if bundle.manifest.calibration is None else max_looks,
        labels=list(bundle.labels),
        tiers=[
            describe_tier(bundle, i, engine, forecast, max_batch, in_service=i not in disabled)
            for i in range(len(bundle.tiers))
        ],
    )


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
