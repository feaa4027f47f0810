"""GET / and /assets: the playground, and the files that pages load."""

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from pcae_serve.api.state import service_of
from pcae_serve.bundle.reader import demo_path
from pcae_serve.web import pages

router = APIRouter(include_in_schema=False)


@router.get("/")
async def playground(request: Request) -> HTMLResponse:
    """Return the page on which people try the server; its requests need a key, if others do."""
    samples = service_of(request).bundle.root == demo_path()
    return page(pages.playground(prefix(request), samples), pages.PLAYGROUND_POLICY)


def add_pages(app: FastAPI, with_playground: bool, with_documentation: bool) -> None:
    """Add the playground, and the files that it and the documentation load."""
    if with_playground:
        app.include_router(router)
    if with_playground or with_documentation:
        app.mount("/assets", StaticFiles(directory=str(pages.FOLDER)))


def page(html: str, policy: str) -> HTMLResponse:
    """Return a page that may load only what the Content-Security-Policy `policy` allows."""
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",  # another version of the server has another page
    }
    return HTMLResponse(html, headers=headers)


def prefix(request: Request) -> str:
    """Return the prefix under which a proxy serves this server; empty without one."""
    root_path: str = request.scope.get("root_path", "")
    return root_path.rstrip("/")
