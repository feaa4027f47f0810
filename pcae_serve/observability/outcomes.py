"""The outcome of a request: one word, the same in metrics, access log and documentation."""

from contextvars import ContextVar
from enum import StrEnum


class Outcome(StrEnum):
    """How a request with valid parameters ended. Attainment is the share of in_time."""

    IN_TIME = "in_time"
    LATE = "late"  # answered after its deadline
    REJECTED_BUDGET = "rejected_budget"  # no allowed tier fits, even on an idle server
    REJECTED_LOAD = "rejected_load"  # too busy
    REJECTED_FULL = "rejected_full"  # the limit of the queue, of uploads or of memory is reached
    REJECTED_SHARE = "rejected_share"  # too busy, and its caller is over its share
    REJECTED_RATE = "rejected_rate"  # beyond the rate of its API key
    UPLOAD_FAILED = "upload_failed"  # its client sent the body too slowly
    EXPIRED = "expired"  # its deadline passed before a tier ran
    DROPPED = "dropped"  # removed from the queue by the policy
    CANCELLED = "cancelled"  # its client left
    UNREADABLE = "unreadable"  # not an image, or too large
    FAILED = "failed"  # an engine failed, or memory ran out
    DRAINING = "draining"  # the server was starting or stopping


#: Outcomes that more devices would have prevented.
MISSED = (
    Outcome.LATE,
    Outcome.REJECTED_LOAD,
    Outcome.REJECTED_FULL,
    Outcome.REJECTED_SHARE,
    Outcome.EXPIRED,
    Outcome.DROPPED,
)

_current: ContextVar[list[Outcome] | None] = ContextVar("outcomes", default=None)


def collect() -> list[Outcome]:
    """Return a list to which `record` will add, in this context and in tasks that it starts."""
    outcomes = list[Outcome]()
    _current.set(outcomes)
    return outcomes


def record(outcome: Outcome) -> None:
    """Add an outcome to the list of the current HTTP request, if there is one."""
    if (outcomes := _current.get()) is not None:
        outcomes.append(outcome)
