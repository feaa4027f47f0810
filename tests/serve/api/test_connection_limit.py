"""More connections than the server may have."""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from pcae_serve.api.connection_limit import AcceptErrors, ConnectionLimit
from tests.support.apps import wait_until
from tests.support.faulty_server import serving
from tests.support.http_server import Held, bodies, http_server, read_all, statuses

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
PROBE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


def ask(client: socket.socket, request: bytes = GET) -> int:
    client.sendall(request)
    received = b""
    while not received.endswith(b"}"):
        received += client.recv(65_536)
    return statuses(received)[0]


def test_the_longest_idle_connection_makes_room() -> None:
    with http_server(limit=ConnectionLimit(3)) as server, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(server.connect()) for _ in range(3))
        assert [ask(each) for each in (first, second, third, first)] == [200] * 4
        fourth = stack.enter_context(server.connect())
        assert ask(fourth) == 200
        assert read_all(second) == b""  # closed
        assert [ask(each) for each in (first, third, fourth)] == [200] * 3


def test_connections_that_send_no_request_are_the_first_to_go() -> None:
    with http_server(limit=ConnectionLimit(2)) as server, server.connect() as kept:
        assert ask(kept) == 200
        silent = [server.connect() for _ in range(2)]
        with server.connect() as other:
            assert ask(other) == 200
        for each in silent:
            each.close()


def test_connections_whose_request_is_answered_make_room_although_its_body_is_missing() -> None:
    early = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with http_server(limit=ConnectionLimit(2)) as server, contextlib.ExitStack() as stack:
        answered = [stack.enter_context(server.connect()) for _ in range(2)]
        assert [ask(each, early) for each in answered] == [200, 200]
        assert ask(stack.enter_context(server.connect())) == 200
        assert read_all(answered[0]) == b""


def test_if_all_are_busy_probes_get_through_and_others_get_503() -> None:
    held = Held()
    limit = ConnectionLimit(1, reserve=8)
    with http_server(held, limit) as server, server.connect() as busy:
        busy.sendall(GET)
        assert held.entered.wait(60)
        with server.connect() as refused:
            refused.sendall(GET)
            received = read_all(refused)
            assert statuses(received) == [503]
            assert bodies(received)[0]["type"] == "urn:pcae-serve:too-many-connections"
            assert b"retry-after: 1" in received
            assert b"connection: close" in received
        with server.connect() as probe:
            probe.sendall(PROBE)
            wait_until(lambda: held.requests == 2)  # the other one is still in progress
            held.open.set()
            received = read_all(probe)
            assert statuses(received) == [200]
            assert b"connection: close" in received
        assert held.requests == 2


class Idle:
    """A connection that notes that it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def close_idle(self) -> None:
        self.closed = True


def test_surplus_connections_are_bounded_and_the_silent_ones_make_room() -> None:
    limit = ConnectionLimit(2, reserve=8)
    busy = [Idle(), Idle()]
    for each in busy:
        assert limit.add(each)
        limit.set_busy(each)
    silent = [Idle() for _ in range(10)]
    assert all(limit.add(each) for each in silent)
    assert [each.closed for each in silent] == [True] * 8 + [False] * 2
    assert all(limit.is_surplus(each) for each in silent[-2:])
    for each in silent[-2:]:
        limit.set_busy(each)
    assert not limit.add(Idle())
    limit.remove(busy[0])
    assert limit.add(last := Idle())
    assert not limit.is_surplus(last)


def test_errors_of_accept_are_one_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    handler = AcceptErrors()
    message = "socket.accept() out of system resource"
    for _ in range(2000):
        error = OSError(errno.EMFILE, "Too many open files")
        handler(loop, {"message": message, "exception": error})
    [record] = caplog.records
    assert record.getMessage() == "cannot accept connections: Too many open files"
    assert record.exc_info is None
    with caplog.at_level(logging.ERROR):
        handler(loop, {"message": "another", "exception": ValueError("x")})
    assert "another" in caplog.text
    loop.close()


def test_idle_connections_beyond_the_descriptors_cost_nobody_an_answer(tmp_path: Path) -> None:
    limits = {resource.RLIMIT_NOFILE: 64}
    with serving(tmp_path, limits=limits) as running:
        idle: list[Any] = [running.raw() for _ in range(300)]
        assert running.get("/livez").status_code == 200
        assert running.ask().status_code == 200
        for each in idle:
            each.close()
        running.process.terminate()
        log = running.log_at_the_end()
    assert "Traceback" not in log
    assert log.count("the limit of 32 connections is reached") == 1
    assert "cannot accept" not in log
