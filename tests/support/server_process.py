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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(*flags: str, cache: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running pcae-serve; its address once it is ready."""
    port = free_port()
    command = (*COMMAND, "--port", str(port), "--cache-dir", str(cache), *flags)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with ready(process, f"http://127.0.0.1:{port}") as url:
        yield url, process


@contextmanager
def ready(process: subprocess.Popen[str], url: str) -> Iterator[str]:
    """Wait until the server that `process` starts takes requests; end it afterwards."""
    try:
        for _ in range(600):
            try:
                if httpx2.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx2.TransportError:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        else:
            pytest.fail(f"{url} is not ready after 30 s")
        yield url
    finally:
        process.kill()
        process.communicate()
