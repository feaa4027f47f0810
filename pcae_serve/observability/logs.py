"""Logging to stderr: one record per line, as text or JSON, with the request id; the access log.

Parts of a record come from clients, so control characters are escaped and every field has a
maximum length: a client cannot forge a record, control a terminal or fill a disk. Headers and query
strings are never logged.
"""

import json
import logging
import re
import sys
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pcae_serve.observability import outcomes, tracing
from pcae_serve.observability.outcomes import Outcome

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

MAX_FIELD = 500  # characters of a string that goes into a message, or of a field
MAX_MESSAGE = 4000
MAX_EXCEPTION = 16_000  # the end is kept: it has the error itself

#: Id of the current request, also in tasks that it starts. Never reset: a server runs every request
#: in a task of its own, and logs a failed one after this middleware has ended.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

access = logging.getLogger("pcae_serve.access")

#: Polled every few seconds by other programs: logged at level debug unless they fail.
QUIET = frozenset({"/livez", "/readyz", "/metrics"})
#: Fields of a request's state that an application may set for the access log.
STATE_FIELDS = ("caller", "tier", "looks", "images")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
#: C0, C1, separators that some readers treat as line ends, marks that change the direction of text,
#: and surrogates, which no encoding accepts.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "fastapi")


def clean(text: str, max_length: int = MAX_FIELD) -> str:
    """Return one line of printable text, at most `max_length` characters long."""
    # cut before escaping as well, so that a text of megabytes is not scanned
    return _cut(_CONTROL.sub(_escaped, text[: max_length + 1]), max_length)


def configure(format: Format = "text", level: Level = "info") -> None:
    """Log to stderr, records of the HTTP server included. A later call replaces an earlier one.

    uvicorn needs log_config=None, otherwise it installs its own handlers.
    """
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _SERVERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    logging.captureWarnings(True)


class RequestId:
    """Outermost ASGI middleware: gives each request an id, in the response and in the log.

    The id is the client's X-Request-ID if it is valid, otherwise a new one.
    """

    def __init__(self, app: ASGIApp, *, access_log: bool = True) -> None:
        """Wrap `app`. access_log: write one record at the end of each request."""
        self._app, self._access_log = app, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s, status, logged = perf_counter(), None, not self._access_log
        id_ = _client_id(scope) or uuid.uuid4().hex
        request_id.set(id_)
        ended = outcomes.collect()
        scope.setdefault("state", {})["request_id"] = id_

        def log_once(status: int | None) -> None:
            nonlocal logged
            if not logged:
                logged = True
                _log_access(scope, status, perf_counter() - start_s, ended)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [h for h in message.get("headers", ()) if h[0].lower() != b"x-request-id"]
                headers.append((b"x-request-id", id_.encode()))
                message = {**message, "headers": headers}
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                log_once(status)  # here, not below: the request's span is still open

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log_once(status or 500)  # the server will respond with 500
            raise
        finally:
            log_once(status)  # None: cancelled before a response


def join_counts(words: Sequence[object]) -> str:
    """Return one word unchanged, and several as counts in alphabetical order: fast:3,full:1."""
    if len(words) == 1:
        return str(words[0])
    counts = Counter(map(str, words))
    return ",".join(f"{word}:{counts[word]}" for word in sorted(counts))


def _client_id(scope: Scope) -> str | None:
    ids = [value for name, value in scope["headers"] if name == b"x-request-id"]
    id_ = ids[0].decode("latin-1") if len(ids) == 1 else ""
    return id_ if _REQUEST_ID.fullmatch(id_) else None


def _log_access(scope: Scope, status: int | None, seconds: float, ended: Sequence[Outcome]) -> None:
    path = getattr(scope.get("route"), "path", None) or scope["path"]
    state = scope["state"]
    words = {name: state[name] for name in STATE_FIELDS if state.get(name) is not None}
    if ended:
        words["outcome"] = join_counts(ended)
    fields = {
        "method": scope["method"],
        "path": path,
        "status": status,
        "ms": round(seconds * 1e3, 2),
    } | words
    quiet = path in QUIET and status is not None and status < 400
    access.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %s %.1f ms%s",
        scope["method"],
        path,
        "-" if status is None else status,
        seconds * 1e3,
        "".join(f" {name}={word}" for name, word in words.items()),
        extra={"fields": fields},
    )


class _Handler(logging.StreamHandler[Any]):
    """The handler that `configure` installs and replaces."""


class _Formatter(logging.Formatter):
    """Formats the parts of a record, each cleaned. JSON includes `extra={"fields": …}`."""

    def message(self, record: logging.LogRecord) -> str:
        """Format the message as logging does, with every argument cut to a field's length."""
        message, args = str(record.msg), record.args
        if isinstance(args, Mapping):
            message %= {name: _bounded(value) for name, value in args.items()}
        elif args:
            message %= tuple(map(_bounded, args))
        return clean(message, MAX_MESSAGE)

    def id(self, record: logging.LogRecord) -> str | None:
        """Return the id of the current request, or the one that the record sets."""
        id_: str | None = getattr(record, "request_id", request_id.get())
        return id_

    def exception(self, record: logging.LogRecord) -> list[str]:
        """Return the lines of the traceback."""
        parts = [self.formatException(record.exc_info)] if record.exc_info else []
        if record.stack_info:
            parts.append(record.stack_info)
        text = "\n".join(parts)[-MAX_EXCEPTION:]
        return [clean(line) for line in text.split("\n")] if text else []

    def time(self, record: logging.LogRecord) -> str:
        """Return the time in ISO 8601, UTC, with milliseconds."""
        created = datetime.fromtimestamp(record.created, UTC)
        return created.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Text(_Formatter):
    """Text for people. The lines of a traceback are indented; a record's first line is not."""

    def format(self, record: logging.LogRecord) -> str:
        id_ = self.id(record)
        first = (
            f"{self.time(record)} {record.levelname} {clean(record.name)}: {self.message(record)}"
            + (f" [{clean(id_)}]" if id_ else "")
        )
        return "\n    ".join([first, *self.exception(record)])


class _Json(_Formatter):
    """One JSON object per line."""

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
        extra = {clean(name): _plain(value) for name, value in fields.items()}
        return json.dumps(document | extra | document)  # no field replaces a standard one


def _bounded(value: Any) -> Any:
    """Cut text and errors, which may hold text from a client, to a field's length."""
    if isinstance(value, str | BaseException):
        return _cut(str(value), MAX_FIELD)
    return value


def _plain(value: Any) -> Any:
    """Return `value` if JSON can express it, otherwise its text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and abs(value) < float("inf"):
        return value
    return clean(str(value))


def _cut(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
