"""A local Ray cluster with its proxy, its controller and replicas of the server.

The tests share the cluster and depend on their order: one replica, two under load, one of them
killed, one again. The simulated engine sleeps, so two cores suffice.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.bundles import manifest, write_bundle
from tests.support.images import image_bytes

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="pip install '.[ray]'")

ROOT = Path(__file__).parents[3]
#: With these the simulated engine takes 0.1, 0.2 and 0.4 s per image, so that a few requests per
#: second are a load, which costs a busy machine little.
MACS = {"fast": 3.5e12, "balanced": 7e12, "full": 14e12}


@dataclass
class Fleet:
    """A local Ray that runs the application."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, query: str = "budget_ms=5000", **more: Any) -> httpx2.Response:
        url = f"{self.url}/classify?{query}"
        return httpx2.post(url, content=image_bytes(250), timeout=30, **more)

    def replicas(self) -> list[int]:
        """Return the process ids of the replicas of this Ray that receive requests."""
        found = []
        for pid in _descendants(self.process.pid):
            title = Path(f"/proc/{pid}/cmdline")
            try:
                if title.read_text().startswith("ray::ServeReplica:"):
                    found.append(pid)
            except OSError:
                pass  # it has exited
        return found

    def until(self, condition: Callable[[], bool], limit_s: float) -> None:
        give_up_s = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < give_up_s, self.log.read_text()[-3000:]
            time.sleep(0.2)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(rest[1]), []).append(int(stat.parent.name))
    found, left = list[int](), [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def fixed_port() -> int:
    """A free port below those that the system selects: Ray cannot report which one it took."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("ray")
    tiers = manifest({})["tiers"]
    for tier in tiers:
        tier["macs"] = MACS[tier["name"]]
    served = write_bundle(folder / "bundle", tiers=tiers)
    port = fixed_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "pcae-serve",
                "import_path": "pcae_serve.integrations.ray:app",
                "runtime_env": {
                    "env_vars": {
                        "PCAE_BUNDLE": str(served),
                        "PCAE_BACKEND": "simulated",
                        "PCAE_CACHE_DIR": str(folder / "cache"),
                        "PCAE_PROFILE_S": "3",
                        "PCAE_BUDGET_MS": "5000",
                    }
                },
                "deployments": [
                    {
                        "name": "pcae-serve",
                        "autoscaling_config": {
                            "min_replicas": 1,
                            "max_replicas": 2,
                            "look_back_period_s": 15,
                            "upscale_delay_s": 2,
                            "downscale_delay_s": 15,
                            "policy": {
                                "policy_function": "pcae_serve.integrations.ray:replicas_wanted"
                            },
                        },
                    }
                ],
            }
        ],
    }
    file, log = folder / "serve.json", folder / "ray.log"  # JSON is YAML
    file.write_text(json.dumps(config))
    short = tempfile.mkdtemp(prefix="ray-")  # the path of a socket has at most 107 characters
    environment = os.environ | {
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": short,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pcae_serve.api.proxy_delay:stamping",
        "PYTHONPATH": str(ROOT),
    }
    with log.open("w") as stream:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "serve", "run", file],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        fleet = Fleet(f"http://127.0.0.1:{port}", process, log)

        def ready() -> bool:
            try:
                return httpx2.get(f"{fleet.url}/readyz").status_code == 200
            except httpx2.TransportError:
                return False

        try:
            fleet.until(ready, 90)
            yield fleet
        finally:
            below = _descendants(process.pid)
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pid in below:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(short, ignore_errors=True)


def test_a_replica_classifies_an_image(fleet: Fleet) -> None:
    answer = fleet.ask()
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["label"] == "bright"
    assert answer.json()["tier"] == "full"
    assert re.search("total;dur=", answer.headers["server-timing"])


def test_the_time_before_the_replica_counts_against_the_budget(fleet: Fleet) -> None:
    """The proxy overwrites a stamp from the client; one of an hour ago would expire any budget."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    forged = {"X-Pcae-Arrival": f"{boot} {time.monotonic() - 3600}"}
    assert fleet.ask(headers=forged).status_code == 200
    # the time between proxy and replica is in the total, but in no stage of the server
    timings = fleet.ask().json()["timings_ms"]
    assert timings["total"] > timings["decode"] + timings["compute"] + timings["queue"]


def test_a_budget_below_every_tier_is_refused_with_the_needed_budget(fleet: Fleet) -> None:
    refused = fleet.ask("budget_ms=3")
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["needed_ms"] > 3


def test_overload_is_refused_with_retry_after(fleet: Fleet) -> None:
    answers = asyncio.run(_load(fleet, rate=200, seconds=0.3, query="tier=full&budget_ms=3000"))
    refused = [answer for answer in answers if answer.status == 503]
    assert refused
    assert {answer.status for answer in answers} <= {200, 503, 504}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["content-type"] == "application/problem+json"


def test_the_replica_cancels_requests_of_clients_that_left(fleet: Fleet) -> None:
    def cancelled() -> float:
        [count] = re.findall(
            r'pcae_requests_total\{outcome="cancelled"\} (\S+)',
            httpx2.get(f"{fleet.url}/metrics").text,
        )
        return float(count)

    before, image = cancelled(), image_bytes(250)
    head = "POST /classify?tier=full&budget_ms=9000 HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Length: {len(image)}"
    clients = [
        socket.create_connection(("127.0.0.1", int(fleet.url.rsplit(":", 1)[1]))) for _ in range(10)
    ]
    for client in clients:  # ten requests take 4 s
        client.sendall(f"{head}\r\n\r\n".encode() + image)
    time.sleep(0.2)
    for client in clients:
        client.close()
    fleet.until(lambda: cancelled() > before, 10)


def test_load_adds_a_replica_and_loses_no_request(fleet: Fleet) -> None:
    """One replica answers 6 requests per second within their budgets, on cheaper tiers."""
    assert len(fleet.replicas()) == 1

    async def scaled() -> tuple[list[Answered], float | None]:
        load = asyncio.create_task(_load(fleet, rate=6, seconds=75))
        begin_s, seen_s = time.monotonic(), None
        while not load.done():
            await asyncio.sleep(0.5)
            if seen_s is None and len(await asyncio.to_thread(fleet.replicas)) == 2:
                seen_s = time.monotonic() - begin_s
        return await load, seen_s

    answers, seen_s = asyncio.run(scaled())
    _report("1 -> 2 replicas under load", answers, seen_s=seen_s)
    assert seen_s is not None, fleet.log.read_text()[-3000:]
    assert {answer.status for answer in answers} <= {200, 503, 504}  # every request has a response
    share = sum(answer.status == 200 for answer in answers) / len(answers)
    assert share > 0.97
    tiers = Counter(answer.tier for answer in answers[: len(answers) // 4])
    assert tiers["full"] < sum(tiers.values()) / 2, tiers  # the reason for the second replica


def test_a_killed_replica_loses_only_its_own_requests(fleet: Fleet) -> None:
    fleet.until(lambda: len(fleet.replicas()) == 2, 30)

    async def killed() -> list[Answered]:
        load = asyncio.create_task(_load(fleet, rate=5, seconds=25))
        await asyncio.sleep(5)
        os.kill(fleet.replicas()[0], signal.SIGKILL)
        return await load

    answers = asyncio.run(killed())
    lost = [answer for answer in answers if answer.status not in (200, 503, 504)]
    _report("a replica killed under load", answers, lost=len(lost))
    assert {answer.status for answer in lost} <= {500, 503}
    assert len(lost) <= 25  # the arrivals within one budget
    assert all(answer.due_s <= 9 for answer in lost)  # killed at 5
    late = [answer for answer in answers if answer.due_s > 10]
    assert {answer.status for answer in late} <= {200, 503, 504}
    fleet.until(lambda: len(fleet.replicas()) == 2, 40)


def test_scaling_down_loses_no_request(fleet: Fleet) -> None:
    async def calmed() -> tuple[list[Answered], int]:
        answers = list[Answered]()
        for _ in range(16):
            answers += await _load(fleet, rate=1, seconds=5)
            if (count := len(await asyncio.to_thread(fleet.replicas))) == 1:
                break
        return answers, count

    answers, count = asyncio.run(calmed())
    _report("2 -> 1 replicas", answers)
    assert count == 1
    assert {answer.status for answer in answers} == {200}


@dataclass(frozen=True)
class Answered:
    """The outcome of one request; status 0: no response."""

    due_s: float
    took_s: float
    status: int
    tier: str
    headers: httpx2.Headers


async def _load(
    fleet: Fleet, rate: float, seconds: float, query: str = "budget_ms=5000"
) -> list[Answered]:
    """Send requests at a fixed rate, without waiting for earlier responses (open loop)."""
    image, begin_s = image_bytes(250), time.monotonic()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=50)

    async def one(client: httpx2.AsyncClient, due_s: float) -> Answered:
        await asyncio.sleep(begin_s + due_s - time.monotonic())
        try:
            answer = await client.post(f"{fleet.url}/classify?{query}", content=image)
        except httpx2.TransportError:
            return Answered(due_s, time.monotonic() - begin_s - due_s, 0, "", httpx2.Headers())
        tier = answer.json()["tier"] if answer.status_code == 200 else ""
        took_s = time.monotonic() - begin_s - due_s
        return Answered(due_s, took_s, answer.status_code, tier, answer.headers)

    async with httpx2.AsyncClient(limits=limits, timeout=30) as client:
        due = [i / rate for i in range(int(rate * seconds))]
        return await asyncio.gather(*(one(client, due_s) for due_s in due))


def _report(what: str, answers: list[Answered], **more: object) -> None:
    """Print the figures of a run, which `pytest -s` shows."""
    took = sorted(answer.took_s for answer in answers if answer.status == 200)
    parts = {
        "n": len(answers),
        "status": dict(Counter(answer.status for answer in answers)),
        "tiers": dict(Counter(answer.tier for answer in answers if answer.tier)),
        "p50_ms": round(1e3 * took[len(took) // 2], 1),
        "p99_ms": round(1e3 * took[int(len(took) * 0.99)], 1),
    } | more
    print(f"\n{what}: {parts}")
