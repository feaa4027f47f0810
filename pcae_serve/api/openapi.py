"""Correct what FastAPI writes into the OpenAPI document: response headers, answers never given."""

from typing import Any

from pcae_serve.api import server_timing

REQUEST_ID = {
    "X-Request-ID": {
        "description": "the request's X-Request-ID if it is valid, else a new one; also in the"
        " server's log",
        "required": True,
        "schema": {"type": "string"},
    }
}
RETRY_AFTER = {
    "Retry-After": {
        "description": "whole seconds until a retry is useful, if known",
        "schema": {"type": "integer", "minimum": 1},
    }
}
WWW_AUTHENTICATE = {
    "WWW-Authenticate": {"description": "Bearer", "required": True, "schema": {"type": "string"}}
}
SERVER_TIMING = {
    server_timing.HEADER: {
        "description": "milliseconds of decode, queue, compute and total; for several images, those"
        " of the slowest; absent if no image was answered",
        "schema": {"type": "string"},
    }
}
#: Headers of errors by status.
ERROR_HEADERS: dict[str, dict[str, Any]] = {
    "401": WWW_AUTHENTICATE,
    "409": RETRY_AFTER,
    "429": RETRY_AFTER,
    "503": RETRY_AFTER,
}


#: FastAPI's own answer for a parameter that it cannot read; here, every refusal is a problem.
VALIDATION_ERRORS = ("HTTPValidationError", "ValidationError")


def drop_validation_errors(document: dict[str, Any]) -> None:
    """Remove the 422 that FastAPI adds to every route with a parameter in its path."""
    for path in document["paths"].values():
        for operation in path.values():
            refused = operation["responses"].get("422", {}).get("content", {})
            schema = refused.get("application/json", {}).get("schema", {})
            if schema.get("$ref", "").endswith(f"/{VALIDATION_ERRORS[0]}"):
                del operation["responses"]["422"]
    for name in VALIDATION_ERRORS:
        document["components"]["schemas"].pop(name, None)


def add_headers(document: dict[str, Any]) -> None:
    """Add to every response of the document the headers that it may have."""
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                headers = REQUEST_ID | ERROR_HEADERS.get(status, {})
                if status == "200" and "requestBody" in operation:  # answers images
                    headers |= SERVER_TIMING
                response["headers"] = headers | response.get("headers", {})
