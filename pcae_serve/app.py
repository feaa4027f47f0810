"""The REST API: routes, and errors as RFC 9457 problems. The service does the work."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from math import ceil
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from pcae_serve import __version__, oip, schemas
from pcae_serve.body import limited, unless_left
from pcae_serve.engines import GPU_BACKENDS, NOTES
from pcae_serve.errors import (
    Draining,
    InvalidParameter,
    NotOffered,
    RequestError,
    UnreadableImage,
    one_line,
)
from pcae_serve.service import Answer, Ask, Service

PROBLEM = "application/problem+json"
LATENCY_BATCHES = (1, 8)  # what /tiers quotes

Budget = Annotated[float | None, Query(gt=0, le=3_600_000, allow_inf_nan=False)]
Explain = Annotated[bool, Query(description="also return the kept patches")]

_IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "description": description}
    for status, description in {
        400: "the image is empty, truncated or damaged",
        404: "the bundle answers in the other way: classes with a head, features without",
        413: "too many bytes or pixels",
        415: "not an image type this server reads",
        422: "a parameter is wrong, or the budget is below what the fastest allowed tier needs",
        503: "the load leaves no allowed tier in time; see Retry-After",
        504: "the budget passed in the queue",
    }.items()
}


def create_app(service: Service, on_failure: Callable[[BaseException], None]) -> FastAPI:
    """The application around a service; its lifespan starts and stops the service.

    on_failure is told where the service cannot start, while the application already answers.
    """

    def started(start: asyncio.Task[None]) -> None:
        if not start.cancelled() and (error := start.exception()) is not None:
            on_failure(error)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        start = asyncio.create_task(service.start())
        start.add_done_callback(started)
        yield
        start.cancel()
        await service.stop()

    app = FastAPI(
        title="pcae-serve",
        version=__version__,
        description="One vision transformer, many token budgets: say how long you can wait.",
        lifespan=lifespan,
    )
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _nobody)
    app.add_exception_handler(Exception, _unexpected)

    async def asked(
        tier: Annotated[str, Query(description="a tier's name, or auto")] = "auto",
        budget_ms: Annotated[Budget, Query(description="time you can wait")] = None,
        min_tier: Annotated[str | None, Query(description="refuse rather than go below")] = None,
        x_latency_budget_ms: Annotated[
            Budget, Header(description="as budget_ms, which wins")
        ] = None,
    ) -> Ask:
        arrival_s = asyncio.get_running_loop().time()
        budget = budget_ms or x_latency_budget_ms or service.settings.budget_ms
        return Ask(arrival_s, budget, tier, min_tier)

    async def answered(
        request: Request, response: Response, ask: Ask, answers: Literal["logits", "features"]
    ) -> Answer:
        _require(service, answers)
        limit = int(service.settings.max_body_mb * 1e6)
        read = partial(_image, request, limit)
        answer = await unless_left(request, partial(service.answer, ask), read)
        response.headers["Server-Timing"] = ", ".join(
            f"{name};dur={ms}" for name, ms in _timings(answer).model_dump().items()
        )
        return answer

    @app.post("/classify", openapi_extra=_IMAGE_BODY, responses=_PROBLEMS)
    async def classify(
        request: Request,
        response: Response,
        ask: Annotated[Ask, Depends(asked)],
        top_k: Annotated[int, Query(ge=1, description="classes to return")] = 5,
        explain: Explain = False,
    ) -> schemas.Classification:
        """Classify one image: the body is the image file, or the multipart field `image`."""
        answer = await answered(request, response, ask, "logits")
        return schemas.Classification(
            predictions=_predictions(answer, service.bundle.labels, top_k),
            **_told(answer, ask, explain),
        )

    @app.post("/embed", openapi_extra=_IMAGE_BODY, responses=_PROBLEMS)
    async def embed(
        request: Request,
        response: Response,
        ask: Annotated[Ask, Depends(asked)],
        explain: Explain = False,
    ) -> schemas.Embedding:
        """Features of one image, from a bundle without a head; the body is as for /classify."""
        answer = await answered(request, response, ask, "features")
        return schemas.Embedding(features=answer.vector.tolist(), **_told(answer, ask, explain))

    @app.get("/tiers")
    async def tiers() -> schemas.Tiers:
        """What this server offers: accuracy and latency of every tier."""
        return _tiers(service)

    @app.get("/livez")
    async def livez() -> schemas.Health:
        """The process answers."""
        return schemas.Health(status="alive")

    @app.get("/readyz", responses={503: {"model": schemas.Problem}})
    async def readyz() -> schemas.Health:
        """Requests are taken: latencies are known and the server is not stopping."""
        if not service.ready:
            raise Draining("the server is measuring its latencies, or stopping", retry_after_s=1)
        return schemas.Health(status="ready")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What this server counted since its start, for Prometheus."""
        content, media_type = service.metrics.exposition()
        return Response(content, media_type=media_type)

    app.include_router(oip.router(service))
    return app


async def _image(request: Request, limit: int) -> bytes:
    """The image file in the body, raw or as multipart field `image`, at most `limit` bytes."""
    body = limited(request, limit)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return b"".join([chunk async for chunk in body])
    try:
        form = await MultiPartParser(request.headers, body).parse()
    except (MultiPartException, KeyError) as error:
        raise UnreadableImage(f"the multipart body cannot be read: {one_line(error)}") from None
    field = form.get("image")
    try:
        if not isinstance(field, UploadFile):
            raise UnreadableImage("the multipart body has no file field 'image'")
        return await field.read()
    finally:
        await form.close()


def _require(service: Service, answers: Literal["logits", "features"]) -> None:
    """Raise NotOffered where the bundle's models answer in the other way."""
    if service.bundle.answers == answers:
        return
    if answers == "logits":
        raise NotOffered("this bundle's models have no head, so no classes: POST to /embed instead")
    raise NotOffered("this bundle's models answer with classes: POST to /classify instead")


def _predictions(answer: Answer, labels: tuple[str, ...], top_k: int) -> list[schemas.Prediction]:
    exponents = np.exp(answer.vector - answer.vector.max())
    probabilities = exponents / exponents.sum()
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return [
        schemas.Prediction(
            label=labels[index],
            index=int(index),
            probability=round(float(probabilities[index]), 6),
        )
        for index in best
    ]


def _told(answer: Answer, ask: Ask, explain: bool) -> dict[str, Any]:
    """The fields of schemas.Answered."""
    return {
        "tier": answer.tier.name,
        "keep_ratio": answer.tier.keep_ratio,
        "tokens": list(answer.tier.token_counts),
        "reason": answer.reason,
        "budget_ms": ask.budget_ms,
        "met_budget": answer.total_s * 1e3 <= ask.budget_ms,
        "timings_ms": _timings(answer),
        "kept": [np.sort(stage).tolist() for stage in answer.kept] if explain else None,
    }


def _timings(answer: Answer) -> schemas.Timings:
    return schemas.Timings(
        decode=round(answer.decode_s * 1e3, 2),
        queue=round(answer.queue_s * 1e3, 2),
        compute=round(answer.compute_s * 1e3, 2),
        total=round(answer.total_s * 1e3, 2),
    )


def _tiers(service: Service) -> schemas.Tiers:
    bundle, engine = service.bundle, service.engines[0]
    return schemas.Tiers(
        bundle=bundle.manifest.name,
        digest=bundle.digest,
        backend=engine.name,
        backend_version=engine.version,
        backend_note=NOTES.get(engine.name),
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
    now_s, most = asyncio.get_running_loop().time(), service.settings.max_batch
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
        latency_ms=None
        if forecast is None
        else {n: round(forecast.typical(index, n) * 1e3, 2) for n in LATENCY_BATCHES if n <= most},
    )


def _problem(
    status: int, title: str, detail: str, kind: str = "about:blank", **members: Any
) -> JSONResponse:
    document = {"type": kind, "title": title, "status": status, "detail": detail} | members
    headers = {}
    if (retry_after_s := members.get("retry_after_s")) is not None:
        headers["Retry-After"] = str(max(1, ceil(retry_after_s)))  # whole seconds, as HTTP wants
    return JSONResponse(document, status, headers, media_type=PROBLEM)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    name = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()
    return _problem(
        error.status, error.title, error.detail, f"urn:pcae-serve:{name}", **error.members
    )


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    detail = f"{name} {first.get('input')!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return await _refused(request, InvalidParameter(detail))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _problem(error.status_code, error.detail, f"{error.detail}: see /docs")
    response.headers.update(error.headers or {})
    return response


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the client left: for the log alone


async def _unexpected(_: Request, __: Exception) -> Response:
    return _problem(500, "Internal error", "an unexpected error, see the server's log")
