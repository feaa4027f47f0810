"""A stand-in for the server that answers as the test says."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SIMULATED = ("--backend", "simulated", "--profile-s", "0.1")


ANSWER: dict[str, Any] = {
    "predictions": [{"label": "dim", "index": 1, "probability": 0.9}],
    "tier": "fast",
    "keep_ratio": 0.6,
    "tokens": [9, 5, 3],
    "reason": "asked for",
    "budget_ms": 1,
    "met_budget": True,
    "timings_ms": {"decode": 1, "queue": 1, "compute": 1, "total": 3},
}


@contextmanager
def stand_in(
    talk: Callable[[BaseHTTPRequestHandler], None], port: int = 0
) -> Iterator[tuple[str, list[int]]]:
    """A server that answers POSTs as `talk` does; its address, and its connections' ports."""
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
            """Clients may leave."""

    listener = Listener(("127.0.0.1", port), Handler)
    listener.daemon_threads = True
    threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.server_address[1]}", connections
    finally:
        listener.shutdown()
        listener.socket.close()
