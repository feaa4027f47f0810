"""The HTTP application: its routes, keys and error handlers around a service."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI

from pcae_serve.api import (
    admin_routes,
    classify_routes,
    documentation_routes,
    embed_routes,
    health_routes,
    inference_routes,
    metrics_routes,
    openapi,
    page_routes,
    problems,
    tier_routes,
)
from pcae_serve.api.auth import Keys, require_key
from pcae_serve.api.request_line import NormaliseRequestLine
from pcae_serve.observability import tracing
from pcae_serve.runtime.service import Service
from pcae_serve.version import __version__


class _Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            openapi.drop_validation_errors(super().openapi())
            openapi.add_headers(super().openapi())
        return super().openapi()


def create_app(
    service: Service,
    on_failure: Callable[[BaseException], None],
    keys: Keys | None = None,
    admin_keys: Keys | None = None,
) -> FastAPI:
    """Return the application around a service; its lifespan starts and stops the service.

    on_failure: called if the service cannot start; by then the application already answers.
    keys: accepted on every route except /admin; health checks need none. Empty or None: these
    routes need no key. admin_keys: accepted on all routes; if there are none, /admin is disabled.
    """
    app = _Api(
        title="pcae-serve",
        version=__version__,
        description="Serve vision transformers under a latency budget: each request states how long"
        " it can wait, and the server picks the most accurate tier that meets it.",
        lifespan=_lifespan(service, on_failure),
        telemetry=tracing.config(),
        openapi_url=None,  # and with it /docs and /redoc: documentation_routes has them
        redirect_slashes=False,
    )
    app.add_middleware(NormaliseRequestLine)
    app.state.service = service
    app.state.keys, app.state.admin_keys = keys or Keys(), admin_keys or Keys()
    if app.state.keys:
        service.set_callers([*app.state.keys.callers, *app.state.admin_keys.callers])
    problems.add_handlers(app)
    needs_key = [Depends(require_key)]
    app.include_router(classify_routes.router, dependencies=needs_key)
    app.include_router(embed_routes.router, dependencies=needs_key)
    app.include_router(tier_routes.router, dependencies=needs_key)
    app.include_router(health_routes.router)
    app.include_router(admin_routes.router)
    app.include_router(metrics_routes.router, dependencies=needs_key)
    app.include_router(inference_routes.router)
    documentation_routes.add_documentation(app, service.settings.docs)
    page_routes.add_pages(app, service.settings.playground, service.settings.docs != "off")
    return app


def _lifespan(service: Service, on_failure: Callable[[BaseException], None]) -> Any:
    """Start the service in the background, so that health checks are answered meanwhile."""

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

    return lifespan
