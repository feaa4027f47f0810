"""The pages of the server as HTML, and the Content-Security-Policy of each.

A page loads files of this server alone. `PREFIX` in it stands for the prefix of a proxy.
"""

import html
from functools import cache
from importlib import resources

#: Folder of the files that pages load.
FOLDER = resources.files(__name__.rpartition(".")[0])

#: Of the playground: its own scripts, styles, pictures and requests.
PLAYGROUND_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

#: Of the documentation: Swagger UI sets styles of its own in the page.
DOCUMENTATION_POLICY = PLAYGROUND_POLICY.replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)

#: Images of the demo model's kind, in the folder `samples`.
SAMPLES = ("ankle-boot", "bag", "dress", "sneaker", "trouser")


def playground(prefix: str, samples: bool) -> str:
    """Return the playground. samples: offer the images of the demo."""
    names = ",".join(SAMPLES if samples else ())
    return _page("playground.html", prefix).replace("SAMPLES", names)


def documentation(prefix: str) -> str:
    """Return the page that shows the OpenAPI document."""
    return _page("documentation.html", prefix)


def _page(name: str, prefix: str) -> str:
    return _read(name).replace("PREFIX", html.escape(prefix))


@cache
def _read(name: str) -> str:
    """Return the text of a file; read once, because the event loop waits for it."""
    return FOLDER.joinpath(name).read_text(encoding="utf-8")
