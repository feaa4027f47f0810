"""Latency that Ray Serve's proxy adds to a request, against the same server without it.

    python benchmarks/proxy.py [--rounds 40] [--requests 25]

Needs `.[ray]`. Both servers run on this machine at the same time and serve the demo bundle on one
thread; only one receives requests at a time. A round is a block of requests to each server on a
kept connection, in random order. Compared are the medians of the rounds (quartiles over the
rounds), in milliseconds, as differences and ratios within a round: `GET /livez`, which needs no
compute, and an image on the demo's fastest tier, one at a time and with 16 in flight.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import httpx2

ROOT = Path(__file__).parents[1]
BODY = min((ROOT / "docs" / "samples").glob("*.png")).read_bytes()

#: Milliseconds of a request, and those outside decoding, queueing and compute.
Took = tuple[float, float]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: list[str], url: str, **environment: str) -> Iterator[None]:
    """Start a server, wait until it is ready, and stop it after the block."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                if httpx2.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx2.TransportError:
                if process.poll() is not None:
                    sys.exit(f"{command[0]} exited before it was ready")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


async def measure(client: httpx2.AsyncClient, url: str, requests: int, at_once: int) -> list[Took]:
    """Send `requests` requests, `at_once` in flight; return what each took."""
    took: list[Took] = []
    left = iter(range(requests))

    async def worker() -> None:
        for _ in left:
            begin_s = time.perf_counter()
            probe = url.endswith("livez")
            answer = await (client.get(url) if probe else client.post(url, content=BODY))
            all_ms = (time.perf_counter() - begin_s) * 1e3
            if answer.status_code != 200:
                sys.exit(f"{url}: {answer.status_code} {answer.text}")
            stages = {} if probe else answer.json()["timings_ms"]
            own_ms = sum(stages.get(name, 0.0) for name in ("decode", "queue", "compute"))
            took.append((all_ms, all_ms - own_ms))

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return took


async def compare(urls: dict[str, str], path: str, rounds: int, requests: int, n: int) -> None:
    medians: dict[str, list[Took]] = {name: [] for name in urls}
    async with httpx2.AsyncClient(timeout=60) as client:
        for name in urls:  # warm up connections and caches
            await measure(client, urls[name] + path, 2 * n, n)
        for _ in range(rounds):
            order = list(urls)
            random.shuffle(order)
            for name in order:
                took = await measure(client, urls[name] + path, requests, n)
                medians[name].append((median(t[0] for t in took), median(t[1] for t in took)))
    print(f"{path}, {n} in flight, {rounds} rounds of {requests}", flush=True)
    for which, what in enumerate(("total", "outside decode, queue, compute")):
        direct = [each[which] for each in medians["direct"]]
        ray = [each[which] for each in medians["ray"]]
        added = [r - d for r, d in zip(ray, direct, strict=True)]
        ratio = [r / d for r, d in zip(ray, direct, strict=True)]
        rows = {"direct": direct, "ray": ray, "added": added, "ratio": ratio}
        line = "   ".join(f"{name} {spread(values)}" for name, values in rows.items())
        print(f"    {what:30}  {line}", flush=True)


def spread(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--requests", type=int, default=25)
    given = parser.parse_args()
    ports = free_port(), free_port()
    urls = {"direct": f"http://127.0.0.1:{ports[0]}", "ray": f"http://127.0.0.1:{ports[1]}"}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        common = {"PCAE_THREADS": "1", "PCAE_DECODE_THREADS": "1", "PCAE_ACCESS_LOG": "false"}
        common |= {"PCAE_CACHE_DIR": f"{folder}/cache"}
        config = Path(folder) / "serve.json"
        application = {"name": "pcae-serve", "import_path": "pcae_serve.integrations.ray:app"}
        # for the replica only: with uvloop its clock has a resolution of a millisecond
        application |= {"runtime_env": {"env_vars": common | {"RAY_USE_UVLOOP": "0"}}}
        http = {"host": "127.0.0.1", "port": ports[1]}
        config.write_text(json.dumps({"http_options": http, "applications": [application]}))
        ray = {
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pcae_serve.api.proxy_delay:stamping",
        }
        direct = [sys.executable, "-m", "pcae_serve", "--port", str(ports[0])]
        behind = [str(Path(sys.executable).parent / "serve"), "run", str(config)]
        with started(direct, urls["direct"], **common), started(behind, urls["ray"], **ray):
            for path, n in (
                ("/livez", 1),
                ("/classify?tier=fast&budget_ms=5000", 1),
                ("/classify?tier=fast&budget_ms=5000", 16),
            ):
                asyncio.run(
                    compare(urls, path, given.rounds, given.requests * (4 if n > 1 else 1), n)
                )


if __name__ == "__main__":
    main()
