"""The server around the application: when a drain ends."""

import asyncio
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pcae_serve.api import server
from pcae_serve.api.server import Server
from pcae_serve.settings import Settings


class StandIn:
    """A service with as many unanswered requests as a test says."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.unanswered, self.draining, self.refused = 0, False, False

    def drain(self) -> None:
        self.draining = True

    def refuse_unanswered(self) -> None:
        self.refused = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now_s)
    return clock


def exits(tested: Server) -> bool:
    return asyncio.run(tested.on_tick(1))


def draining(service: StandIn) -> Server:
    tested = Server(lambda *_: None, service)  # type: ignore[arg-type]
    assert not exits(tested)
    tested.handle_exit(signal.SIGTERM, None)
    assert service.draining
    return tested


def test_a_drain_ends_with_the_last_request_if_no_connection_is_open(
    clock: SimpleNamespace,
) -> None:
    service = StandIn()
    service.unanswered = 1
    tested = draining(service)
    assert not exits(tested)
    service.unanswered = 0
    assert exits(tested)
    assert not service.refused


def test_idle_connections_are_kept_for_a_moment(clock: SimpleNamespace) -> None:
    """Their clients may have sent a request just before they notice the drain."""
    tested = draining(StandIn())
    tested.server_state.connections.add(object())  # type: ignore[arg-type]
    assert not exits(tested)
    clock.now_s += 1.1 * server.IDLE_S
    assert exits(tested)


def test_a_drain_is_bounded(clock: SimpleNamespace) -> None:
    service = StandIn(drain_s=5)
    service.unanswered = 1
    tested = draining(service)
    clock.now_s += 4.9
    assert not exits(tested)
    clock.now_s += 0.2
    assert exits(tested)
    assert service.refused


def test_a_second_signal_exits_now() -> None:
    tested = draining(StandIn())
    tested.server_state.connections.add(object())  # type: ignore[arg-type]
    tested.handle_exit(signal.SIGTERM, None)
    assert exits(tested)
    assert tested.force_exit
