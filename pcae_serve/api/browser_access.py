"""Checks of requests that a browser sends for web pages of other sites.

A server on loopback without API keys trusts all programs on its machine, the browser included,
and that runs pages of any site. Two checks refuse their requests:

    Host                      must be loopback or allowed: a page sends its own name, also if that
                              was rebound to 127.0.0.1
    Origin, Sec-Fetch-Site    must not state another site, for a POST

Other clients send neither Origin nor Sec-Fetch-Site. `allowed_origins` admits pages, and lets them
read the answers (CORS).
"""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from pcae_serve.api import array_answers
from pcae_serve.api.health_routes import is_probe
from pcae_serve.api.problems import refusal
from pcae_serve.errors import CrossSiteRequest, RequestError, UnknownHost, shown
from pcae_serve.settings import Settings, is_loopback

#: Matches every host or origin.
ANY = "*"
#: Methods that change nothing and compute nothing.
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
#: Sec-Fetch-Site of requests by a page of this server, or by the user of the browser.
OWN_SITES = frozenset({"same-origin", "none"})
#: Headers of answers that pages may read; the names of all others are hidden from them.
EXPOSED_HEADERS = (
    "Retry-After",
    "Server-Timing",
    "X-Request-ID",
    *array_answers.HEADERS,
)

#: The usual names of this machine; `is_loopback` knows all, but takes longer.
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


def browser_access(app: ASGIApp, settings: Settings, *, proxied: bool = False) -> ASGIApp:
    """Return `app` with the checks that the settings ask for.

    proxied: another process listens for this one, and its addresses are not known here.
    """
    origins = frozenset(settings.allowed_origin_list)
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=sorted(origins),
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=(ANY,),
            allow_private_network=True,
            expose_headers=EXPOSED_HEADERS,
        )
    trusts_machine = not proxied and settings.api_keys_file is None and is_loopback(settings.host)
    if trusts_machine:
        app = RefuseOtherSites(app, origins)
    if trusts_machine or settings.allowed_hosts:
        app = RefuseOtherHosts(app, frozenset((settings.host, *settings.allowed_host_list)))
    return app


class RefuseOtherHosts:
    """ASGI middleware: refuse requests for a host that is neither loopback nor allowed.

    Probes are answered whatever they name: an orchestrator uses the container's address.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts | _LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._check(scope) if scope["type"] == "http" else None
        await (self._app if error is None else refusal(error, scope))(scope, receive, send)

    def _check(self, scope: Scope) -> RequestError | None:
        header = Headers(scope=scope).get("host", "")
        name, _ = split_host(header)
        if not name or name in self._hosts or ANY in self._hosts or is_probe(scope):
            return None
        if is_loopback(name) or name.endswith(".localhost"):  # browsers resolve it to loopback
            return None
        return UnknownHost(
            f"{shown(header)} is not a name of this server; use localhost, or start the server with"
            " --allowed-hosts"
        )


class RefuseOtherSites:
    """ASGI middleware: refuse requests that a page of another site lets a browser send.

    Reading is left to the browser, which shows the answer only to `origins` (CORS).
    """

    def __init__(self, app: ASGIApp, origins: frozenset[str]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._check(scope) if scope["type"] == "http" else None
        await (self._app if error is None else refusal(error, scope))(scope, receive, send)

    def _check(self, scope: Scope) -> RequestError | None:
        if scope["method"] in SAFE_METHODS or ANY in self._origins:
            return None
        headers = Headers(scope=scope)
        site, origins = headers.get("sec-fetch-site"), headers.getlist("origin")
        if site in OWN_SITES or (site is None and not origins):
            return None
        origin = origins[0].lower() if len(origins) == 1 else ""
        if origin in self._origins or (
            site is None and _is_same_origin(origin, headers.get("host", ""))
        ):
            return None
        page = f"of {shown(origins[0])}" if origins else "of other sites"
        return CrossSiteRequest(
            f"web pages {page} may not use this server; start it with --allowed-origins"
        )


def split_host(header: str) -> tuple[str, int | None]:
    """Return the name or address in a Host header, in lower case and without brackets, and port."""
    name, separator, port = header.rpartition(":")
    if not separator or not port.isdecimal():
        name, port = header.removesuffix(":"), ""
    name = name.lower().removesuffix(".")
    return name.removeprefix("[").removesuffix("]"), int(port[:5]) if port else None


def _is_same_origin(origin: str, host: str) -> bool:
    """Return whether a page of `origin` came from the host that its request is sent to."""
    scheme, _, address = origin.partition("://")
    default = _DEFAULT_PORTS.get(scheme)
    (page, page_port), (name, port) = split_host(address), split_host(host)
    return default is not None and page == name and (page_port or default) == (port or default)
