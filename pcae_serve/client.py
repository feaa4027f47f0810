"""A client of the REST API: an image and a time budget in, an answer out; sync and async.

    image -> a request with what is left of the budget -> its answer, an error, or a wait
             ^-------------------------------------------------------------------'

`_Call` decides, with a clock and without I/O; `Client` and `AsyncClient` read, send and sleep for
it, and differ in nothing else. It knows HTTP and the API's documents, nothing of bundles, engines
or numpy.
"""

import asyncio
import contextlib
import io
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from math import isfinite
from pathlib import Path
from socket import gaierror
from ssl import SSLError
from typing import Any, Generic, Self, TypeVar
from urllib.parse import urlsplit

from PIL import Image, ImageOps
from pydantic import BaseModel, ValidationError

from pcae_serve.errors import PcaeError, one_line
from pcae_serve.schemas import Classification, Embedding, Health, Tiers
from pcae_serve.version import __version__, install_command

try:
    import anyio  # httpx needs it
    import httpx
except ImportError:
    raise ImportError(
        f"pcae_serve.client needs httpx: {install_command('client')}", name="httpx"
    ) from None

ImageLike = str | os.PathLike[str] | bytes | Image.Image
Clock = Callable[[], float]

URL = "http://127.0.0.1:8000"
KEY_HEADER = "X-API-Key"

#: Listened for after the budget has passed: the server's own word that it did is on its way then.
GRACE_S = 0.25
#: Waited for an answer where the caller has no budget, and for what is told of the server itself.
PATIENCE_S, TOLD_S = 60.0, 10.0
#: Less than this is not worth another request.
LEAST_S = 1e-3
#: Between two requests at least; doubled each time that nobody listens, up to the other.
WAIT_S, MAX_WAIT_S = 0.02, 0.5
#: Connections are kept this long. The server closes idle ones after 5 s (uvicorn's default), and a
#: request must not be on its way on one just then.
KEPT_S = 4.0
#: Modes that PNG holds as they are; the server makes RGB of any other, so that may be done here.
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}

_T = TypeVar("_T", bound=BaseModel)


class ClientError(PcaeError):
    """There is no answer; why, in one line."""


class NotReachable(ClientError):
    """Nobody listens there, the connection was lost, or it is no pcae-serve that answered."""


class BudgetExceeded(ClientError):
    """The budget passed without an answer."""


class Refused(ClientError):
    """The server said no: its problem document (RFC 9457). The message is its detail."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        detail = problem.get("detail") or _phrase(status)
        super().__init__(" ".join(str(detail).split()))
        self.status = status
        self.type = str(problem.get("type", "about:blank"))
        self.title = str(problem.get("title", _phrase(status)))
        self.detail = str(self)
        self.members = {
            name: value
            for name, value in problem.items()
            if name not in ("type", "title", "status", "detail")
        }

    @property
    def needed_ms(self) -> float | None:
        """What the fastest allowed tier takes, where the budget is below that."""
        return _number(self.members.get("needed_ms"))

    @property
    def retry_after_s(self) -> float | None:
        """When to ask again, where the server said so."""
        return _number(self.members.get("retry_after_s"))


@dataclass(frozen=True)
class _Wait:
    """What comes before the next request."""

    seconds: float


class _Until(dict[str, float]):
    """httpx's time-outs, each of them what is left when its turn comes.

    It counts them anew for connecting, sending and reading: together that could be three budgets.
    """

    def __init__(self, end_s: float, clock: Clock) -> None:
        self._end_s, self._clock = end_s, clock
        super().__init__(dict.fromkeys(("connect", "read", "write", "pool"), self._left_s()))

    def _left_s(self) -> float:
        return max(LEAST_S, self._end_s - self._clock())

    def get(self, _: str, __: Any = None) -> float:
        return self._left_s()


class _Call(Generic[_T]):
    """One call from its start to its end, as decisions."""

    def __init__(
        self,
        http: "httpx.Client | httpx.AsyncClient",
        clock: Clock,
        method: str,
        route: str,
        answer: type[_T],
        parameters: Mapping[str, Any] | None = None,
        budget_ms: float | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """The clock runs from here. answer: what a body is read as. patience_s: with no budget."""
        if budget_ms is not None and not (isfinite(budget_ms) and budget_ms > 0):
            raise ValueError(f"budget_ms must be a number above 0, not {budget_ms!r}")
        self._http, self._clock, self._method, self._route = http, clock, method, route
        self._answer, self._budget_ms = answer, budget_ms
        self._parameters = {k: v for k, v in (parameters or {}).items() if v is not None}
        self._patience_s = patience_s if budget_ms is None else budget_ms / 1e3
        self._end_s = clock() + self._patience_s
        self._tries = self._unheard = 0
        self._last: Refused | None = None

    def request(self, content: bytes | None) -> httpx.Request:
        """The next request. Raises BudgetExceeded where there is no time for it."""
        left_s = self._end_s - self._clock()
        parameters = self._parameters
        if self._budget_ms is not None:
            if left_s <= 0:
                raise self._exceeded()
            parameters = parameters | {"budget_ms": f"{max(LEAST_S, left_s) * 1e3:.3f}"}
        self._tries += 1
        return self._http.build_request(
            self._method,
            self._route,
            params=parameters,
            content=content,
            headers=None if content is None else {"Content-Type": "application/octet-stream"},
            extensions={"timeout": _Until(self._end_s + GRACE_S, self._clock)},
        )

    def after(self, outcome: "httpx.Response | httpx.RequestError") -> _T | _Wait:
        """What became of the request: the answer, or what to wait. Raises ClientError."""
        if isinstance(outcome, httpx.RequestError):
            return self._lost(outcome)
        if outcome.is_success:
            try:
                return self._answer.model_validate_json(outcome.content)
            except ValidationError:
                raise self._stranger(outcome) from None
        return self._refused(outcome)

    def _lost(self, error: httpx.RequestError) -> _Wait:
        where, cause = self._http.base_url, _cause(error)
        if isinstance(error, httpx.TimeoutException):
            if self._budget_ms is not None:
                raise self._exceeded() from None
            raise NotReachable(f"no answer from {where} within {self._patience_s:g} s") from None
        if not isinstance(error, httpx.ConnectError):
            raise NotReachable(f"the connection to {where} was lost: {_words(cause)}") from None
        # nothing was sent; a name that is unknown or a certificate that is wrong stays so
        if not isinstance(cause, gaierror | SSLError):
            wait_s = min(WAIT_S * 2**self._unheard, MAX_WAIT_S)
            self._unheard += 1
            if self._fits(wait_s):
                return _Wait(wait_s)
        raise NotReachable(f"cannot connect to {where}: {_words(cause)}") from None

    def _refused(self, response: httpx.Response) -> _Wait:
        refused = Refused(response.status_code, _problem(response))
        match refused.status:
            case HTTPStatus.SERVICE_UNAVAILABLE:
                wait_s = _retry_after_s(refused, response.headers)
                if wait_s is not None:
                    wait_s = max(wait_s, WAIT_S)
                    if self._fits(wait_s, (refused.needed_ms or 0.0) / 1e3):
                        self._last = refused
                        return _Wait(wait_s)
            case HTTPStatus.GATEWAY_TIMEOUT:
                raise BudgetExceeded(refused.detail)
            case HTTPStatus.UNPROCESSABLE_ENTITY if self._last and refused.needed_ms is not None:
                raise self._exceeded()  # the budget was not too small, it is now
        if not response.is_error:
            raise self._stranger(response)
        raise refused

    def _fits(self, wait_s: float, needed_s: float = 0.0) -> bool:
        """Whether there is a budget, and enough of it left after waiting."""
        if self._budget_ms is None:
            return False
        return self._end_s - self._clock() - wait_s >= max(needed_s, LEAST_S)

    def _exceeded(self) -> BudgetExceeded:
        requests = f"{self._tries} request{'s' * (self._tries != 1)}"
        said = f"; refused before: {self._last.detail}" if self._last else ""
        return BudgetExceeded(
            f"the budget of {self._budget_ms:g} ms passed without an answer ({requests}){said}"
        )

    def _stranger(self, response: httpx.Response) -> NotReachable:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        return NotReachable(
            f"what answers at {self._http.base_url} is no pcae-serve, or of another version"
            f" ({status} on /{self._route})"
        )


class _Base:
    """What both clients are made of; `_http` is the one of their kind."""

    _http: "httpx.Client | httpx.AsyncClient"
    _clock: Clock

    def _image_call(
        self, route: str, answer: type[_T], budget_ms: float | None, **parameters: Any
    ) -> _Call[_T]:
        return _Call(self._http, self._clock, "POST", route, answer, parameters, budget_ms)

    def _told_call(self, route: str, answer: type[_T]) -> _Call[_T]:
        return _Call(self._http, self._clock, "GET", route, answer, patience_s=TOLD_S)


class Client(_Base):
    """A pcae-serve at a URL; a context manager that keeps its connections. Threads may share it."""

    _http: httpx.Client

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """transport, clock and sleep: for tests, or another way to the server."""
        self._http = httpx.Client(**_settings(url, api_key), transport=transport)
        self._clock, self._sleep = clock, sleep

    def classify(
        self,
        image: ImageLike,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        top_k: int = 5,
        explain: bool = False,
    ) -> Classification:
        """The classes of an image: a path, an image file's bytes, or an image of Pillow.

        budget_ms counts from this call on, over all requests; without one the server's own holds,
        and nothing is asked twice. Raises ClientError; OSError where a file cannot be read.
        """
        call = self._image_call(
            "classify",
            Classification,
            budget_ms,
            tier=tier,
            min_tier=min_tier,
            top_k=top_k,
            explain=explain,
        )
        return self._answered(call, image)

    def embed(
        self,
        image: ImageLike,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        explain: bool = False,
    ) -> Embedding:
        """The features of an image, where the server's model has no head; else as `classify`."""
        call = self._image_call(
            "embed", Embedding, budget_ms, tier=tier, min_tier=min_tier, explain=explain
        )
        return self._answered(call, image)

    def tiers(self) -> Tiers:
        """What the server offers. Raises ClientError."""
        return self._answered(self._told_call("tiers", Tiers))

    def ready(self) -> bool:
        """Whether a server is there and takes requests; `tiers` says why not."""
        try:
            return self._answered(self._told_call("readyz", Health)).status == "ready"
        except ClientError:
            return False

    def _answered(self, call: _Call[_T], image: ImageLike | None = None) -> _T:
        content = None if image is None else image_file(image)
        while True:
            request = call.request(content)
            try:
                outcome: httpx.Response | httpx.RequestError = self._http.send(request)
            except httpx.RequestError as error:
                outcome = error
            step = call.after(outcome)
            if not isinstance(step, _Wait):
                return step
            self._sleep(step.seconds)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Base):
    """As `Client`, for asyncio: any number of calls may run at the same time."""

    _http: httpx.AsyncClient

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """transport, clock and sleep: for tests, or another way to the server."""
        self._http = httpx.AsyncClient(**_settings(url, api_key), transport=transport)
        self._clock, self._sleep = clock, sleep

    async def classify(
        self,
        image: ImageLike,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        top_k: int = 5,
        explain: bool = False,
    ) -> Classification:
        """As `Client.classify`."""
        call = self._image_call(
            "classify",
            Classification,
            budget_ms,
            tier=tier,
            min_tier=min_tier,
            top_k=top_k,
            explain=explain,
        )
        return await self._answered(call, image)

    async def embed(
        self,
        image: ImageLike,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        explain: bool = False,
    ) -> Embedding:
        """As `Client.embed`."""
        call = self._image_call(
            "embed", Embedding, budget_ms, tier=tier, min_tier=min_tier, explain=explain
        )
        return await self._answered(call, image)

    async def tiers(self) -> Tiers:
        """As `Client.tiers`."""
        return await self._answered(self._told_call("tiers", Tiers))

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            return (await self._answered(self._told_call("readyz", Health))).status == "ready"
        except ClientError:
            return False

    async def _answered(self, call: _Call[_T], image: ImageLike | None = None) -> _T:
        if image is None or isinstance(image, bytes):  # a thread would cost a millisecond
            content = image
        else:
            content = await asyncio.to_thread(image_file, image)
        while True:
            request = call.request(content)
            try:
                outcome: httpx.Response | httpx.RequestError = await self._http.send(request)
            except httpx.RequestError as error:
                outcome = error
            step = call.after(outcome)
            if not isinstance(step, _Wait):
                return step
            await self._sleep(step.seconds)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        # httpx talks through anyio, which loads its half for asyncio when it is first used: that
        # would be some 50 ms of the first call's budget
        await anyio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def image_file(image: ImageLike) -> bytes:
    """The bytes of an image file, which a server makes the same pixels of."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, Image.Image):
        return Path(image).read_bytes()
    upright = ImageOps.exif_transpose(image)  # as the server turns files; PNG loses the tag
    png = io.BytesIO()
    # level 1: the time counts, and bytes hardly do
    (upright if upright.mode in PNG_MODES else upright.convert("RGB")).save(
        png, "PNG", compress_level=1
    )
    return png.getvalue()


def _settings(url: str, api_key: str | None) -> dict[str, Any]:
    """What an httpx client of either kind is made with. Raises ClientError for no address."""
    address = url if "//" in url else f"http://{url}"
    try:
        parts = urlsplit(address)
        sensible = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port, or brackets
        sensible = False
    if not sensible:
        raise ClientError(f"{url!r} is no address as {URL}")
    headers = {"User-Agent": f"pcae-serve/{__version__}"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ClientError("the API key has characters that no HTTP header can hold")
        headers[KEY_HEADER] = api_key
    return {
        "base_url": address,
        "headers": headers,
        # unbounded: a request that waited for a connection would tell the server a budget that has
        # partly passed since
        "limits": httpx.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEPT_S
        ),
    }


def _problem(response: httpx.Response) -> Mapping[str, Any]:
    """The problem document in a body; nothing where it is none."""
    try:
        document = json.loads(response.content)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _retry_after_s(refused: Refused, headers: httpx.Headers) -> float | None:
    """Seconds until the server wants to be asked again: its document is finer than the header."""
    told = headers.get("Retry-After")
    for seconds in (refused.retry_after_s, _number(told)):
        if seconds is not None:
            return seconds
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    return None


def _number(value: Any) -> float | None:
    """A number of 0 or more, or a text that says one."""
    with contextlib.suppress(TypeError, ValueError):
        if (number := float(value)) >= 0:
            return number
    return None


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _words(error: BaseException) -> str:
    """What an error says, the same whichever library met it."""
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or one_line(error)


def _cause(error: BaseException) -> BaseException:
    """What the libraries in between wrapped: the first error, which says most."""
    if isinstance(error, BaseExceptionGroup):
        return _cause(error.exceptions[0])
    inner = error.__cause__ or error.__context__
    return error if inner is None else _cause(inner)
