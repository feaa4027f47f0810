"""The log: one record a line on stderr, as text or as JSON, and each request's id on its records.

It knows logging and ASGI, nothing of what is served. Clients write into a log what they like, so
no record can be made to look like two, to speak to a terminal or to fill a disk: control characters
are escaped, every field has an end. Headers and queries are never logged.
"""

import json
import logging
import re
import sys
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pcae_serve.observability import tracing

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

MAX_FIELD = 500  # characters of a string that goes into a message, or of a field
MAX_MESSAGE = 4000
MAX_EXCEPTION = 16_000  # its end is kept: that says what happened

#: Of the request in hand, also in tasks that it starts. Never reset: a server gives every request a
#: task of its own, and what it logs of a failed one comes after us.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

access = logging.getLogger("pcae_serve.access")

#: Asked every few seconds by machines: logged as debug unless something is wrong.
QUIET = frozenset({"/livez", "/readyz", "/metrics"})
#: What an application may tell of a request in its scope's state, for the access log.
TOLD = ("tier", "images")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
#: C0, C1, separators that some readers take for line ends, marks that turn text around, and halves
#: of characters, which no encoding takes.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "fastapi")


def clean(text: str, most: int = MAX_FIELD) -> str:
    """On one line, nothing in it but what can be seen, at most so many characters."""
    # cut before as well: a body's worth of text is not looked through for a line of it
    return _cut(_CONTROL.sub(_escaped, text[: most + 1]), most)


def configure(format: Format = "text", level: Level = "info") -> None:
    """Send the log of this process, the HTTP server's as well, to stderr; the last call counts.

    uvicorn must be told log_config=None, else it sets up its own again.
    """
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text())
    root = logging.getLogger()
    for former in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _SERVERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    logging.captureWarnings(True)


class RequestId:
    """ASGI middleware, the outermost: every request has an id, which answer and log tell.

    It is the client's X-Request-ID where that is one, else a new one.
    """

    def __init__(self, app: ASGIApp, *, access_log: bool = True) -> None:
        """access_log: one record at the end of each request."""
        self._app, self._access_log = app, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s, status, told = perf_counter(), None, not self._access_log
        id_ = _asked_id(scope) or uuid.uuid4().hex
        request_id.set(id_)
        scope.setdefault("state", {})["request_id"] = id_

        def tell(status: int | None) -> None:
            nonlocal told
            if not told:
                told = True
                _tell(scope, status, perf_counter() - start_s)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [h for h in message.get("headers", ()) if h[0].lower() != b"x-request-id"]
                headers.append((b"x-request-id", id_.encode()))
                message = {**message, "headers": headers}
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                tell(status)  # here, not below: the span of the request is still open

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            tell(status or 500)  # what the server answers for us
            raise
        finally:
            tell(status)  # None: cut off before an answer


def _asked_id(scope: Scope) -> str | None:
    asked = [value for name, value in scope["headers"] if name == b"x-request-id"]
    id_ = asked[0].decode("latin-1") if len(asked) == 1 else ""
    return id_ if _REQUEST_ID.fullmatch(id_) else None


def _tell(scope: Scope, status: int | None, seconds: float) -> None:
    path = getattr(scope.get("route"), "path", None) or scope["path"]
    state = scope["state"]
    fields = {
        "method": scope["method"],
        "path": path,
        "status": status,
        "ms": round(seconds * 1e3, 2),
    } | {name: state[name] for name in TOLD if state.get(name) is not None}
    quiet = path in QUIET and status is not None and status < 400
    access.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %s %.1f ms%s",
        scope["method"],
        path,
        "-" if status is None else status,
        seconds * 1e3,
        "".join(f" {name}={fields[name]}" for name in TOLD if name in fields),
        extra={"fields": fields},
    )


class _Handler(logging.StreamHandler[Any]):
    """Ours, as told from those that others have set up."""


class _Formatter(logging.Formatter):
    """The parts of a record, each cleaned. `extra={"fields": …}` joins the JSON of it."""

    def message(self, record: logging.LogRecord) -> str:
        """As logging makes it, but no argument longer than a field."""
        message, args = str(record.msg), record.args
        if isinstance(args, Mapping):
            message %= {name: _bounded(value) for name, value in args.items()}
        elif args:
            message %= tuple(map(_bounded, args))
        return clean(message, MAX_MESSAGE)

    def id(self, record: logging.LogRecord) -> str | None:
        """Of the request that was in hand, unless the record says otherwise."""
        id_: str | None = getattr(record, "request_id", request_id.get())
        return id_

    def exception(self, record: logging.LogRecord) -> list[str]:
        """Lines of the traceback."""
        parts = [self.formatException(record.exc_info)] if record.exc_info else []
        if record.stack_info:
            parts.append(record.stack_info)
        text = "\n".join(parts)[-MAX_EXCEPTION:]
        return [clean(line) for line in text.split("\n")] if text else []

    def time(self, record: logging.LogRecord) -> str:
        """ISO 8601, UTC, milliseconds."""
        moment = datetime.fromtimestamp(record.created, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Text(_Formatter):
    """For people. Only a record's first line begins at the margin: the rest is its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        id_ = self.id(record)
        first = (
            f"{self.time(record)} {record.levelname} {clean(record.name)}: {self.message(record)}"
            + (f" [{clean(id_)}]" if id_ else "")
        )
        return "\n    ".join([first, *self.exception(record)])


class _Json(_Formatter):
    """For machines: one object a line."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": self.time(record),
            "level": record.levelname,
            "logger": clean(record.name),
            "message": self.message(record),
            "request_id": self.id(record),
            "trace_id": tracing.trace_id(),
            "exception": "\n".join(self.exception(record)) or None,
        }
        document = {name: value for name, value in document.items() if value is not None}
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        told = {clean(name): _plain(value) for name, value in fields.items()}
        return json.dumps(document | told | document)  # no field replaces what we say


def _bounded(value: Any) -> Any:
    """An argument as it is, but for text and errors, which may hold what a client wrote."""
    if isinstance(value, str | BaseException):
        return _cut(str(value), MAX_FIELD)
    return value


def _plain(value: Any) -> Any:
    """What JSON has a form for."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and abs(value) < float("inf"):
        return value
    return clean(str(value))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
