"""CPU time that the server takes per request, and latency that it adds, of two source trees.

    git worktree add /tmp/before b001ff6
    python benchmarks/http_cpu.py /tmp/before [AFTER] [--rounds 30] [--requests 300] [--json FILE]

BEFORE and AFTER are folders that hold the package `pcae_serve`; AFTER is this one by default. Both
servers run at the same time, with the simulated engine, pinned to one core; the client has another.
Only one receives requests at a time, on a kept connection, one after the other. A round is a block
of requests to each, in random order. Reported are medians of the rounds (quartiles over the
rounds), and as `ratio` those of after / before within a round:

    cpu       CPU time of all the server's threads per request, in microseconds
    latency   from the first byte sent to the last one received, in milliseconds
    added     latency less decoding, queueing and compute, as the answer states them

Latency means something only on a machine that is idle otherwise.
"""

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "pcae_serve" / "sample.png"
PATHS = {"/livez": "GET", "/classify?tier=fast&budget_ms=5000": "POST"}
QUANTITIES = {"cpu": "us", "latency": "ms", "added": "ms"}


class Server:
    """A running server, its process and a kept connection to it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process, self._port = process, port
        self._connection = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def cpu_s(self) -> float:
        """Return the CPU time of all threads, to the nanosecond."""
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def ask(self, request: bytes) -> tuple[int, bytes, float]:
        """Send a request. Return status, body and milliseconds."""
        begin_s = time.perf_counter()
        self._connection.sendall(request)
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._read()
        length = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", received)[1])  # type: ignore[index]
        while len(received) < end + 4 + length:
            received += self._read()
        return int(received[9:12]), received[end + 4 :], (time.perf_counter() - begin_s) * 1e3

    def measure(self, request: bytes, count: int) -> dict[str, float]:
        """Send a request `count` times; return each quantity's value per request."""
        latency_ms, added_ms = list[float](), list[float]()
        begin_s = self.cpu_s()
        for _ in range(count):
            status, body, took_ms = self.ask(request)
            if status != 200:
                sys.exit(f"port {self._port}: {status} {body.decode()}")
            stages = json.loads(body).get("timings_ms", {})
            own_ms = sum(stages.get(name, 0.0) for name in ("decode", "queue", "compute"))
            latency_ms.append(took_ms)
            added_ms.append(took_ms - own_ms)
        cpu_us = (self.cpu_s() - begin_s) / count * 1e6
        return {"cpu": cpu_us, "latency": median(latency_ms), "added": median(added_ms)}

    def _read(self) -> bytes:
        part = self._connection.recv(65_536)
        if not part:
            sys.exit(f"port {self._port}: the server closed the connection")
        return part


@contextmanager
def serving(tree: Path, core: int, cache: str) -> Iterator[Server]:
    """Run the server of a source tree on one core until the block ends."""
    if not (tree / "pcae_serve" / "__main__.py").exists():
        sys.exit(f"{tree} does not hold pcae_serve")
    flags = ["--port", "0", "--backend", "simulated", "--threads", "1", "--decode-threads", "1"]
    flags += ["--no-access-log", "--cache-dir", cache]
    process = subprocess.Popen(
        [sys.executable, "-m", "pcae_serve", *flags], cwd=tree, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tree)},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    try:
        assert process.stderr is not None
        log, port = "", None
        for line in process.stderr:
            log += line.decode()
            if match := re.search(r"listening on http://127\.0\.0\.1:(\d+)", log):
                port = int(match[1])
            if "ready: " in line.decode():
                break
        if port is None or process.poll() is not None:
            sys.exit(f"the server of {tree} did not start:\n{log}")
        yield Server(process, port)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def request(path: str, method: str) -> bytes:
    body = IMAGE.read_bytes() if method == "POST" else b""
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: http_cpu\r\nAccept: */*\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def spread(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4)
    digits = 0 if median(values) > 20 else 3
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--requests", type=int, default=300, help="per server, path and round")
    parser.add_argument("--json", type=Path, help="also write every round to this file")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    trees = {"before": given.before.resolve(), "after": given.after.resolve()}
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="http-cpu-") as cache, ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(tree, cores[0], f"{cache}/{name}"))
            for name, tree in trees.items()
        }
        for path, method in PATHS.items():
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
            for i in range(given.rounds + 1):
                for name in random.sample(list(servers), len(servers)):
                    measured = servers[name].measure(request(path, method), given.requests)
                    if i:  # the first round warms up
                        rounds[name].append(measured)
            results[path] = rounds
            print(f"{method} {path}, {given.rounds} rounds of {given.requests}", flush=True)
            for quantity, unit in QUANTITIES.items():
                before, after = ([each[quantity] for each in rounds[name]] for name in trees)
                ratio = [b / a for a, b in zip(before, after, strict=True)]
                line = f"before {spread(before)} {unit}   after {spread(after)} {unit}"
                print(f"    {quantity:8} {line}   ratio {spread(ratio)}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
