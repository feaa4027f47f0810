"""Every error a caller or an operator can cause; a RequestError carries its code and HTTP status.

    PcaeError
    ├── BundleError                  the bundle is missing, damaged or has another schema    exit 1
    ├── StartError                   the server cannot start: port in use, no runtime, GPU    exit 1
    └── RequestError                 one request is refused; the server keeps running
        ├── MalformedHttp       400  the request is not valid HTTP/1.1
        ├── MalformedRequest    400  the request violates the Open Inference Protocol
        ├── UnreadableImage     400  the image is empty, truncated or damaged
        ├── MissingKey          401  the request has no API key
        ├── Forbidden           403  the API key is unknown or not an admin key
        ├── UnknownHost         403  the Host header does not name this server
        ├── CrossSiteRequest    403  a web page of another site sent the request
        ├── TaskNotSupported    404  the bundle has no head for classes, or one instead of features
        ├── UnknownModel        404  no such model or version
        ├── UnknownRoute        404  no such route
        ├── MethodNotAllowed    405  the route has other methods
        ├── UploadTimeout       408  the body did not arrive in time
        ├── ReloadInProgress    409  another reload is running
        ├── TooLarge            413  too many bytes, pixels or images, or too much memory
        ├── TooMuchFraming      413  a chunked body of tiny chunks
        ├── TargetTooLong       414  the path with its query is too long
        ├── UnsupportedType     415  not an image type that this server reads
        ├── InvalidParameter    422  unknown tier, budget out of range
        ├── BudgetTooSmall      422  no allowed tier meets the budget, even on an idle machine
        ├── ReloadFailed        422  the new bundle cannot be served; the old one stays
        ├── RateLimited         429  the API key sends more images per second than it may
        ├── HeadersTooLarge     431  too many headers, or too many bytes of them
        ├── InternalError       500  an unexpected error
        ├── EngineFailed        500  the model did not run
        ├── TooManyConnections  503  every connection that the server may have is in use
        ├── Overloaded          503  no allowed tier meets the budget under the current load
        ├── OverShare           503  too busy, and the caller is over its share
        ├── Dropped             503  the policy dropped the request from the queue
        ├── Starting            503  latencies are still being measured
        ├── Draining            503  the server is shutting down
        ├── OutOfService        503  the tiers or devices that could answer have failed
        ├── OutOfMemory         503  no memory for the request
        └── DeadlineExceeded    504  the budget passed before the request was answered

A message is one line: the fault in lower case without a full stop, then "; " and what to do, or
": " and the command to run. docs/errors.md documents every code.
"""

from math import ceil
from typing import ClassVar

#: Prefix of a problem's `type`; the code follows.
TYPE_PREFIX = "urn:pcae-serve:"
#: Maximum characters of a caller's text that an answer or a log repeats.
MAX_SHOWN = 80


def shown(words: object) -> str:
    """Return a caller's text for use in a message: quoted, escaped and at most MAX_SHOWN long."""
    text = str(words)
    return ascii(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "...")


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class PcaeError(Exception):
    """An error that its message explains; commands print it as one line and exit with 1."""


class BundleError(PcaeError):
    """The bundle cannot be served."""


class StartError(PcaeError):
    """The server cannot start on this machine."""


class RequestError(PcaeError):
    """One request is refused, as RFC 9457 problem+json.

    `code` is the stable name of the error in the API; class names and details may change.
    """

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]

    def __init__(self, detail: str, **members: float | str | list[str]) -> None:
        """`members` are added to the problem document, for example needed_ms or retry_after_s.

        Numbers are rounded to a thousandth.
        """
        super().__init__(detail)
        self.detail = detail
        self.members = {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in members.items()
        }

    @property
    def type(self) -> str:
        """The `type` of the problem document: a URN that ends with the code."""
        return TYPE_PREFIX + self.code

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with the error, whatever the form of its body."""
        retry_after_s = self.members.get("retry_after_s")
        if not isinstance(retry_after_s, float | int):
            return {}
        return {"Retry-After": str(max(1, ceil(retry_after_s)))}  # in whole seconds


class MalformedHttp(RequestError):
    code, status, title = "malformed-http", 400, "Malformed HTTP"


class MalformedRequest(RequestError):
    code, status, title = "malformed-request", 400, "Malformed request"


class UnreadableImage(RequestError):
    code, status, title = "unreadable-image", 400, "Unreadable image"


class MissingKey(RequestError):
    code, status, title = "missing-key", 401, "API key required"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(RequestError):
    code, status, title = "forbidden", 403, "Forbidden"


class UnknownHost(RequestError):
    code, status, title = "unknown-host", 403, "Unknown host"


class CrossSiteRequest(RequestError):
    code, status, title = "cross-site-request", 403, "Cross-site request"


class TaskNotSupported(RequestError):
    code, status, title = "task-not-supported", 404, "Task not supported by this bundle"


class UnknownModel(RequestError):
    code, status, title = "unknown-model", 404, "Unknown model"


class UnknownRoute(RequestError):
    code, status, title = "unknown-route", 404, "Unknown route"


class MethodNotAllowed(RequestError):
    code, status, title = "method-not-allowed", 405, "Method not allowed"


class UploadTimeout(RequestError):
    code, status, title = "upload-timeout", 408, "Upload timed out"


class ReloadInProgress(RequestError):
    code, status, title = "reload-in-progress", 409, "Reload already in progress"


class TooLarge(RequestError):
    code, status, title = "too-large", 413, "Request too large"


class TooMuchFraming(RequestError):
    code, status, title = "too-much-framing", 413, "Too much framing"


class TargetTooLong(RequestError):
    code, status, title = "target-too-long", 414, "Request target too long"


class UnsupportedType(RequestError):
    code, status, title = "unsupported-type", 415, "Unsupported type"


class InvalidParameter(RequestError):
    code, status, title = "invalid-parameter", 422, "Invalid parameter"


class BudgetTooSmall(RequestError):
    code, status, title = "budget-too-small", 422, "Budget too small"


class ReloadFailed(RequestError):
    code, status, title = "reload-failed", 422, "Reload failed"


class RateLimited(RequestError):
    code, status, title = "rate-limited", 429, "Rate limit exceeded"


class HeadersTooLarge(RequestError):
    code, status, title = "headers-too-large", 431, "Request headers too large"


class InternalError(RequestError):
    code, status, title = "internal-error", 500, "Internal error"


class EngineFailed(RequestError):
    code, status, title = "engine-failed", 500, "Inference failed"


class TooManyConnections(RequestError):
    code, status, title = "too-many-connections", 503, "Too many connections"


class Overloaded(RequestError):
    code, status, title = "overloaded", 503, "Server overloaded"


class OverShare(RequestError):
    code, status, title = "over-share", 503, "Share used up"


class Dropped(RequestError):
    code, status, title = "dropped", 503, "Request dropped"


class Starting(RequestError):
    code, status, title = "starting", 503, "Server is starting"


class Draining(RequestError):
    code, status, title = "draining", 503, "Server is shutting down"

    def __init__(
        self,
        detail: str = "the server is shutting down; send the request to another one",
        **members: float | str,
    ) -> None:
        super().__init__(detail, **members)


class OutOfService(RequestError):
    code, status, title = "out-of-service", 503, "Out of service"


class OutOfMemory(RequestError):
    code, status, title = "out-of-memory", 503, "Out of memory"


class DeadlineExceeded(RequestError):
    code, status, title = "deadline-exceeded", 504, "Deadline exceeded"
