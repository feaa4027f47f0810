"""A stand-in for the server that answers as the test says, and a port where no one listens."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: Flags of a server with the simulated engine that starts quickly.
SIMULATED = ("--backend", "simulated", "--profile-s", "0.1")


ANSWER: dict[str, Any] = {
    "predictions": [{"label": "dim", "index": 1, "probability": 0.9}],
    "tier": "fast",
    "keep_ratio": 0.6,
    "tokens": [9, 5, 3],
    "reason": "the request names this tier",
    "budget_ms": 1,
    "met_budget": True,
    "timings_ms": {"decode": 1, "queue": 1, "compute": 1, "total": 3},
}


@contextmanager
def reserved_port() -> Iterator[tuple[socket.socket, int]]:
    """A bound socket that does not listen, and its port: no other process can take it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound, bound.getsockname()[1]


@contextmanager
def stand_in(
    talk: Callable[[BaseHTTPRequestHandler], None], bound: socket.socket | None = None
) -> Iterator[tuple[str, list[int]]]:
    """A server that answers POSTs as `talk` does: its address, and its connections' ports.

    bound: the socket to listen on; None takes a free port.
    """
    connections = list[int]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            connections.append(self.client_address[1])
            super().setup()

        def do_POST(self) -> None:
            talk(self)

        def log_message(self, *_: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:
            """Ignore clients that leave."""

    listener = Listener(("127.0.0.1", 0), Handler, bind_and_activate=bound is None)
    if bound is not None:
        listener.socket.close()
        listener.socket, listener.server_address = bound, bound.getsockname()
        listener.server_activate()
    listener.daemon_threads = True
    threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.server_address[1]}", connections
    finally:
        listener.shutdown()
        listener.socket.close()
