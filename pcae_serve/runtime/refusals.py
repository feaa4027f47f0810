"""Why a request is not served: the error that its client receives, and the outcome to count."""

from collections.abc import Iterable
from math import floor
from typing import Literal, NamedTuple

from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import DenseEngine, Engine
from pcae_serve.errors import (
    BudgetTooSmall,
    DeadlineExceeded,
    Draining,
    Dropped,
    EngineFailed,
    InvalidParameter,
    OutOfMemory,
    OutOfService,
    Overloaded,
    OverShare,
    RateLimited,
    RequestError,
    Starting,
    TaskNotSupported,
    TooLarge,
    UploadTimeout,
)
from pcae_serve.observability.outcomes import Outcome
from pcae_serve.scheduling.events import Reject
from pcae_serve.scheduling.request_queue import Request

#: Retry-After, in seconds, if the policy dropped a request or memory ran out: enough for the
#: requests served instead, and the shortest time that HTTP can express.
SHORT_RETRY_S = 1.0


class Refusal(NamedTuple):
    error: RequestError
    outcome: Outcome


def outcome_of(error: RequestError) -> Outcome | None:
    """Return the outcome of a request whose body was refused; None if it is not counted.

    Requests with invalid parameters are not, wherever the parameters are.
    """
    return None if isinstance(error, InvalidParameter) else Outcome.UNREADABLE


class Refused(Exception):
    """A request is refused; the caller counts it and raises the error instead."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.error.detail)
        self.refusal = refusal


def rejected(reject: Reject, request: Request, fastest: str, queue_limit: int) -> Refusal:
    """Return why a request is not admitted. fastest: name of its fastest allowed tier."""
    budget_ms = request.budget_s * 1e3
    match reject.why:
        case "budget":
            needed_ms = round(reject.needed_s * 1e3, 1)
            decoding = ", decoding included" if request.decode_s else ""
            too_small = BudgetTooSmall(
                f"tier {fastest!r}, the fastest allowed, needs {needed_ms:g} ms on an idle server"
                f"{decoding}; raise the budget of {budget_ms:g} ms or allow a faster tier",
                needed_ms=needed_ms,
            )
            return Refusal(too_small, Outcome.REJECTED_BUDGET)
        case "expired":
            return expired_before_decoded(budget_ms)
        case "load":
            too_busy = Overloaded(
                f"the server is too busy to answer within {budget_ms:g} ms without delaying"
                " requests already accepted; retry later, allow a faster tier or raise the budget",
                retry_after_s=reject.retry_after_s,
            )
            return Refusal(too_busy, Outcome.REJECTED_LOAD)
        case "full":
            return queue_full(queue_limit, reject.retry_after_s)
        case "share":
            over_share = OverShare(
                "the server is too busy, and this caller has more work waiting than its share;"
                " retry later, or send fewer requests at a time",
                retry_after_s=reject.retry_after_s,
            )
            return Refusal(over_share, Outcome.REJECTED_SHARE)


def queue_full(queue_limit: int, retry_after_s: float) -> Refusal:
    error = Overloaded(
        f"the queue is full: {queue_limit} requests are waiting; retry later",
        retry_after_s=retry_after_s,
    )
    return Refusal(error, Outcome.REJECTED_FULL)


def rate_limited(rate: float, retry_after_s: float) -> Refusal:
    error = RateLimited(
        f"the rate limit of this API key is {rate:g} images/s; retry later or send fewer images",
        retry_after_s=retry_after_s,
    )
    return Refusal(error, Outcome.REJECTED_RATE)


def beyond_burst(rate: float, images: int) -> Refusal:
    error = TooLarge(
        f"the request has {images} images, and the rate limit of this API key, {rate:g} images/s,"
        f" never lets more than {max(1, floor(rate))} come at once; send them in several requests"
    )
    return Refusal(error, Outcome.REJECTED_RATE)


def upload_timeout(upload_s: float, hint: str = "send it faster") -> Refusal:
    error = UploadTimeout(f"the body did not arrive within {upload_s:g} s; {hint}")
    return Refusal(error, Outcome.UPLOAD_FAILED)


def upload_too_slow(min_bytes_s: float) -> Refusal:
    error = UploadTimeout(
        f"the body arrives at less than {min_bytes_s / 1e3:g} kB/s; send it faster"
    )
    return Refusal(error, Outcome.UPLOAD_FAILED)


def upload_dropped() -> Refusal:
    error = Dropped(
        "the upload fell behind and was dropped to make room for another; send the body faster or"
        " retry later",
        retry_after_s=SHORT_RETRY_S,
    )
    return Refusal(error, Outcome.UPLOAD_FAILED)


def uploads_full(limit: int) -> Refusal:
    error = Overloaded(
        f"the limit of uploads in progress, {limit}, is reached; retry later",
        retry_after_s=SHORT_RETRY_S,
    )
    return Refusal(error, Outcome.REJECTED_FULL)


def memory_full() -> Refusal:
    error = Overloaded(
        "the requests in progress use all memory that requests may take; retry later",
        retry_after_s=SHORT_RETRY_S,
    )
    return Refusal(error, Outcome.REJECTED_FULL)


def over_memory(needed_bytes: int, limit_bytes: int, hint: str = "send a smaller image") -> Refusal:
    error = TooLarge(
        f"this request needs {needed_bytes:,} bytes of memory, over the limit of {limit_bytes:,};"
        f" {hint}"
    )
    return Refusal(error, Outcome.UNREADABLE)


def expired_before_decoded(budget_ms: float) -> Refusal:
    error = DeadlineExceeded(
        f"the budget of {budget_ms:g} ms passed before the image was received and decoded; raise"
        " the budget"
    )
    return Refusal(error, Outcome.EXPIRED)


def expired_in_queue(budget_ms: float) -> Refusal:
    error = DeadlineExceeded(
        f"the budget of {budget_ms:g} ms was used up before any allowed tier could run; raise the"
        " budget or allow a faster tier"
    )
    return Refusal(error, Outcome.EXPIRED)


def dropped(policy: str) -> Refusal:
    error = Dropped(
        f"request dropped from the queue by policy {policy!r} to meet other deadlines; retry later"
        " or raise the budget",
        retry_after_s=SHORT_RETRY_S,
    )
    return Refusal(error, Outcome.DROPPED)


def tiers_disabled(names: Iterable[str], retry_after_s: float) -> Refusal:
    quoted = [repr(name) for name in names]
    failing = f"tier {quoted[0]} is" if len(quoted) == 1 else f"tiers {', '.join(quoted)} are"
    error = OutOfService(
        f"{failing} failing and out of rotation; allow another tier or retry later",
        retry_after_s=retry_after_s,
    )
    return Refusal(error, Outcome.FAILED)


def nothing_works(retry_after_s: float) -> Refusal:
    error = OutOfService(
        "every tier or device of this server is failing; send the request to another server",
        retry_after_s=retry_after_s,
    )
    return Refusal(error, Outcome.FAILED)


def no_engine() -> Refusal:
    error = OutOfService("the engine failed; send the request to another server")
    return Refusal(error, Outcome.FAILED)


def device_lost() -> Refusal:
    error = OutOfService("the device stopped responding; send the request to another server")
    return Refusal(error, Outcome.FAILED)


def batch_failed() -> Refusal:
    return Refusal(EngineFailed("the model failed on this batch; retry"), Outcome.FAILED)


def batch_not_started() -> Refusal:
    return Refusal(EngineFailed("internal error, see the server's log; retry"), Outcome.FAILED)


def out_of_memory() -> Refusal:
    error = OutOfMemory(
        "the server has too little memory for this request; retry later or send a smaller image",
        retry_after_s=SHORT_RETRY_S,
    )
    return Refusal(error, Outcome.FAILED)


def starting() -> Refusal:
    error = Starting("the server is measuring its latencies; retry in a moment", retry_after_s=1)
    return Refusal(error, Outcome.DRAINING)


def stopping() -> Refusal:
    """Return the refusal of a new request while the server drains."""
    return Refusal(Draining(retry_after_s=1), Outcome.DRAINING)


def stopped() -> Refusal:
    """Return the refusal of an admitted request that was unanswered when the server stopped."""
    return Refusal(Draining(), Outcome.DRAINING)


def no_patches(bundle: Bundle, engines: Iterable[Engine]) -> TaskNotSupported | None:
    """Return the error for a request for patches, or None if they can be returned."""
    if bundle.patch_grid is None:
        return TaskNotSupported(
            "this bundle's graphs do not return patches; export it again with --dense"
        )
    for engine in engines:
        if not isinstance(engine, DenseEngine):
            return TaskNotSupported(
                f"backend {engine.name} does not return patches; use --backend onnxruntime"
            )
    return None


def wrong_kind(answers: Literal["logits", "features"]) -> TaskNotSupported:
    """Return the error for a request for classes or features that this bundle cannot return."""
    if answers == "logits":
        return TaskNotSupported("this bundle's models have no classes; POST to /embed for features")
    return TaskNotSupported("this bundle's models return classes; POST to /classify")
