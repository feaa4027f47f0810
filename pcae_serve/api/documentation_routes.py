"""GET /docs and /openapi.json: the interactive documentation and the document that it shows."""

from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

from pcae_serve.api.auth import require_key
from pcae_serve.api.page_routes import page, prefix
from pcae_serve.web import pages

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json")
async def openapi_document(request: Request) -> JSONResponse:
    """Return the OpenAPI document, with the prefix of a proxy as its server."""
    document: dict[str, Any] = request.app.openapi()
    if path := prefix(request):
        document = document | {"servers": [{"url": path}]}
    return JSONResponse(document)


@router.get("/docs")
async def swagger_ui(request: Request) -> HTMLResponse:
    """Return a page that shows the document and sends requests."""
    return page(pages.documentation(prefix(request)), pages.DOCUMENTATION_POLICY)


def add_documentation(app: FastAPI, access: Literal["open", "keys", "off"]) -> None:
    """Add the routes to an application without those of FastAPI itself.

    access: keys: they need an API key, if the other routes do. off: there are none.
    """
    if access != "off":
        app.include_router(router, dependencies=[Depends(require_key)] if access == "keys" else [])
