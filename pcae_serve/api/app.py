"""The REST API: routes, and errors as RFC 9457 problems. The service does the work."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from pcae_serve import schemas
from pcae_serve.api import inference_routes, openapi, proxy_delay, server_timing
from pcae_serve.api.auth import Keys
from pcae_serve.api.body import limited, unless_left
from pcae_serve.engines.base import GPU_BACKENDS, NOTES
from pcae_serve.errors import (
    Forbidden,
    InternalError,
    InvalidParameter,
    MissingKey,
    RequestError,
    TooLarge,
    UnreadableImage,
    UnsupportedType,
    one_line,
    shown,
)
from pcae_serve.observability import tracing
from pcae_serve.runtime.servable import InferenceRequest, InferenceResult
from pcae_serve.runtime.service import Service
from pcae_serve.version import __version__

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
_IMAGES_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            }
        },
    }
}


def _told_of(descriptions: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """Errors as OpenAPI documents them: all are problem documents."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": description, "content": {PROBLEM: {"schema": schema}}}
        for status, description in descriptions.items()
    }


_KEY_PROBLEMS = {401: "an API key is needed", 403: "the API key is not known"}
_PROBLEMS = _told_of(
    _KEY_PROBLEMS
    | {
        400: "the image is empty, truncated or damaged",
        404: "the bundle answers in the other way: classes with a head, features without",
        408: "the body did not arrive in time",
        413: "too many bytes or pixels",
        415: "not an image type this server reads",
        422: "a parameter is wrong, or the budget is below what the fastest allowed tier needs",
        500: "the model failed on this batch",
        503: "the load leaves no allowed tier in time, or nothing works; see Retry-After",
        504: "the budget passed in the queue",
    }
)


async def given_key(
    header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> str | None:
    """The API key that a request brings, if any."""
    return header or (None if bearer is None else bearer.credentials)


Given = Annotated[str | None, Depends(given_key)]


class _Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            openapi.add_headers(super().openapi())
        return super().openapi()


def create_app(
    service: Service,
    on_failure: Callable[[BaseException], None],
    keys: Keys | None = None,
    admin_keys: Keys | None = None,
) -> FastAPI:
    """The application around a service; its lifespan starts and stops the service.

    on_failure is told where the service cannot start, while the application already answers.
    keys: one of which every caller must bring, where there are any; admin_keys: for /admin, which
    nobody may use without.
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

    app = _Api(
        title="pcae-serve",
        version=__version__,
        description="One vision transformer, many token budgets: say how long you can wait.",
        lifespan=lifespan,
        telemetry=tracing.config(),
        redirect_slashes=False,
    )
    known, admin = keys or Keys(), admin_keys or Keys()
    limit = int(service.settings.max_body_mb * 1e6)

    # coroutines, all three: FastAPI runs a plain function in a thread, for 0.1 ms each
    async def caller(given: Given) -> None:
        if not known:
            return
        if given is None:
            raise MissingKey("send an API key as the header X-API-Key, or as a bearer token")
        if given not in known and given not in admin:
            raise Forbidden("this API key is not known")

    async def administrator(given: Given) -> None:
        if not admin:
            raise Forbidden("nobody may: start the server with --admin-keys-file")
        if given is None:
            raise MissingKey("send an admin key as the header X-API-Key, or as a bearer token")
        if given not in admin:
            raise Forbidden("this is no admin key")

    needs_key = [Depends(caller)]
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _nobody)
    app.add_exception_handler(Exception, _unexpected)

    async def asked(
        request: Request,
        tier: Annotated[str, Query(description="a tier's name, or auto")] = "auto",
        budget_ms: Annotated[Budget, Query(description="time you can wait")] = None,
        min_tier: Annotated[str | None, Query(description="refuse rather than go below")] = None,
        x_latency_budget_ms: Annotated[
            Budget, Header(description="as budget_ms, which wins")
        ] = None,
    ) -> InferenceRequest:
        arrival_s = proxy_delay.arrival_s(request.scope.get("state", {}))
        budget = budget_ms or x_latency_budget_ms or service.settings.budget_ms
        return InferenceRequest(arrival_s, budget, tier, min_tier)

    async def answered(
        request: Request,
        response: Response,
        ask: InferenceRequest,
        answers: Literal["logits", "features"],
    ) -> InferenceResult:
        ask = replace(ask, answers=answers)
        read = partial(_image, request, limit)
        answer = await unless_left(request, partial(service.answer, ask), read)
        server_timing.record_timing(request, response, [answer])
        return answer

    @app.post("/classify", openapi_extra=_IMAGE_BODY, responses=_PROBLEMS, dependencies=needs_key)
    async def classify(
        request: Request,
        response: Response,
        ask: Annotated[InferenceRequest, Depends(asked)],
        top_k: Annotated[int, Query(ge=1, description="classes to return")] = 5,
        explain: Explain = False,
    ) -> schemas.Classification:
        """Classify one image: the body is the image file, or the multipart field `image`."""
        answer = await answered(request, response, ask, "logits")
        return schemas.Classification(
            predictions=_predictions(answer, top_k), **_told(answer, ask, explain)
        )

    @app.post(
        "/classify/batch",
        openapi_extra=_IMAGES_BODY,
        responses=_PROBLEMS,
        dependencies=needs_key,
    )
    async def classify_batch(
        request: Request,
        response: Response,
        ask: Annotated[InferenceRequest, Depends(asked)],
        top_k: Annotated[int, Query(ge=1, description="classes to return")] = 5,
        explain: Explain = False,
    ) -> schemas.Batch:
        """Classify several images, the multipart fields `image`: each is routed by itself.

        The answer is 200 where the body could be read; whether an image was answered or refused,
        and why, stands with it, in the order of the fields.
        """
        logits = replace(ask, answers="logits")
        service.bundle.allowed(ask.tier, ask.min_tier)  # before anything is uploaded

        answers: list[InferenceResult] = []

        async def one(image: bytes) -> schemas.BatchItem:
            async def read() -> bytes:
                return image

            try:
                answer = await service.answer(logits, read, admitted=True)
            except RequestError as error:
                return schemas.BatchItem(status=error.status, problem=_document(error))
            answers.append(answer)
            answered = schemas.Classification(
                predictions=_predictions(answer, top_k), **_told(answer, ask, explain)
            )
            return schemas.BatchItem(status=200, answer=answered)

        async def all_(read: Callable[[], Awaitable[list[bytes]]]) -> list[schemas.BatchItem]:
            with service.taking():
                return await asyncio.gather(*map(one, await service.receive(read)))

        most = service.settings.max_images
        results = await unless_left(request, all_, partial(_images, request, limit, most))
        server_timing.record_timing(request, response, answers)
        request.state.images = server_timing.tally([result.status for result in results])
        return schemas.Batch(results=results)

    @app.post("/embed", openapi_extra=_IMAGE_BODY, responses=_PROBLEMS, dependencies=needs_key)
    async def embed(
        request: Request,
        response: Response,
        ask: Annotated[InferenceRequest, Depends(asked)],
        explain: Explain = False,
    ) -> schemas.Embedding:
        """Features of one image, from a bundle without a head; the body is as for /classify."""
        answer = await answered(request, response, ask, "features")
        return schemas.Embedding(features=answer.vector.tolist(), **_told(answer, ask, explain))

    @app.get("/tiers", responses=_told_of(_KEY_PROBLEMS), dependencies=needs_key)
    async def tiers() -> schemas.Tiers:
        """What this server offers: accuracy and latency of every tier."""
        return _tiers(service)

    @app.get("/livez", responses=_told_of({503: "only a new process can help"}))
    async def livez() -> schemas.Health:
        """The process answers, and no device is lost in a call that does not come back."""
        service.require_alive()
        return schemas.Health(status="alive")

    @app.get("/readyz", responses=_told_of({503: "starting, stopping, or nothing works"}))
    async def readyz() -> schemas.Health:
        """Requests are taken: every tier has run, something works, and nobody is stopping."""
        service.require_ready()
        return schemas.Health(status="ready")

    @app.post(
        "/admin/reload",
        responses=_told_of(
            {
                401: "an admin key is needed",
                403: "this is no admin key, or the server has none",
                409: "a reload is going on",
                422: "the new bundle cannot be served; the old one serves on",
                503: "the server is starting or stopping",
            }
        ),
        dependencies=[Depends(administrator)],
    )
    async def reload() -> schemas.Reload:
        """Serve what the bundle's folder holds now; no request is dropped. SIGHUP does the same."""
        done = await service.reload()
        return schemas.Reload(
            bundle=done.bundle.manifest.name,
            digest=done.bundle.digest,
            tiers=[tier.name for tier in done.bundle.tiers],
            seconds=round(done.seconds, 3),
        )

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=_told_of(_KEY_PROBLEMS),
        dependencies=needs_key,
    )
    async def metrics() -> Response:
        """What this server counted since its start, for Prometheus."""
        content, media_type = service.metrics.exposition()
        return Response(content, media_type=media_type)

    app.include_router(inference_routes.router(service, caller))
    return app


async def _image(request: Request, limit: int) -> bytes:
    """The image file in the body, raw or as multipart field `image`, at most `limit` bytes."""
    if not _is_multipart(request):
        return b"".join([chunk async for chunk in limited(request, limit)])
    return (await _images(request, limit, 1))[0]


async def _images(request: Request, limit: int, most: int) -> list[bytes]:
    """The image files in the multipart fields `image`, in their order."""
    if not _is_multipart(request):
        raise UnsupportedType("send multipart/form-data, each image as a file field 'image'")
    parser = MultiPartParser(request.headers, limited(request, limit), max_files=most)
    parser.spool_max_size = limit + 1  # the body is bounded: no disk is needed for it
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        if "Too many files" in str(error):
            raise TooLarge(f"the body has more than {most} files: send fewer") from None
        raise UnreadableImage(f"the multipart body cannot be read: {one_line(error)}") from None
    try:
        fields = [field for field in form.getlist("image") if isinstance(field, UploadFile)]
        if not fields:
            raise UnreadableImage("the multipart body has no file field 'image'")
        return [await field.read() for field in fields]
    finally:
        await form.close()


def _is_multipart(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


def _predictions(answer: InferenceResult, top_k: int) -> list[schemas.Prediction]:
    exponents = np.exp(answer.vector - answer.vector.max())
    probabilities = exponents / exponents.sum()
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return [
        schemas.Prediction(
            label=answer.bundle.labels[index],
            index=int(index),
            probability=round(float(probabilities[index]), 6),
        )
        for index in best
    ]


def _told(answer: InferenceResult, ask: InferenceRequest, explain: bool) -> dict[str, Any]:
    """The fields of schemas.Answered."""
    return {
        "tier": answer.tier.name,
        "keep_ratio": answer.tier.keep_ratio,
        "tokens": list(answer.tier.token_counts),
        "reason": answer.reason,
        "budget_ms": ask.budget_ms,
        "met_budget": answer.met_budget,
        "timings_ms": server_timing.timings(answer),
        "kept": [np.sort(stage).tolist() for stage in answer.kept] if explain else None,
    }


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
        in_service=index not in service.out_of_service,
        latency_ms=None
        if forecast is None
        else {n: round(forecast.p50(index, n) * 1e3, 2) for n in LATENCY_BATCHES if n <= most},
    )


def _problem(
    status: int, title: str, detail: str, kind: str = "about:blank", **members: Any
) -> JSONResponse:
    document = {"type": kind, "title": title, "status": status, "detail": detail} | members
    return JSONResponse(document, status, media_type=PROBLEM)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return refusal(error)


def refusal(error: RequestError) -> Response:
    """The answer that an error is."""
    response = _problem(error.status, error.title, error.detail, error.type, **error.members)
    response.headers.update(error.headers)
    return response


def _document(error: RequestError) -> schemas.Problem:
    """The problem document of an error, inside another answer."""
    return schemas.Problem(
        type=error.type,
        title=error.title,
        status=error.status,
        detail=error.detail,
        **error.members,
    )


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    detail = f"{name} {shown(first.get('input'))}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return await _refused(request, InvalidParameter(detail))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _problem(error.status_code, error.detail, f"{error.detail}: see /docs")
    response.headers.update(error.headers or {})
    return response


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the client left: for the log alone


async def _unexpected(_: Request, __: Exception) -> Response:
    return refusal(InternalError("an unexpected error occurred: see the server's log"))
