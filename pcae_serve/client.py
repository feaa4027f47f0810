"""Python client of the REST API: send an image with a latency budget, get an answer; sync or async.

    >>> from pcae_serve import Client
    >>> with Client("http://localhost:8000") as client:
    ...     answer = client.classify("docs/samples/bag.png", budget_ms=500)
    >>> answer.predictions[0].label, answer.tier
    ('Bag', 'full')

`_Call` decides without I/O what follows each response: an answer, an error, or a wait before
another request:

    image -> request with the remaining budget -> answer | error | wait
               ^------------------------------------------------'

`Client` and `AsyncClient` send the requests and sleep. Importing this module loads neither numpy
nor an engine.
"""

import asyncio
import contextlib
import io
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from inspect import signature
from math import isfinite
from pathlib import Path
from socket import gaierror
from ssl import SSLError
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Self, TypeVar
from urllib.parse import urlsplit

from PIL import Image, ImageOps
from pydantic import BaseModel, ValidationError

from pcae_serve.errors import TYPE_PREFIX, PcaeError, one_line
from pcae_serve.schemas import Classification, Embedding, Health, Tiers
from pcae_serve.version import __version__, install_command

try:
    import anyio  # httpx2 depends on it
    import httpx2
except ImportError:
    raise ImportError(
        f"pcae_serve.client needs httpx2: {install_command('client')}", name="httpx2"
    ) from None

__all__ = [
    "AsyncClient",
    "BudgetExceeded",
    "Client",
    "ClientError",
    "ImageLike",
    "NotReachable",
    "Refused",
]

#: An image: the path of a file, the bytes of a file, or a Pillow image.
ImageLike = str | os.PathLike[str] | bytes | Image.Image
Clock = Callable[[], float]

URL = "http://127.0.0.1:8000"
KEY_HEADER = "X-API-Key"

#: Grace period after the deadline, so that the server's own 504 can still arrive.
GRACE_S = 0.25
#: Time-outs without a budget: of an image's answer, and of `tiers` and `ready`.
IMAGE_TIMEOUT_S, INFO_TIMEOUT_S = 60.0, 10.0
#: A shorter remaining budget is not worth another request.
MIN_LEFT_S = 1e-3
#: Shortest and longest wait before a retry; doubled after each failed connection.
MIN_WAIT_S, MAX_WAIT_S = 0.02, 0.5
#: Idle connections are closed after this time. The server closes them after 5 s (uvicorn's
#: default), and a request sent at that moment would be lost.
KEEP_ALIVE_S = 4.0
#: Modes that PNG stores unchanged; the server converts any other to RGB, so the client may as well.
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}

_M = TypeVar("_M", bound=BaseModel)
_P = ParamSpec("_P")


class ClientError(PcaeError):
    """The call has no answer; the message gives the reason in one line."""


class NotReachable(ClientError):
    """No connection, a lost connection, a time-out, or an answer that is not pcae-serve's."""


class BudgetExceeded(ClientError):
    """The budget passed without an answer."""


class Refused(ClientError):
    """The server refused the request with a problem document (RFC 9457).

    The message is its `detail`; docs/errors.md lists the codes.

        >>> try:
        ...     client.classify(image, budget_ms=5)
        ... except Refused as error:
        ...     print(error.status, error.code, error.needed_ms)
        422 budget-too-small 12.4
    """

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
    def code(self) -> str | None:
        """The error's code, such as "overloaded"; None if the problem is not pcae-serve's."""
        return self.type.removeprefix(TYPE_PREFIX) if self.type.startswith(TYPE_PREFIX) else None

    @property
    def needed_ms(self) -> float | None:
        """Milliseconds that decoding and the fastest tier need, if that is over the budget."""
        return _number(self.members.get("needed_ms"))

    @property
    def retry_after_s(self) -> float | None:
        """Seconds until a retry is useful, if the server reported it."""
        return _number(self.members.get("retry_after_s"))


@dataclass(frozen=True)
class _Wait:
    """A wait before the next request."""

    seconds: float


class _TimeLeft(dict[str, float]):
    """httpx2's time-outs; each stage of a request gets the time that is left when it begins.

    httpx2 applies a constant time-out to connecting, sending and reading separately: together that
    could be three budgets.
    """

    def __init__(self, end_s: float, clock: Clock) -> None:
        self._end_s, self._clock = end_s, clock
        super().__init__(dict.fromkeys(("connect", "read", "write", "pool"), self._left_s()))

    def _left_s(self) -> float:
        return max(MIN_LEFT_S, self._end_s - self._clock())

    def get(self, _: str, __: Any = None) -> float:
        return self._left_s()


class _Call(Generic[_M]):
    """One call from start to end: builds the requests and decides what each outcome means."""

    def __init__(
        self,
        client: "_Base",
        method: str,
        route: str,
        answer: type[_M],
        image: ImageLike | None = None,
        budget_ms: float | None = None,
        timeout_s: float = IMAGE_TIMEOUT_S,
        **parameters: Any,
    ) -> None:
        """Start the clock.

        answer: the model of a successful body. timeout_s: applies without a budget. parameters: of
        the query; those that are None are omitted.
        """
        if budget_ms is not None and not (isfinite(budget_ms) and budget_ms > 0):
            raise ValueError(f"budget_ms must be a number above 0, not {budget_ms!r}")
        self.image = image
        self._http, self._clock = client._http, client._clock
        self._method, self._route, self._answer = method, route, answer
        self._budget_ms = budget_ms
        self._parameters = {k: v for k, v in parameters.items() if v is not None}
        self._timeout_s = timeout_s if budget_ms is None else budget_ms / 1e3
        self._end_s = self._clock() + self._timeout_s
        self._requests = self._failed_connections = 0
        self._last: Refused | None = None

    def request(self, content: bytes | None) -> httpx2.Request:
        """Build the next request. Raise BudgetExceeded if no time is left for it."""
        left_s = self._end_s - self._clock()
        parameters = self._parameters
        if self._budget_ms is not None:
            if left_s <= 0:
                raise self._exceeded()
            parameters = parameters | {"budget_ms": f"{max(MIN_LEFT_S, left_s) * 1e3:.3f}"}
        self._requests += 1
        return self._http.build_request(
            self._method,
            self._route,
            params=parameters,
            content=content,
            headers=None if content is None else {"Content-Type": "application/octet-stream"},
            extensions={"timeout": _TimeLeft(self._end_s + GRACE_S, self._clock)},
        )

    def read(self, outcome: httpx2.Response | httpx2.RequestError) -> _M | _Wait:
        """Return the answer in a response, or the wait before a retry. Raise ClientError."""
        if isinstance(outcome, httpx2.RequestError):
            return self._failed(outcome)
        if outcome.is_success:
            try:
                return self._answer.model_validate_json(outcome.content)
            except ValidationError:
                raise self._not_pcae_serve(outcome) from None
        return self._refused(outcome)

    def _failed(self, error: httpx2.RequestError) -> _Wait:
        where, cause = self._http.base_url, _cause(error)
        if isinstance(error, httpx2.TimeoutException):
            if self._budget_ms is not None:
                raise self._exceeded() from None
            raise NotReachable(f"no answer from {where} within {self._timeout_s:g} s") from None
        if not isinstance(error, httpx2.ConnectError):
            raise NotReachable(f"the connection to {where} was lost: {_words(cause)}") from None
        # nothing was sent, so a retry is safe; an unknown name or a bad certificate is permanent
        if not isinstance(cause, gaierror | SSLError):
            wait_s = min(MIN_WAIT_S * 2**self._failed_connections, MAX_WAIT_S)
            self._failed_connections += 1
            if self._fits(wait_s):
                return _Wait(wait_s)
        raise NotReachable(f"cannot connect to {where}: {_words(cause)}") from None

    def _refused(self, response: httpx2.Response) -> _Wait:
        refused = Refused(response.status_code, _problem(response))
        match refused.status:
            case HTTPStatus.SERVICE_UNAVAILABLE | HTTPStatus.TOO_MANY_REQUESTS:
                wait_s = _retry_after_s(refused, response.headers)
                if wait_s is not None:
                    wait_s = max(wait_s, MIN_WAIT_S)
                    if self._fits(wait_s, (refused.needed_ms or 0.0) / 1e3):
                        self._last = refused
                        return _Wait(wait_s)
            case HTTPStatus.GATEWAY_TIMEOUT:
                raise BudgetExceeded(refused.detail)
            case HTTPStatus.UNPROCESSABLE_ENTITY if self._last and refused.needed_ms is not None:
                raise self._exceeded()  # the budget was large enough before the waits
        if not response.is_error:
            raise self._not_pcae_serve(response)
        raise refused

    def _fits(self, wait_s: float, needed_s: float = 0.0) -> bool:
        """Return whether there is a budget, and enough of it is left after waiting."""
        if self._budget_ms is None:
            return False
        return self._end_s - self._clock() - wait_s >= max(needed_s, MIN_LEFT_S)

    def _exceeded(self) -> BudgetExceeded:
        requests = f"{self._requests} request{'s' * (self._requests != 1)}"
        last = f"; last refusal: {self._last.detail}" if self._last else ""
        return BudgetExceeded(
            f"the budget of {self._budget_ms:g} ms passed without an answer ({requests}){last}"
        )

    def _not_pcae_serve(self, response: httpx2.Response) -> NotReachable:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        return NotReachable(
            f"the server at {self._http.base_url} is not pcae-serve or has an incompatible version"
            f" ({status} on /{self._route})"
        )


class _Base:
    """The calls of both clients, each declared once; the clients run them."""

    _http: httpx2.Client | httpx2.AsyncClient
    _clock: Clock

    def _classify(
        self,
        image: ImageLike,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        top_k: int = 5,
        explain: bool = False,
        max_looks: int | None = None,
    ) -> _Call[Classification]:
        """Classify an image and return its `top_k` most probable classes.

        image: the path of an image file, the bytes of one, or a Pillow image.
        tier: name of a tier, or "auto": the most accurate tier that meets the budget.
        budget_ms: milliseconds from this call until the answer is needed, over all requests. If
            None, the server's default budget applies and nothing is sent twice.
        min_tier: cheapest tier that "auto" may use; if it cannot meet the budget, the request is
            refused.
        explain: also return the indices of the patches kept after each stage.
        max_looks: how often the image may run: 1 forbids a second look on a better tier. If None,
            the server's setting applies.

        Raise BudgetExceeded, Refused or NotReachable, which are ClientErrors; OSError if the file
        cannot be read; ValueError if budget_ms is not a number above 0.

            >>> answer = client.classify("cat.jpg", budget_ms=200, min_tier="balanced")
            >>> answer.predictions[0].label
            'cat'
        """
        return _Call(
            self,
            "POST",
            "classify",
            Classification,
            image,
            budget_ms,
            tier=tier,
            min_tier=min_tier,
            top_k=top_k,
            explain=explain,
            max_looks=max_looks,
        )

    def _embed(
        self,
        image: ImageLike,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        explain: bool = False,
        normalize: bool = False,
        dtype: Literal["float32", "float16"] = "float32",
        patches: bool = False,
    ) -> _Call[Embedding]:
        """Return the features of an image, from a server whose model has no head.

        normalize: divide the features by their Euclidean length.
        dtype: "float32", or "float16" for values that are rounded to it.
        patches: also return the state of every patch [H][W][D], from a bundle that was exported
            with --dense.

        The other parameters and the errors are those of `classify`.

            >>> len(client.embed("cat.jpg", budget_ms=200, normalize=True).features)
            384
        """
        return _Call(
            self,
            "POST",
            "embed",
            Embedding,
            image,
            budget_ms,
            tier=tier,
            min_tier=min_tier,
            explain=explain,
            # absent by default, so that older servers understand the request
            normalize=normalize or None,
            dtype=None if dtype == "float32" else dtype,
            patches=patches or None,
        )

    def _tiers(self) -> _Call[Tiers]:
        """Return the server's bundle, device and tiers. Raise ClientError.

        >>> [(tier.name, tier.latency_ms) for tier in client.tiers().tiers]
        [('fast', {1: 3.1, 8: 9.8}), ('full', {1: 7.4, 8: 31.0})]
        """
        return _Call(self, "GET", "tiers", Tiers, timeout_s=INFO_TIMEOUT_S)

    def _health(self) -> _Call[Health]:
        return _Call(self, "GET", "readyz", Health, timeout_s=INFO_TIMEOUT_S)


def _blocking(
    build: Callable[Concatenate[_Base, _P], _Call[_M]],
) -> Callable[Concatenate["Client", _P], _M]:
    """Make a method of Client out of a call."""

    def method(self: "Client", /, *args: _P.args, **kwargs: _P.kwargs) -> _M:
        return self._run(build(self, *args, **kwargs))

    _describe(method, build)
    return method


def _awaitable(
    build: Callable[Concatenate[_Base, _P], _Call[_M]],
) -> Callable[Concatenate["AsyncClient", _P], Coroutine[Any, Any, _M]]:
    """Make a coroutine method of AsyncClient out of a call."""

    async def method(self: "AsyncClient", /, *args: _P.args, **kwargs: _P.kwargs) -> _M:
        return await self._run(build(self, *args, **kwargs))

    _describe(method, build)
    return method


def _describe(method: Any, build: Callable[..., Any]) -> None:
    """Give a method the name, docstring and signature of its call, as `help` shows them."""
    method.__name__ = build.__name__.lstrip("_")
    method.__qualname__ = method.__name__
    method.__doc__ = build.__doc__
    [answer] = signature(build).return_annotation.__args__
    method.__signature__ = signature(build).replace(return_annotation=answer)


class Client(_Base):
    """A client of the server at `url`. Use it as a context manager, or call `close`.

    It keeps its connections, and threads may share it.

        >>> with Client("http://localhost:8000", api_key="…") as client:
        ...     client.ready()
        True
    """

    _http: httpx2.Client

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        transport: httpx2.BaseTransport | None = None,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take the server's address.

        api_key: sent with every request. transport, clock, sleep: replaced in tests.

        Raise ClientError if the URL or the key is unusable.
        """
        self._http = httpx2.Client(**_settings(url, api_key), transport=transport)
        self._clock, self._sleep = clock, sleep

    classify = _blocking(_Base._classify)
    embed = _blocking(_Base._embed)
    tiers = _blocking(_Base._tiers)

    def ready(self) -> bool:
        """Return whether the server accepts requests; if not, `tiers` raises the reason."""
        try:
            return self._run(self._health()).status == "ready"
        except ClientError:
            return False

    def _run(self, call: _Call[_M]) -> _M:
        content = None if call.image is None else image_file(call.image)
        while True:
            request = call.request(content)
            try:
                outcome: httpx2.Response | httpx2.RequestError = self._http.send(request)
            except httpx2.RequestError as error:
                outcome = error
            step = call.read(outcome)
            if not isinstance(step, _Wait):
                return step
            self._sleep(step.seconds)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Base):
    """A client for asyncio with the same methods; any number of calls may run at the same time.

    >>> async with AsyncClient("http://localhost:8000") as client:
    ...     answers = await asyncio.gather(*(client.classify(image) for image in images))
    """

    _http: httpx2.AsyncClient

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Take the same arguments as `Client`."""
        self._http = httpx2.AsyncClient(**_settings(url, api_key), transport=transport)
        self._clock, self._sleep = clock, sleep

    classify = _awaitable(_Base._classify)
    embed = _awaitable(_Base._embed)
    tiers = _awaitable(_Base._tiers)

    async def ready(self) -> bool:
        """Return whether the server accepts requests; if not, `tiers` raises the reason."""
        try:
            return (await self._run(self._health())).status == "ready"
        except ClientError:
            return False

    async def _run(self, call: _Call[_M]) -> _M:
        if call.image is None or isinstance(call.image, bytes):  # a thread would cost a millisecond
            content = call.image
        else:
            content = await asyncio.to_thread(image_file, call.image)
        while True:
            request = call.request(content)
            try:
                outcome: httpx2.Response | httpx2.RequestError = await self._http.send(request)
            except httpx2.RequestError as error:
                outcome = error
            step = call.read(outcome)
            if not isinstance(step, _Wait):
                return step
            await self._sleep(step.seconds)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        # httpx2 runs on anyio, which loads its asyncio backend on first use: that would take
        # some 50 ms of the first call's budget
        await anyio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def image_file(image: ImageLike) -> bytes:
    """Return the bytes of an image file from which the server decodes the same pixels."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, Image.Image):
        return Path(image).read_bytes()
    upright = ImageOps.exif_transpose(image)  # as the server does with files; PNG loses the tag
    png = io.BytesIO()
    # level 1: fast compression, because the time counts against the budget and size hardly matters
    (upright if upright.mode in PNG_MODES else upright.convert("RGB")).save(
        png, "PNG", compress_level=1
    )
    return png.getvalue()


def _settings(url: str, api_key: str | None) -> dict[str, Any]:
    """Return arguments for either httpx2 client. Raise ClientError for an unusable URL or key."""
    address = url if "//" in url else f"http://{url}"
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a wrong port or wrong brackets
        usable = False
    if not usable:
        raise ClientError(f"{url!r} is not an address such as {URL}")
    headers = {"User-Agent": f"pcae-serve/{__version__}"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ClientError("the API key has characters that an HTTP header cannot contain")
        headers[KEY_HEADER] = api_key
    return {
        "base_url": address,
        "headers": headers,
        # unbounded: a request that waits for a connection would send an outdated budget
        "limits": httpx2.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_S
        ),
    }


def _problem(response: httpx2.Response) -> Mapping[str, Any]:
    """Return the problem document in a body, or an empty one if there is none."""
    try:
        document = json.loads(response.content)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _retry_after_s(refused: Refused, headers: httpx2.Headers) -> float | None:
    """Return seconds until a retry is useful: from the document, else from the coarser header."""
    header = headers.get("Retry-After", "")
    for seconds in (refused.retry_after_s, _number(header)):
        if seconds is not None:
            return seconds
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    return None


def _number(value: Any) -> float | None:
    """Parse a number of 0 or more; return None for anything else."""
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
    """Return an error's message, the same whichever library raised it."""
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or one_line(error)


def _cause(error: BaseException) -> BaseException:
    """Return the first error of a chain; the libraries in between wrap it."""
    if isinstance(error, BaseExceptionGroup):
        return _cause(error.exceptions[0])
    inner = error.__cause__ or error.__context__
    return error if inner is None else _cause(inner)
