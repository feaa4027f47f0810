"""The event log: what a live scheduler was told and did, on file, and the proof by doing it again.

    line 1      the setup: all it takes to build the same machine
    every other one event, and the actions that came of it

JSON, one value a line; floats are written so that they read back to the bit. It knows the scheduler
and files; it knows no service, and no clock but the times inside the events.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pcae_serve.errors import PcaeError, StartError, one_line
from pcae_serve.frozen_model import FrozenModel
from pcae_serve.scheduling.events import (
    Action,
    Arrived,
    ClientLeft,
    Decoded,
    DeviceLost,
    Done,
    Event,
    TaskSubmitted,
    TierDisabled,
    Timer,
)
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable
from pcae_serve.version import __version__

log = logging.getLogger(__name__)

#: Bytes held back before they are written: a write now and then, not one an event.
BUFFER = 1 << 16

_EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (Arrived, Decoded, ClientLeft, TierDisabled, TaskSubmitted, DeviceLost, Timer, Done)
}


class Setup(FrozenModel):
    """All that decides what a scheduler does with its events. The server builds its own from it."""

    event_log: Literal[1] = 1  # version of the format
    pcae_serve: str = __version__  # another version may decide otherwise
    policy: str
    tier_table: TierTable
    seconds: list[dict[int, Seconds]]  # by tier and batch size, as measured
    max_batch: int
    queue_limit: int
    devices: int

    def latency(self) -> Latency:
        return Latency(self.seconds, self.max_batch)

    def scheduler(self, latency: Latency) -> Scheduler:
        """A fresh machine. Raises StartError for an unknown policy."""
        return Scheduler(
            create(self.policy, self.tier_table),
            latency,
            devices=self.devices,
            max_batch=self.max_batch,
            queue_limit=self.queue_limit,
        )


class Recorder:
    """Writes the log. It is no reason to stop serving: where writing fails, recording ends."""

    def __init__(self, path: Path) -> None:
        """Begin the file anew. Raises StartError where that cannot be done."""
        self._path = path
        try:
            self._file = path.open("wb", buffering=BUFFER)
        except OSError as error:
            raise StartError(f"the event log {path} cannot be written: {error.strerror}") from None

    def begin(self, setup: Setup) -> None:
        """The first line."""
        self._write(setup.model_dump())

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """One event, and what came of it."""
        if not self._file.closed:
            self._write([_told(event), [_told(action) for action in actions]])

    def close(self) -> None:
        """Write what is held back."""
        try:
            self._file.close()
        except OSError as error:
            self._failed(error)

    def _write(self, value: object) -> None:
        try:
            self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            self._failed(error)
            self._give_up()

    def _give_up(self) -> None:
        """Closing tries once more to write what is held back, and closes whether it can or not."""
        try:
            self._file.close()
        except OSError:
            log.debug("the event log %s closes with an error", self._path)

    def _failed(self, error: OSError) -> None:
        log.warning("the event log %s ends here: %s", self._path, error.strerror)


@dataclass(frozen=True)
class Difference:
    """The first event from which something else came than in the log."""

    line: int  # of the file, the first being 1
    event: str
    expected: str
    got: str


@dataclass(frozen=True)
class Replayed:
    """How a log went through a fresh machine."""

    setup: Setup
    events: int  # replayed, that of the difference included
    difference: Difference | None


def replay(path: Path) -> Replayed:
    """Give a fresh machine the events of a log, up to the first that has other actions.

    A last line cut short, as by a server that was killed, is left out.
    Raises PcaeError where the file is no event log, StartError for an unknown policy.
    """
    lines = _lines(path)
    _, first = next(lines, (1, None))
    try:
        setup = Setup.model_validate(first)
    except ValidationError as error:
        what = error.errors()[0]
        where = ".".join(map(str, what["loc"]))
        raise PcaeError(f"{path} is no event log of this version: {where}: {what['msg']}") from None
    machine, events = setup.scheduler(setup.latency()), 0
    for number, line in lines:
        try:
            (kind, fields), expected = line
            event = _event(kind, fields)
        except (KeyError, TypeError, ValueError) as error:
            raise PcaeError(f"{path}, line {number}, is no event: {one_line(error)}") from None
        events += 1
        try:
            actions = machine.handle(event)
        except (IndexError, ValueError) as error:  # the end of a batch that was never begun
            raise PcaeError(
                f"{path}, line {number}, does not follow from those before: {one_line(error)}"
            ) from error
        got = json.loads(json.dumps([_told(action) for action in actions]))
        if got != expected:
            told = (json.dumps(part) for part in ([kind, fields], expected, got))
            return Replayed(setup, events, Difference(number, *told))
    return Replayed(setup, events, None)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of every whole line. Raises PcaeError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield number, json.loads(line)
    except OSError as error:
        raise PcaeError(f"the event log {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PcaeError(f"{path} is no event log: {one_line(error)}") from None


def _told(part: Event | Action) -> tuple[str, dict[str, Any]]:
    """An event or action as JSON can say it: its name and its fields."""
    return type(part).__name__, asdict(part)


def _event(kind: str, fields: dict[str, Any]) -> Event:
    """The event that `_told` told of."""
    if kind == "Arrived":
        request = fields["request"]
        tiers = tuple(request["tiers"])
        return Arrived(fields["now_s"], Request(**(request | {"tiers": tiers})))
    return _EVENTS[kind](**fields)
