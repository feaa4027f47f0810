"""A route that calls its endpoint without FastAPI's dependency solver.

FastAPI resolves the four dependencies of the key check and the endpoint's two arguments again for
each request, which is a tenth of the CPU time of an image request without decoding and compute. The
OpenAPI document still describes the route by its signature and dependencies. A trace has the span
of the request, and none for the dependencies.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from pcae_serve.api.auth import read_key, require_key


class DirectRoute(APIRoute):
    """A route that needs a key, and whose endpoint takes (request, response) and returns a model.

    The endpoint sets headers in `response`, as in other routes of FastAPI.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request, Response], Awaitable[BaseModel]] = self.endpoint

        async def handle(request: Request) -> Response:
            await require_key(request, read_key(request))
            noted = Response()
            document = await endpoint(request, noted)
            del noted.headers["content-length"]
            text = document.model_dump_json(by_alias=True)
            return Response(text, headers=dict(noted.headers), media_type="application/json")

        return handle
