"""Connections on a real socket: requests that are not valid HTTP, pipelining, timeouts, limits."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pcae_serve.api import connection
from tests.support.apps import wait_until
from tests.support.http_server import (
    LAST,
    Held,
    HttpServer,
    bodies,
    http_server,
    read_all,
    statuses,
)

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
END = b"0\r\n\r\n"  # of a chunked body


def get(line: bytes, *headers: bytes) -> bytes:
    """Return a request without a body: its first line as it is, and its headers."""
    return b"\r\n".join([line, *headers, b"", b""])


def post(*headers: bytes, body: bytes = b"", path: bytes = b"/a") -> bytes:
    return get(b"POST " + path + b" HTTP/1.1", b"Host: x", *headers) + body


def chunked(body: bytes) -> bytes:
    return post(CHUNKED, body=body)


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with http_server() as server:
        yield server


# what is refused: one answer, and nothing after it is taken for a request

REFUSED = {
    "content length and chunks": (400, post(b"Content-Length: 5", CHUNKED, body=END)),
    "chunks and content length": (400, post(CHUNKED, b"Content-Length: 5", body=END)),
    "another coding": (400, post(b"Transfer-Encoding: xchunked", body=END)),
    "gzip and chunks": (400, post(b"Transfer-Encoding: gzip, chunked", body=END)),
    "identity": (400, post(b"Transfer-Encoding: identity", b"Content-Length: 0")),
    "chunks, then identity": (400, post(b"Transfer-Encoding: chunked, identity", body=END)),
    "chunks twice": (400, post(CHUNKED, CHUNKED, body=END)),
    "chunks in HTTP/1.0": (400, get(b"POST /a HTTP/1.0", CHUNKED) + END),
    "two lengths": (400, post(b"Content-Length: 5", b"Content-Length: 6", body=b"abcdef")),
    "a length twice": (400, post(b"Content-Length: 5", b"Content-Length: 5", body=b"abcde")),
    "a list of lengths": (400, post(b"Content-Length: 5, 5", body=b"abcde")),
    "a signed length": (400, post(b"Content-Length: +5", body=b"abcde")),
    "a negative length": (400, post(b"Content-Length: -5", body=b"abcde")),
    "a length of 30 digits": (400, post(b"Content-Length: " + b"9" * 30, body=b"abc")),
    "an empty length": (400, post(b"Content-Length: ")),
    "a space before the colon": (400, post(b"Transfer-Encoding : chunked", body=END)),
    "a folded header": (400, post(b"X: a", b" b")),
    "bare LF": (400, b"GET /a HTTP/1.1\nHost: x\n\n"),
    "bare LF before a header": (400, post(b"X: a\nY: b")),
    "bare CR": (400, post(b"X: a\rTransfer-Encoding: chunked", body=END)),
    "NUL": (400, post(b"X: a\0b")),
    "a control character": (400, post(b"X: a\x1bb")),
    "a header name with a parenthesis": (400, post(b"X(: a")),
    "a header name beyond ASCII": (400, post(b"X\xe9: a")),
    "an empty header name": (400, post(b": a")),
    "a header without a colon": (400, post(b"abc")),
    "no Host": (400, get(b"GET /a HTTP/1.1")),
    "two Hosts": (400, post(b"Host: y")),
    "a Host with a path": (400, get(b"GET /a HTTP/1.1", b"Host: x/y")),
    "the preface of HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/2.0": (400, get(b"GET /a HTTP/2.0", b"Host: x")),
    "HTTP/0.9": (400, get(b"GET /a HTTP/0.9")),
    "HTTP/1.2": (400, get(b"GET /a HTTP/1.2", b"Host: x")),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)),
    "an unknown method": (400, get(b"FOO /a HTTP/1.1", b"Host: x")),
    "a method with NUL": (400, get(b"G\0T /a HTTP/1.1", b"Host: x")),
    "CONNECT": (400, get(b"CONNECT x:443 HTTP/1.1", b"Host: x")),
    "an asterisk": (400, get(b"OPTIONS * HTTP/1.1", b"Host: x")),
    "a relative path": (400, get(b"GET a HTTP/1.1", b"Host: x")),
    "a fragment": (400, get(b"GET /a#b HTTP/1.1", b"Host: x")),
    "a path beyond ASCII": (400, get(b"GET /\xff HTTP/1.1", b"Host: x")),
    "a query beyond ASCII": (400, get(b"GET /?\xff HTTP/1.1", b"Host: x")),
    "a control character in the path": (400, get(b"GET /\x01 HTTP/1.1", b"Host: x")),
    "a space in the path": (400, get(b"GET /a b HTTP/1.1", b"Host: x")),
    "a user in the address": (400, get(b"GET http://u@h/a HTTP/1.1", b"Host: x")),
    "a target of 9 kB": (414, get(b"GET /?" + b"x" * 9000 + b" HTTP/1.1", b"Host: x")),
    "a target of 70 kB": (414, get(b"GET /?" + b"x" * 70_000 + b" HTTP/1.1", b"Host: x")),
    "101 headers": (431, post(*[b"a: b"] * 100)),
    "10,000 headers": (431, post(*[b"a: b"] * 10_000)),
    "a header of 40 kB": (431, post(b"a: " + b"b" * 40_000)),
    "a header name of 40 kB": (431, post(b"a" * 40_000 + b": b")),
    "empty lines only": (431, b"\r\n" * 20_000),
    "a negative chunk": (400, chunked(b"-1\r\na\r\n" + END)),
    "a chunk of 2^68 bytes": (400, chunked(b"1FFFFFFFFFFFFFFFF\r\nabc")),
    "a chunk without its end": (400, chunked(b"1\r\nab" + END)),
    "a chunk's size with bare LF": (400, chunked(b"1\na\r\n" + END)),
    "a chunk's size with a space": (400, chunked(b"1 \r\na\r\n" + END)),
    "extensions of 30 kB": (413, chunked(b"1;" + b"x" * 30_000 + b"\r\na\r\n" + END)),
    "trailers of 30 kB": (413, chunked(b"0\r\nX: " + b"y" * 30_000 + b"\r\n\r\n")),
    "6,000 trailers": (431, chunked(b"0\r\n" + b"X: y\r\n" * 6000 + b"\r\n")),
    "5,000 chunks of one byte": (413, chunked(b"1\r\na\r\n" * 5000 + END)),
    "a chunk of 2^64 - 1 bytes": (413, chunked(b"FFFFFFFFFFFFFFFF\r\nabc")),
    "a chunk of 1 TB after others": (413, chunked(b"3\r\nabc\r\nE8D4A51000;x=y\r\nabc")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_http_gets_a_problem_document_and_the_connection_closes(
    server: HttpServer, case: str
) -> None:
    status, data = REFUSED[case]
    received = server.exchange(data, GET + LAST)
    assert statuses(received) == [status], received
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert b"application/problem+json" in head
    document = json.loads(body)
    assert document["status"] == status
    codes = {400: "malformed-http", 413: "too-much-framing", 414: "target-too-long"}
    code = (
        "too-large" if "2^64 -" in case or "TB" in case else codes.get(status, "headers-too-large")
    )
    assert document["type"] == f"urn:pcae-serve:{code}"
    assert "\n" not in document["detail"]


def test_a_refusal_before_the_application_has_a_request_id_and_is_logged(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        received = server.exchange(b"GET /v2/x HTTP/1.1\r\nX: \0\r\n\r\n")
    assert b"x-request-id: " in received
    [record] = [each for each in caplog.records if each.name == "pcae_serve.access"]
    assert record.getMessage().startswith("- /v2/x 400: the request is not valid HTTP/1.1")
    assert json.loads(received.partition(b"\r\n\r\n")[2]).keys() == {"error"}  # the form of /v2
    assert record.__dict__["request_id"].encode() in received


# what is accepted: the answer, and then the next request's

H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA")
ACCEPTED: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a path with a query": (
        get(b"GET /a?b=c HTTP/1.1", b"Host: x"),
        {"path": "/a", "query": "b=c"},
    ),
    "spaces around values": (
        get(b"POST /a HTTP/1.1", b"Host:  x \t", b"Content-Length: 5  ") + b"abcde",
        {"body": 5, "headers": [["host", "x"], ["content-length", "5"]]},
    ),
    "spaces around a coding": (
        post(b"Transfer-Encoding:\tchunked ", body=b"2\r\nab\r\n" + END),
        {"body": 2},
    ),
    "empty lines before it": (b"\r\n\r\n" + GET, {"path": "/a"}),
    "a body": (post(b"Content-Length: 5", body=b"abcde"), {"body": 5}),
    "no body": (post(b"Content-Length: 0"), {"body": 0}),
    "chunks": (chunked(b"2\r\nab\r\n3;x=y\r\ncde\r\n" + END), {"body": 5}),
    "capitals": (post(b"TRANSFER-ENCODING: CHUNKED", body=b"2\r\nab\r\n" + END), {"body": 2}),
    "empty lines in a chunk": (chunked(b"8\r\n\r\n\r\n\r\n\r\n\r\n" + END), {"body": 8}),
    "900 chunks of one byte": (chunked(b"1\r\na\r\n" * 900 + END), {"body": 900}),
    "h2c with a body, as Java sends": (
        post(*H2C, b"Content-Length: 5", body=b"abcde"),
        {"body": 5},
    ),
    "h2c with chunks": (post(*H2C, CHUNKED, body=b"5\r\nabcde\r\n" + END), {"body": 5}),
    "h2c": (get(b"GET /a HTTP/1.1", b"Host: x", *H2C), {"path": "/a"}),
    "a web socket": (post(b"Connection: Upgrade", b"Upgrade: websocket"), {"path": "/a"}),
    "escapes in the path": (get(b"GET /%41%00 HTTP/1.1", b"Host: x"), {"path": "/A\0"}),
    "a query of 7 kB": (get(b"GET /?" + b"x" * 7000 + b" HTTP/1.1", b"Host: x"), {"path": "/"}),
    "99 headers": (post(*[b"a: b"] * 99), {"path": "/a"}),
}


@pytest.mark.parametrize("case", ACCEPTED)
@pytest.mark.parametrize("whole", [True, False])
def test_valid_http_is_answered_and_so_is_the_next_request(
    server: HttpServer, case: str, whole: bool
) -> None:
    data, expected = ACCEPTED[case]
    middle = len(data) // 2
    parts = [data + LAST] if whole else [data[:middle], data[middle:] + LAST[:9], LAST[9:]]
    received = server.exchange(*parts)
    assert statuses(received) == [200, 200], received
    first, last = bodies(received)
    assert first.items() >= expected.items()
    assert (last["path"], last["body"]) == ("/last", 0)


def test_an_address_as_the_target_replaces_the_host(server: HttpServer) -> None:
    received = server.exchange(b"GET http://y:1/a HTTP/1.1\r\nHost: x\r\n\r\n" + LAST)
    first, _ = bodies(received)
    assert first["path"] == "/a"
    assert [each for each in first["headers"] if each[0] == "host"] == [["host", "y:1"]]


def test_trailers_are_not_headers(server: HttpServer) -> None:
    data = chunked(b"1\r\na\r\n0\r\nX-API-Key: k\r\n\r\n")
    first, _ = bodies(server.exchange(data + LAST))
    assert "x-api-key" not in dict(first["headers"])


@pytest.mark.parametrize(
    "head", [b"GET /a HTTP/1.0\r\n\r\n", b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]
)
def test_a_connection_that_the_client_ends_takes_no_further_request(
    server: HttpServer, head: bytes
) -> None:
    received = server.exchange(head + GET, GET)
    assert statuses(received) == [200]
    assert b"connection: close" in received


def test_requests_on_one_connection_are_answered_in_order(server: HttpServer) -> None:
    many = b"".join(
        post(b"Content-Length: %d" % i, body=b"x" * i, path=b"/%d" % i) for i in range(100)
    )
    answers = bodies(server.exchange(many + LAST))
    assert [(each["path"], each["body"]) for each in answers[:-1]] == [
        (f"/{i}", i) for i in range(100)
    ]


def test_the_client_is_asked_for_the_body_that_it_announces(server: HttpServer) -> None:
    with server.connect() as client:
        client.sendall(post(b"Expect: 100-continue", b"Content-Length: 3"))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc" + LAST)
        assert statuses(read_all(client)) == [200, 200]


def test_a_client_that_leaves_with_another_request_behind_is_noticed() -> None:
    held = Held()
    with http_server(held) as server, server.connect() as client:
        client.sendall(GET + GET)
        assert held.entered.wait(60)
        client.close()
        assert held.gone.wait(60)
        assert held.requests == 1


def test_a_client_that_closes_its_sending_side_counts_as_gone() -> None:
    held = Held()
    with http_server(held) as server, server.connect() as client:
        client.sendall(GET)
        assert held.entered.wait(60)
        client.shutdown(socket.SHUT_WR)
        assert held.gone.wait(60)
        assert read_all(client) == b""


def test_what_is_pipelined_is_not_parsed_before_its_turn_and_is_bounded() -> None:
    held = Held()
    with http_server(held) as server, server.connect() as client:
        client.setblocking(False)
        client.sendall(GET)
        assert held.entered.wait(60)
        sent, idle = 0, 0
        while idle < 20 and sent < 50_000_000:  # until the server reads no more
            try:
                sent, idle = sent + client.send(GET * 1000), 0
            except BlockingIOError:
                idle += 1
                time.sleep(0.01)
        [kept] = server.state.connections
        assert isinstance(kept, connection.Connection)
        assert len(kept._unparsed) <= 4 * connection.MAX_READ_BYTES
        assert held.requests == 1


def test_a_body_that_nobody_reads_may_still_arrive_before_the_next_request(
    server: HttpServer,
) -> None:
    early = post(b"Content-Length: 200000", path=b"/early")
    with server.connect() as client:
        client.sendall(early)
        while b"\r\n\r\n" not in client.recv(4096):
            pass
        client.sendall(b"x" * 200_000 + LAST)
        received = read_all(client)
        assert statuses(received) == [200]
        assert [each["path"] for each in bodies(received)][-1] == "/last"


def test_an_answer_that_closes_survives_a_body_that_is_still_being_sent(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reset would discard it: the server reads on for a while."""
    monkeypatch.setattr(connection, "LINGER_S", 60.0)
    head = (
        b"POST /early HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9000000\r\n\r\n"
    )
    with server.connect() as client:
        client.sendall(head)
        client.sendall(b"x" * 3_000_000)
        assert statuses(read_all(client)) == [200]


@pytest.mark.parametrize(
    ("timer", "data", "answers"),
    [
        ("HEAD_S", b"", []),
        ("HEAD_S", b"GET /a HT", []),
        ("LINGER_S", post(b"Content-Length: 9", path=b"/early"), [200]),
    ],
)
def test_connections_that_send_nothing_more_are_closed(
    server: HttpServer,
    monkeypatch: pytest.MonkeyPatch,
    timer: str,
    data: bytes,
    answers: list[int],
) -> None:
    monkeypatch.setattr(connection, timer, 0.1)
    assert statuses(server.exchange(data)) == answers


def test_the_next_request_has_as_long_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_server() as server, server.connect() as client:
        wait_until(lambda: bool(server.state.connections))
        monkeypatch.setattr(connection, "HEAD_S", 0.1)  # from the answer on
        client.sendall(GET + b"GET")
        assert statuses(read_all(client)) == [200]


def test_a_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "READ_S", 0.1)
    gone = threading.Event()

    async def until_gone(scope: Any, receive: Any, send: Any) -> None:
        leaves = asyncio.ensure_future(Held.disconnected(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not leaves.done():
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        gone.set()

    with http_server(until_gone) as server, server.connect() as client:
        client.sendall(GET)
        assert gone.wait(60)


def test_bodies_are_cut_off_when_they_stop_being_http(server: HttpServer) -> None:
    """The application reads the error: it answers, with its own headers and its own log."""
    received = server.exchange(chunked(b"5\r\nabcde\r\n"), b"zz\r\n" + GET)
    assert statuses(received) == [400]
    early = server.exchange(post(CHUNKED, path=b"/early", body=b"zz\r\n" + GET))
    assert statuses(early) == [200]
    assert b"connection: close" in early
