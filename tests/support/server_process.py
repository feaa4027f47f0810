"""pcae-serve as a process with a real socket, on a port of the system's choice."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

COMMAND = (sys.executable, "-m", "pcae_serve")
#: A port that no other process can take first: the server selects it, and logs its address.
ANY_PORT = ("--port", "0")
READY_S = 120  # a start takes 2 s on an idle machine

_ANNOUNCED = re.compile(r"listening on (http://\S+),")


@contextmanager
def server(*flags: str, cache: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run pcae-serve, which logs to `log_of(cache)`; yield its address and process when ready."""
    command = (*COMMAND, *ANY_PORT, "--cache-dir", str(cache), *flags)
    log = log_of(cache)
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, text=True)
    with ready(process, log) as url:
        yield url, process


def log_of(cache: Path) -> Path:
    """Return the file next to the folder `cache` that a server logs to."""
    return cache.with_name(f"{cache.name}.log")


@contextmanager
def ready(process: subprocess.Popen[str], log: Path) -> Iterator[str]:
    """Yield the address of a server with ANY_PORT once it is ready; kill `process` afterwards.

    log: the file that its standard error goes to. A pipe that nobody reads would be full after
    some hundred requests, and the server would wait.
    """
    deadline_s = time.monotonic() + READY_S
    try:
        url = _announced(process, log, deadline_s)
        while httpx2.get(f"{url}/readyz", timeout=READY_S).status_code != 200:
            assert time.monotonic() < deadline_s, f"{url} is not ready after {READY_S} s"
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def _announced(process: subprocess.Popen[str], log: Path, deadline_s: float) -> str:
    """Return the address that the server logs."""
    while True:
        ended = process.poll() is not None
        text = log.read_text()
        if match := _ANNOUNCED.search(text):
            return match[1]
        assert not ended, text
        assert time.monotonic() < deadline_s, text
        time.sleep(0.02)
