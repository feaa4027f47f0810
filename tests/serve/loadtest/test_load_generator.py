"""The load generator against a real socket."""

import pytest

from pcae_serve.errors import StartError
from pcae_serve.loadtest.load_generator import send
from tests.support.scripted_server import ScriptedServer
from tests.support.stand_in import reserved_port


def test_times_count_from_when_the_first_request_was_due() -> None:
    request = b"POST / HTTP/1.1\r\nContent-Length: 12\r\n\r\nanswer 0.001"
    with ScriptedServer() as server:
        responses = send("127.0.0.1", server.port, [request] * 3, [0.0, 0.0, 0.2], 3, 60.0)
    assert (responses.status == 200).all()
    assert (responses.sent_s >= [0, 0, 0.2]).all()
    assert (responses.ended_s > responses.sent_s).all()
    assert not +responses.faults


def test_no_server_is_an_error_before_anything_is_sent() -> None:
    with reserved_port() as (_, port), pytest.raises(StartError, match="cannot connect to"):
        send("127.0.0.1", port, [b"x"], [0.0], 1, 1.0)
