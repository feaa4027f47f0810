"""Every error a person can cause, as a small tree; the HTTP status sits on the class.

    PcaeError
    ├── BundleError            the bundle is missing, damaged or of another schema   exit 1
    ├── StartError             the server cannot start: port taken, no runtime, GPU   exit 1
    └── RequestError           one request is refused; the server goes on
        ├── NotOffered         404  classes of a bundle without a head, features of one with
        ├── MalformedRequest   400  not what the Open Inference Protocol says
        ├── UnreadableImage    400  empty, truncated or damaged
        ├── NoKey              401  no API key came along
        ├── WrongKey           403  one that is not known, or not good enough
        ├── UploadTooSlow      408  the body takes for ever
        ├── Reloading          409  a reload is going on
        ├── TooLarge           413  more bytes or pixels than the server takes
        ├── UnsupportedType    415  no image type this server reads
        ├── InvalidParameter   422  unknown tier, senseless budget
        ├── BudgetTooSmall     422  no allowed tier fits, even on an idle machine
        ├── BadBundle          422  a reload that was refused; the old bundle serves on
        ├── Overloaded         503  no allowed tier fits in time beside what is in hand
        ├── Draining           503  the server is starting or stopping
        ├── OutOfService       503  what would answer has failed
        ├── OutOfMemory        503  there is none to decode an image with
        ├── EngineFailed       500  the model did not run
        └── BudgetPassed       504  the budget passed while the request waited

A message is one line that says what was wrong and what to do.
"""

from math import ceil
from typing import ClassVar

#: Characters of a caller's words that an answer or a log repeats.
MAX_SHOWN = 80


def shown(words: object) -> str:
    """A caller's words, to be repeated in a message: quoted, escaped, and not all too many."""
    text = str(words)
    return ascii(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "...")


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class PcaeError(Exception):
    """Something a person can mend; commands print it as one line and exit with 1."""


class BundleError(PcaeError):
    """The bundle cannot be served."""


class StartError(PcaeError):
    """The server cannot start on this machine."""


class RequestError(PcaeError):
    """One request is refused, as RFC 9457 problem+json."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str, **members: float | str | list[str]) -> None:
        """`members` join the problem document, such as needed_ms or retry_after_s."""
        super().__init__(detail)
        self.detail, self.members = detail, members

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP says of it beside the document, in whatever way that is written."""
        retry_after_s = self.members.get("retry_after_s")
        if not isinstance(retry_after_s, float | int):
            return {}
        return {"Retry-After": str(max(1, ceil(retry_after_s)))}  # in whole seconds


class NotOffered(RequestError):
    status, title = 404, "Not offered by this bundle"


class MalformedRequest(RequestError):
    status, title = 400, "Malformed request"


class UnreadableImage(RequestError):
    status, title = 400, "Unreadable image"


class NoKey(RequestError):
    status, title = 401, "An API key is needed"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class WrongKey(RequestError):
    status, title = 403, "Not allowed"


class UploadTooSlow(RequestError):
    status, title = 408, "The body did not arrive"


class Reloading(RequestError):
    status, title = 409, "A reload is going on"


class TooLarge(RequestError):
    status, title = 413, "Image too large"


class UnsupportedType(RequestError):
    status, title = 415, "Not an image type this server reads"


class InvalidParameter(RequestError):
    status, title = 422, "Invalid parameter"


class BudgetTooSmall(RequestError):
    status, title = 422, "No tier is that fast"


class Overloaded(RequestError):
    status, title = 503, "Too much load to answer in time"


class Draining(RequestError):
    status, title = 503, "Not serving"

    def __init__(
        self, detail: str = "the server is stopping: ask another one", **members: float | str
    ) -> None:
        super().__init__(detail, **members)


class BadBundle(RequestError):
    status, title = 422, "The bundle cannot be served"


class OutOfService(RequestError):
    status, title = 503, "Out of service"


class OutOfMemory(RequestError):
    status, title = 503, "Out of memory"


class EngineFailed(RequestError):
    status, title = 500, "The model did not run"


class BudgetPassed(RequestError):
    status, title = 504, "The budget passed while the request waited"
