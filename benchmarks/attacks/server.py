"""The server under attack: its process on one core, its memory, its log."""

import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

READY_S = 180
SAMPLE_S = 0.2  # between two looks at the memory

_ANNOUNCED = re.compile(r"listening on http://[^:]+:(\d+),")
_READY = re.compile(r": ready: ")


class ServerProcess:
    """A running server. `peak_mb`: the largest memory seen, with its children."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, port: int) -> None:
        self.process, self.log, self.port = process, log, port
        self.peak_mb = 0.0
        self._stopped = threading.Event()
        self._watch = threading.Thread(target=self._watch_memory, daemon=True)
        self._watch.start()

    def memory_mb(self) -> float:
        """Return the proportional set size of the server and its descendants."""
        return sum(map(proportional_mb, family(self.process.pid)))

    def log_mb(self) -> float:
        return self.log.stat().st_size / 1e6

    def tracebacks(self) -> int:
        with self.log.open(errors="replace") as lines:
            return sum(line.startswith("Traceback") for line in lines)

    def stop(self) -> int | None:
        """Stop the server, and return its exit code; None if it had to be killed."""
        self._stopped.set()
        self._watch.join()
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def _watch_memory(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            self.peak_mb = max(self.peak_mb, self.memory_mb())


@contextmanager
def serving(
    source: Path,
    folder: Path,
    flags: Sequence[str],
    *,
    core: int | None,
    descriptors: int | None,
    python: str = sys.executable,
) -> Iterator[ServerProcess]:
    """Run the server of a source tree, with its cache and log in `folder`.

    core: the only one that it may use; None: all. descriptors: its limit of open files.
    """
    log = folder / "server.log"
    environment = {
        **os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [python, "-m", "pcae_serve", "--port", "0", "--cache-dir", str(folder / "cache")]

    def restrict() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *flags], env=environment, cwd=folder, stdout=output, stderr=output,
            preexec_fn=restrict,
        )  # fmt: skip
    server = None
    try:
        server = ServerProcess(process, log, _wait_until_ready(process, log))
        yield server
    finally:
        if server is not None:
            server.stop()
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> int:
    end_s = time.monotonic() + READY_S
    while True:
        text = log.read_text(errors="replace")
        port = _ANNOUNCED.search(text)
        if port and _READY.search(text):
            return int(port[1])
        if process.poll() is not None or time.monotonic() > end_s:
            raise SystemExit(f"the server did not start:\n{text[-2000:]}")
        time.sleep(0.1)


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    family = [pid]
    for member in family:
        try:
            tasks = list(Path(f"/proc/{member}/task").iterdir())
            for task in tasks:
                family += map(int, (task / "children").read_text().split())
        except (OSError, ValueError):
            continue  # it ended
    return family


def proportional_mb(pid: int) -> float:
    """Return the memory of a process; pages that n processes share count 1 / n each."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3
