"""Convert exceptions to HTTP answers: RFC 9457 problem documents.

Routes of the Open Inference Protocol answer in its own form, {"error": "…"}.
"""

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from pcae_serve import schemas
from pcae_serve.api.request_line import route_path
from pcae_serve.errors import (
    InternalError,
    InvalidParameter,
    MethodNotAllowed,
    RequestError,
    UnknownRoute,
    shown,
)
from pcae_serve.runtime import refusals

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
#: What the paths of the Open Inference Protocol begin with.
PROTOCOL = "/v2"
#: Status in the access log of a request whose client disconnected; it is never sent.
CLIENT_CLOSED_REQUEST = 499

KEY_PROBLEMS = {401: "the request has no API key", 403: "the API key is unknown"}
IMAGE_PROBLEMS = KEY_PROBLEMS | {
    400: "the image is empty, truncated or damaged",
    404: "the bundle has no head (use /embed), or it has one (use /classify)",
    408: "the body did not arrive within the upload time",
    413: "too many bytes, pixels or images",
    415: "not an image type that this server reads",
    422: "a parameter is invalid, or the budget is below what the fastest allowed tier needs",
    429: "the API key sends more images per second than it may; see Retry-After",
    500: "inference failed on this batch",
    503: "overloaded, out of memory, starting, shutting down, or every allowed tier has failed; see"
    " Retry-After",
    504: "the budget passed before the image was answered",
}


def documented(descriptions: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of an OpenAPI operation for these statuses and their meanings."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": description, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status, description in descriptions.items()
    }


def document(error: RequestError) -> schemas.Problem:
    """Return the problem document of an error, for use inside another answer. Ends the error."""
    _forget_frames(error)
    return schemas.Problem(
        type=error.type,
        title=error.title,
        status=error.status,
        detail=error.detail,
        **error.members,
    )


def refusal(error: RequestError, scope: Scope) -> Response:
    """Return the HTTP answer for an error, in the form that the request's path has.

    Ends the error: its traceback is lost.
    """
    _forget_frames(error)
    path = route_path(scope)
    if path == PROTOCOL or path.startswith(f"{PROTOCOL}/"):
        return JSONResponse({"error": error.detail}, error.status, error.headers)
    content = {
        "type": error.type,
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }
    return JSONResponse(content | error.members, error.status, error.headers, MEDIA_TYPE)


def add_handlers(app: FastAPI) -> None:
    """Answer every exception that a route or the framework raises."""
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(MemoryError, _out_of_memory)
    app.add_exception_handler(Exception, _unexpected)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return refusal(error, request.scope)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name, message = str(first["loc"][-1]), str(first["msg"])
    value = shown(first.get("input"))
    invalid = InvalidParameter(f"{name} {value}: {message[:1].lower()}{message[1:]}")
    return refusal(invalid, request.scope)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer an error of the framework's router, which raises 404 and 405."""
    assert isinstance(error, HTTPException)
    path, method = shown(request.scope["path"]), shown(request.method)
    ours: RequestError
    match error.status_code:
        case 404:
            ours = UnknownRoute(f"there is no route {path}; see /docs, if it is enabled")
        case 405:
            ours = MethodNotAllowed(f"{path} does not accept {method}; see the header Allow")
        case _:
            raise error
    response = refusal(ours, request.scope)
    response.headers.update(error.headers or {})
    return response


def _forget_frames(error: BaseException) -> None:
    """Release the frames of an error and of those before it, which hold a request's body.

    Errors of tasks and futures are parts of reference cycles: without this, the memory of a refused
    request would be free only after the next full garbage collection.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None


async def _disconnected(_: Request, error: Exception) -> Response:
    _forget_frames(error)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _out_of_memory(request: Request, _: Exception) -> Response:
    """Answer a lack of memory outside the requests that the service counts."""
    log.error("too little memory to answer %s", shown(request.scope["path"]))
    return refusal(refusals.out_of_memory().error, request.scope)


async def _unexpected(request: Request, _: Exception) -> Response:
    error = InternalError("an unexpected error occurred; see the server's log")
    return refusal(error, request.scope)
