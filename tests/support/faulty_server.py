"""A server process whose engine fails on request (see `faulty`)."""

import contextlib
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from tests.support.bundles import write_bundle
from tests.support.images import image_bytes
from tests.support.server_process import ANY_PORT, ready

ROOT = Path(__file__).parents[2]


ADMIN = "an-admin-key-of-some-length"


class Running:
    """A server, its process and its log so far."""

    def __init__(
        self, url: str, process: subprocess.Popen[str], log: Path, copy: threading.Thread
    ) -> None:
        self.url, self.process, self._log, self._copy = url, process, log, copy
        self.host, self.port = "127.0.0.1", int(url.rsplit(":", 1)[1])
        # one for all, since making one reads certificates; it keeps no connection
        self._client = httpx2.Client(timeout=60, limits=httpx2.Limits(max_keepalive_connections=0))

    @property
    def log(self) -> str:
        return self._log.read_text()

    def log_at_the_end(self) -> str:
        """Wait until the server has ended; return all that it has logged."""
        self.process.wait(timeout=60)
        self._copy.join()
        return self.log

    def ask(
        self, level: int = 200, query: str = "budget_ms=5000", **more: object
    ) -> httpx2.Response:
        url = f"{self.url}/classify?{query}"
        return self._client.post(url, content=image_bytes(level), **more)  # type: ignore[arg-type]

    def get(self, path: str) -> httpx2.Response:
        return self._client.get(f"{self.url}{path}")

    def until(self, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
        give_up_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < give_up_s, self.log
            time.sleep(0.02)

    def close(self) -> None:
        self._client.close()

    def raw(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=60)


@contextmanager
def serving(
    tmp_path: Path, *flags: str, limits: dict[int, int] | None = None, **environment: str
) -> Iterator[Running]:
    log = tmp_path / "server.log"
    folder = tmp_path / "served"
    if not folder.exists():
        write_bundle(folder)
    command = [sys.executable, "-m", "tests.support.faulty", "--bundle", str(folder)]
    command += [*ANY_PORT, "--cache-dir", str(tmp_path / "cache"), "--profile-s", "0.2"]

    def limited() -> None:
        for which, most in (limits or {}).items():
            resource.setrlimit(which, (most, most))

    with log.open("w", buffering=1) as file:
        process = subprocess.Popen(
            [*command, *flags],
            stderr=subprocess.PIPE if limits else file,  # a limit may forbid it to write files
            text=True,
            cwd=ROOT,
            env={"RETRY_S": "0.3"} | environment,
            preexec_fn=limited,
        )
        copy = threading.Thread(target=file.writelines, args=(process.stderr or (),))
        copy.start()
        with (
            ready(process, log) as url,
            contextlib.closing(Running(url, process, log, copy)) as running,
        ):
            yield running
        copy.join()
        if process.stderr is not None:
            process.stderr.close()
