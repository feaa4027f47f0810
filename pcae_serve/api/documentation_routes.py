"""GET /docs and /openapi.json: the interactive documentation and the document that it shows."""

from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse

from pcae_serve.api.auth import require_key

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json")
async def openapi_document(request: Request) -> JSONResponse:
    """Return the OpenAPI document, with the prefix of a proxy as its server."""
    document: dict[str, Any] = request.app.openapi()
    if prefix := _prefix(request):
        document = document | {"servers": [{"url": prefix}]}
    return JSONResponse(document)


@router.get("/docs")
async def swagger_ui(request: Request) -> HTMLResponse:
    """Return a page that shows the document and sends requests."""
    url = f"{_prefix(request)}/openapi.json"
    return get_swagger_ui_html(openapi_url=url, title=f"{request.app.title} - Swagger UI")


def add_documentation(app: FastAPI, access: Literal["open", "keys", "off"]) -> None:
    """Add the routes to an application without those of FastAPI itself.

    access: keys: they need an API key, if the other routes do. off: there are none.
    """
    if access != "off":
        app.include_router(router, dependencies=[Depends(require_key)] if access == "keys" else [])


def _prefix(request: Request) -> str:
    root_path: str = request.scope.get("root_path", "")
    return root_path.rstrip("/")
