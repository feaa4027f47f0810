"""An HTTP server on a thread; the "image" that a request carries says how to respond to it."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

from pcae_serve.errors import RequestError

FULL_MS = 20.0
#: Statuses of problem documents by code.
STATUSES = {error.code: error.status for error in RequestError.__subclasses__()}


def tier(name: str, top1: float, ms: float, **changes: Any) -> dict[str, Any]:
    """Return an entry of /tiers."""
    latency_ms = {"1": ms, "8": 4 * ms}
    quality = {"accuracy": {"top1": top1}, "agreement": None, "fidelity": None}
    return {"name": name, "dominated": False, "latency_ms": latency_ms} | quality | changes


TIERS: dict[str, Any] = {
    "bundle": "toy", "backend": "scripted", "backend_version": "1", "device": "cpu",
    "policy": "its-own", "answers": "classes", "labels": ["dark", "bright"],
    "tiers": [tier("fast", 0.6, 5.0), tier("full", 0.8, FULL_MS)],
}  # fmt: skip


class ScriptedServer:
    """Responds to a body `VERB NUMBER`.

    answer S    200 after S seconds
    close S     the same, and closes the connection
    gather N    200 once N + 1 requests have arrived; the very first one at once
    hang-up S   closes the connection without a response after S seconds
    CODE S      a problem document with this code after S seconds
    """

    def __init__(self) -> None:
        self.paths = list[str]()  # of POST requests
        self.connections = 0
        self.metrics_read = 0
        self.tiers: dict[str, Any] = TIERS
        self.not_ready = 0  # responses of /readyz that are still 503
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve)
        self._ready = threading.Event()

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        self._stop, self._arrived = asyncio.Event(), asyncio.Condition()
        listener = await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=1000)
        self.port = listener.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._ready.set()
        await self._stop.wait()
        listener.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._respond(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        if method == "GET":
            writer.write(_response(*self._get(path), "Connection: close\r\n"))
            return False
        async with self._arrived:
            self.paths.append(path)
            self._arrived.notify_all()
        length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
        verb, number = (await reader.readexactly(length)).decode().split()
        if verb == "gather":
            async with self._arrived:
                if len(self.paths) > 1:
                    await self._arrived.wait_for(lambda: len(self.paths) > int(number))
        else:
            await asyncio.sleep(float(number))
        answer = {"tier": "full", "met_budget": True, "predictions": [{"index": 1}]}
        match verb:
            case "answer" | "gather":
                writer.write(_response(200, answer))
            case "close":  # the client finds the connection closed when it uses it again
                writer.write(_response(200, answer | {"tier": "fast"}))
                return False
            case "hang-up":
                return False
            case code:
                problem = {"type": f"urn:pcae-serve:{code}", "detail": "as the test asked"}
                writer.write(_response(STATUSES[code], problem))
        return True

    def _get(self, path: str) -> tuple[int, Any]:
        if path == "/readyz" and self.not_ready:
            self.not_ready -= 1
            return 503, {"detail": "measuring latencies"}
        if path == "/metrics":
            seconds, self.metrics_read = self.metrics_read, self.metrics_read + 1
            return 200, (
                f'pcae_compute_seconds_total{{tier="fast"}} {seconds}.0\n'
                f'pcae_wasted_compute_seconds_total{{reason="late"}} {seconds / 4}\n'
            )
        return 200, self.tiers


def _response(status: int, content: Any, headers: str = "") -> bytes:
    body = content if isinstance(content, str) else json.dumps(content)
    head = f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body.encode()


def scripts(folder: Path, *bodies: str) -> Path:
    """Write a folder of "images", each a script for the server."""
    folder.mkdir(exist_ok=True)
    for i, body in enumerate(bodies):
        (folder / f"{i}.png").write_text(body)
    return folder
