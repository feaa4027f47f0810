"""Scheduler event log: records events and actions as JSON lines, and replays a log to verify it.

    first line    the setup, from which the same scheduler can be built
    other lines   one event each, and the actions that it caused

Floats are written so that they read back bit for bit.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from pcae_serve.bounded_json import parse_json
from pcae_serve.errors import PcaeError, StartError, one_line
from pcae_serve.frozen_model import FrozenModel
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.events import (
    Action,
    Arrived,
    ClientLeft,
    Decoded,
    DeviceLost,
    Done,
    Event,
    LooksEnded,
    TaskSubmitted,
    TierDisabled,
    Timer,
)
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies.registry import create, weighs_waiting
from pcae_serve.scheduling.policies.waiting_price import ACCURACY_PER_S
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable
from pcae_serve.version import __version__

log = logging.getLogger(__name__)

#: Size of the write buffer in bytes, so that not every event causes a write.
BUFFER = 1 << 16

#: Bytes of a line, at most. An event with a batch of the largest size has a few kilobytes.
MAX_LINE_BYTES = 4_000_000

_EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        Arrived,
        Decoded,
        ClientLeft,
        TierDisabled,
        TaskSubmitted,
        DeviceLost,
        LooksEnded,
        Timer,
        Done,
    )
}


class Setup(FrozenModel):
    """Everything that determines a scheduler's actions, apart from its events."""

    event_log: Literal[5] = 5  # version of the format
    pcae_serve: str = __version__  # another version may act differently
    policy: str
    waiting_price: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # points per 100 ms
    tier_table: TierTable
    seconds: list[dict[int, Seconds]]  # by tier and batch size, as measured
    max_batch: Annotated[int, Field(ge=1, le=100_000)]
    queue_limit: Annotated[int, Field(ge=1, le=10_000_000)]
    devices: Annotated[int, Field(ge=1, le=10_000)]
    #: Of callers, by name; 1 for all others.
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )

    def counted_accuracy(self, tiers: tuple[int, ...]) -> Mapping[int, float]:
        """Return the accuracy with which each of `tiers` counts for the policy."""
        if self.waiting_price and weighs_waiting(self.policy):
            return self.tier_table.counted(tiers)
        return {tier: self.tier_table.accuracy[tier] for tier in tiers}

    def idle_accuracy(self, tiers: tuple[int, ...], latency: Latency) -> float:
        """Return the accuracy of the tier that is worth its time on an idle device."""
        counted, price = self.counted_accuracy(tiers), 0.0
        if weighs_waiting(self.policy):
            price = self.waiting_price * ACCURACY_PER_S
        return counted[max(tiers, key=lambda tier: counted[tier] - price * latency.idle(tier))]

    def latency(self) -> Latency:
        return Latency(self.seconds, self.max_batch)

    def scheduler(self, latency: Latency) -> Scheduler:
        """Return a new scheduler. Raises StartError if the policy is unknown."""
        return Scheduler(
            create(self.policy, self.tier_table, self.waiting_price),
            latency,
            devices=self.devices,
            max_batch=self.max_batch,
            queue_limit=self.queue_limit,
            weights=self.weights,
            escalations=Escalations(self.tier_table.escalations),
            price_per_s=self.waiting_price * ACCURACY_PER_S,
        )


class Recorder:
    """Writes the event log. If writing fails, recording ends and serving continues."""

    def __init__(self, path: Path) -> None:
        """Create or overwrite the file. Raises StartError if that fails."""
        self._path = path
        try:
            self._file = path.open("wb", buffering=BUFFER)
        except OSError as error:
            raise StartError(f"cannot write the event log {path}: {error.strerror}") from None

    def begin(self, setup: Setup) -> None:
        """Write the first line."""
        self._write(setup.model_dump())

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """Write one event and the actions that it caused."""
        if not self._file.closed:
            self._write([_encode(event), [_encode(action) for action in actions]])

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        try:
            self._file.close()
        except OSError as error:
            self._failed(error)

    def _write(self, value: object) -> None:
        try:
            self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            self._failed(error)
            self._abandon()

    def _abandon(self) -> None:
        """Close the file. This retries to write the buffer, and closes even if that fails."""
        try:
            self._file.close()
        except OSError:
            log.debug("closing the event log %s failed", self._path)

    def _failed(self, error: OSError) -> None:
        log.warning("the event log %s ends: %s", self._path, error.strerror)


@dataclass(frozen=True)
class Difference:
    """The first event whose actions differ from those in the log."""

    line: int  # counted from 1
    event: str
    expected: str
    got: str


@dataclass(frozen=True)
class Replayed:
    """The result of replaying a log."""

    setup: Setup
    events: int  # replayed, the one that differs included
    difference: Difference | None


def replay(path: Path) -> Replayed:
    """Replay a log in a new scheduler, up to the first event whose actions differ.

    An incomplete last line, as of a server that was killed, is ignored. Raises PcaeError if the
    file is not an event log, StartError if its policy is unknown.
    """
    lines = _lines(path)
    _, first = next(lines, (1, None))
    try:
        setup = Setup.model_validate(first)
    except ValidationError as error:
        what = error.errors()[0]
        where = ".".join(map(str, what["loc"]))
        raise PcaeError(
            f"{path} is not an event log of this version: {where}: {what['msg']}"
        ) from None
    scheduler, events = setup.scheduler(setup.latency()), 0
    for number, line in lines:
        try:
            (kind, fields), expected = line
            event = _event(kind, fields)
        except (KeyError, TypeError, ValueError) as error:
            raise PcaeError(f"{path}, line {number} is not an event: {one_line(error)}") from None
        events += 1
        try:
            actions = scheduler.handle(event)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # such as the end of a batch that never started, or a time that is not a number
            raise PcaeError(
                f"{path}, line {number} contradicts an earlier line: {one_line(error)}"
            ) from error
        got = json.loads(json.dumps([_encode(action) for action in actions]))
        if got != expected:
            parts = (json.dumps(part) for part in ([kind, fields], expected, got))
            return Replayed(setup, events, Difference(number, *parts))
    return Replayed(setup, events, None)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield number and value of every complete line. Raises PcaeError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                if len(line) == MAX_LINE_BYTES:
                    raise ValueError(f"line {number} has more than {MAX_LINE_BYTES} bytes")
                if line.endswith(b"\n"):
                    yield number, parse_json(line)
    except OSError as error:
        raise PcaeError(f"cannot read the event log {path}: {error.strerror}") from None
    except ValueError as error:
        raise PcaeError(f"{path} is not an event log: {one_line(error)}") from None


def _encode(part: Event | Action) -> tuple[str, dict[str, Any]]:
    """Return the class name and the fields of an event or action."""
    return type(part).__name__, asdict(part)


def _event(kind: str, fields: dict[str, Any]) -> Event:
    """Return the event that `_encode` was given."""
    if kind == "Arrived":
        request = fields["request"]
        tiers = tuple(request["tiers"])
        return Arrived(fields["now_s"], Request(**(request | {"tiers": tiers})))
    return _EVENTS[kind](**fields)
