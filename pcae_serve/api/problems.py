"""Convert exceptions to HTTP answers: RFC 9457 problem documents."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pcae_serve import schemas
from pcae_serve.errors import InternalError, InvalidParameter, RequestError, shown

MEDIA_TYPE = "application/problem+json"
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
    500: "inference failed on this batch",
    503: "overloaded, starting, shutting down, or every allowed tier has failed; see Retry-After",
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
    """Return the problem document of an error, for use inside another answer."""
    return schemas.Problem(
        type=error.type,
        title=error.title,
        status=error.status,
        detail=error.detail,
        **error.members,
    )


def refusal(error: RequestError) -> Response:
    """Return the HTTP answer for an error."""
    response = _problem(error.type, error.status, error.title, error.detail, **error.members)
    response.headers.update(error.headers)
    return response


def add_handlers(app: FastAPI) -> None:
    """Answer every exception that a route raises with a problem document."""
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(Exception, _unexpected)


def _problem(type_: str, status: int, title: str, detail: str, **members: Any) -> JSONResponse:
    content = {"type": type_, "title": title, "status": status, "detail": detail} | members
    return JSONResponse(content, status, media_type=MEDIA_TYPE)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return refusal(error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name, message = str(first["loc"][-1]), str(first["msg"])
    value = shown(first.get("input"))
    return refusal(InvalidParameter(f"{name} {value}: {message[:1].lower()}{message[1:]}"))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{error.detail[:1].lower()}{error.detail[1:]}; see /docs"
    response = _problem("about:blank", error.status_code, error.detail, detail)
    response.headers.update(error.headers or {})
    return response


async def _disconnected(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _unexpected(_: Request, __: Exception) -> Response:
    return refusal(InternalError("an unexpected error occurred; see the server's log"))
