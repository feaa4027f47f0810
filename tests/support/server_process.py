"""pcae-serve as a process with a real socket, on a port of the system's choice."""

import os
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
    """Run pcae-serve; yield its address and process once it is ready."""
    command = (*COMMAND, *ANY_PORT, "--cache-dir", str(cache), *flags)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with ready(process) as url:
        yield url, process


@contextmanager
def ready(process: subprocess.Popen[str], log: Path | None = None) -> Iterator[str]:
    """Yield the address of a server with ANY_PORT once it is ready; kill `process` afterwards.

    log: the file that its standard error goes to; None: a pipe.
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
        process.communicate()


def _announced(process: subprocess.Popen[str], log: Path | None, deadline_s: float) -> str:
    """Return the address that the server logs."""
    text = ""
    while (match := _ANNOUNCED.search(text)) is None:
        ended = process.poll() is not None
        if log is None:
            assert process.stderr is not None
            # no more than needed: the rest is left to `communicate`
            byte = os.read(process.stderr.fileno(), 1)
            ended, text = not byte, text + byte.decode("latin-1")
        else:
            text = log.read_text()
            time.sleep(0.02)
        if _ANNOUNCED.search(text) is None:
            assert not ended, text
            assert time.monotonic() < deadline_s, text
    return match[1]
