"""Headers of a trusted proxy: the client's address, the scheme, and the prefix of the path.

A proxy may serve this server under a prefix, which it names in X-Forwarded-Prefix unless the server
has a root path configured; /docs and /openapi.json refer to the paths that clients see.
"""

import re

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

_PREFIX_HEADER = b"x-forwarded-prefix"
#: Segments of a prefix; a browser must not read one as another host.
_PREFIX = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+")


class ForwardedHeaders:
    """ASGI middleware: apply X-Forwarded-For, -Proto and -Prefix of trusted proxies."""

    def __init__(self, app: ASGIApp, trusted_proxies: str, root_path: str = "") -> None:
        """trusted_proxies: addresses and networks, comma-separated; * for all.

        root_path: the prefix, whatever a proxy sends; empty: the one that it sends.
        """
        self._app = ProxyHeadersMiddleware(app, trusted_proxies)  # type: ignore[arg-type]
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._root_path or self._forwarded_prefix(scope)
        await self._app(scope, receive, send)  # type: ignore[arg-type]

    def _forwarded_prefix(self, scope: Scope) -> str:
        """Return the prefix that a trusted proxy sent, or ""."""
        values = [value for name, value in scope["headers"] if name == _PREFIX_HEADER]
        if len(values) != 1 or not self._trusts(scope):
            return ""
        prefix = values[0].decode("latin-1").rstrip("/")
        return prefix if _PREFIX.fullmatch(prefix) else ""

    def _trusts(self, scope: Scope) -> bool:
        client = scope.get("client")
        return client is not None and client[0] in self._app.trusted_hosts
