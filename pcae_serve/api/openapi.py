"""What FastAPI's OpenAPI document leaves out: the headers of answers.

It knows the document, and no route by name.
"""

from typing import Any

from pcae_serve.api import server_timing

REQUEST_ID = {
    "X-Request-ID": {
        "description": "the request's own, where it sent one that can be used, else a new one: the"
        " log names it",
        "required": True,
        "schema": {"type": "string"},
    }
}
RETRY_AFTER = {
    "Retry-After": {
        "description": "whole seconds until it is worth asking again, where that is known",
        "schema": {"type": "integer", "minimum": 1},
    }
}
WWW_AUTHENTICATE = {
    "WWW-Authenticate": {"description": "Bearer", "required": True, "schema": {"type": "string"}}
}
SERVER_TIMING = {
    server_timing.HEADER: {
        "description": "milliseconds of decode, queue, compute and total; of several images, those"
        " of the one that took longest; left out where none was answered",
        "schema": {"type": "string"},
    }
}
#: What is said by errors of these statuses.
OF_STATUS: dict[str, dict[str, Any]] = {
    "401": WWW_AUTHENTICATE,
    "409": RETRY_AFTER,
    "503": RETRY_AFTER,
}


def add_headers(document: dict[str, Any]) -> None:
    """Add to every answer what headers of ours it may have."""
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                told = REQUEST_ID | OF_STATUS.get(status, {})
                if status == "200" and "requestBody" in operation:  # it answers images
                    told |= SERVER_TIMING
                response["headers"] = told | response.get("headers", {})
