"""Events that the scheduler handles, and actions that it returns.

    event           what happened                                  actions that can follow
    Arrived         its body is complete, or it is refused before  Reject
    Decoded         the request joins the queue                    Remove, Dispatch, SetTimer
    ClientLeft      the client closed its connection
    TierDisabled    a tier has failed and runs no more requests    Remove, Dispatch
    TaskSubmitted   a background task joins its own queue          StartTask
    DeviceLost      a device will not return from its last call
    LooksEnded      no second look may start from now on           Answer
    Timer           the time of an earlier SetTimer has come       Remove, Answer, Dispatch
    Done            a device finished its batch or task            BatchAccounted, Answer, Dispatch

A request whose margin is in Done has a first answer, which is not sent yet: it waits for a second
look until Answer, or until a Dispatch has its id again. The second answer then replaces the first.

All times are seconds of one monotonic clock. The event log stores these classes field by field.
"""

from dataclasses import dataclass
from typing import Literal

from pcae_serve.scheduling.request_queue import Request


@dataclass(frozen=True)
class Arrived:
    now_s: float
    request: Request


@dataclass(frozen=True)
class Decoded:
    now_s: float
    id: int


@dataclass(frozen=True)
class ClientLeft:
    now_s: float
    id: int


@dataclass(frozen=True)
class TierDisabled:
    now_s: float
    tier: int


@dataclass(frozen=True)
class TaskSubmitted:
    now_s: float
    id: int  # of the task; tasks and requests are numbered independently
    seconds: float  # expected run time


@dataclass(frozen=True)
class DeviceLost:
    now_s: float
    device: int


@dataclass(frozen=True)
class LooksEnded:
    now_s: float


@dataclass(frozen=True)
class Timer:
    now_s: float


@dataclass(frozen=True)
class Done:
    now_s: float
    device: int
    seconds: float | None  # None if the batch failed, and for tasks: nothing to learn from
    #: Id and margin of the requests that a second look may gain something for.
    margins: tuple[tuple[int, float], ...] = ()


Event = (
    Arrived
    | Decoded
    | ClientLeft
    | TierDisabled
    | TaskSubmitted
    | DeviceLost
    | LooksEnded
    | Timer
    | Done
)


@dataclass(frozen=True)
class Dispatch:
    """Run these requests as one batch on this device and tier."""

    device: int
    tier: int
    ids: tuple[int, ...]


RejectReason = Literal["budget", "expired", "load", "full", "share"]


@dataclass(frozen=True)
class Reject:
    """Refuse a request at admission: it cannot be served in time.

    budget   smaller than decoding and the fastest allowed tier need on an idle machine
    expired  the upload has left less time than that
    load     the request would be late, or would make an accepted one late
    full     the queue has reached its limit
    share    its caller is over its share while requests are refused for load
    """

    id: int
    why: RejectReason
    needed_s: float  # of decoding and the fastest allowed tier on an idle machine
    retry_after_s: float  # until all work queued now should be done


@dataclass(frozen=True)
class Remove:
    """Remove an admitted request, which will not run.

    expired  upload, decoding or queueing took so long that no allowed tier can meet the deadline
    dropped  the policy dropped it so that other requests are in time
    failed   every tier that it allows is disabled
    """

    id: int
    why: Literal["expired", "dropped", "failed"]


@dataclass(frozen=True)
class Answer:
    """Send the first answer of a request; it gets no second look."""

    id: int


@dataclass(frozen=True)
class StartTask:
    """Run this background task on this device."""

    device: int
    id: int


@dataclass(frozen=True)
class SetTimer:
    """Send a Timer event at this time; a later SetTimer replaces an earlier one."""

    at_s: float


@dataclass(frozen=True)
class BatchAccounted:
    """Account for the device time of a finished batch, and for how many rows of it were wasted."""

    device: int
    tier: int
    batch: int
    seconds: float
    late: int  # rows answered after their deadline
    cancelled: int  # rows whose client left while the batch ran


Action = Dispatch | StartTask | Reject | Remove | Answer | SetTimer | BatchAccounted
