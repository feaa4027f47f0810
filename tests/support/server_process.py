"""pcae-serve as a process with a real socket."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

COMMAND = (sys.executable, "-m", "pcae_serve")
READY_S = 120  # a start takes 2 s on an idle machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(*flags: str, cache: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run pcae-serve on a free port; yield its address and process once it is ready."""
    port = free_port()
    command = (*COMMAND, "--port", str(port), "--cache-dir", str(cache), *flags)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with ready(process, f"http://127.0.0.1:{port}") as url:
        yield url, process


@contextmanager
def ready(process: subprocess.Popen[str], url: str) -> Iterator[str]:
    """Wait until the server that `process` starts is ready; kill it afterwards."""
    deadline_s = time.monotonic() + READY_S
    try:
        while time.monotonic() < deadline_s:
            try:
                if httpx2.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx2.TransportError:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        else:
            pytest.fail(f"{url} is not ready after {READY_S} s")
        yield url
    finally:
        process.kill()
        process.communicate()
