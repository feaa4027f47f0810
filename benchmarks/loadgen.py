"""MLPerf LoadGen's Server scenario against a running server: Poisson arrivals, a latency bound.

    pip install mlcommons-loadgen httpx2
    python benchmarks/loadgen.py http://127.0.0.1:8000 --qps 40 --bound-ms 500 [--seconds 60]

Every query is a request whose budget is the bound. LoadGen counts only completed queries and their
latency, so a rejected or failed query is completed after the bound: it counts as a miss.
"""

import argparse
import array
import asyncio
import json
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import mlperf_loadgen as loadgen

SAMPLES = Path(__file__).parents[1] / "docs" / "samples"
#: Time after the bound at which a miss is completed.
BEYOND_S = 0.01


class Sender:
    """Sends requests from its own event loop, so that LoadGen's thread does not wait."""

    def __init__(self, url: str, bound_s: float) -> None:
        self.url, self.bound_s = f"{url}/classify?budget_ms={1e3 * bound_s}", bound_s
        self.bodies = [path.read_bytes() for path in sorted(SAMPLES.glob("*.png"))]
        self.outcomes: Counter[str] = Counter()
        self.tiers: Counter[str] = Counter()
        self.loop = asyncio.new_event_loop()
        self.client = httpx2.AsyncClient(
            timeout=bound_s + 30, limits=httpx2.Limits(max_connections=None, keepalive_expiry=4)
        )
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def issue(self, queries: list[Any]) -> None:
        now_s = time.monotonic()
        for query in queries:
            asyncio.run_coroutine_threadsafe(self.send(query.id, query.index, now_s), self.loop)

    async def send(self, id_: int, index: int, begin_s: float) -> None:
        body = b"\0"
        try:
            image = self.bodies[index % len(self.bodies)]
            answer = await self.client.post(self.url, content=image)
            if answer.status_code == 200:
                body = answer.content
                self.tiers[answer.json()["tier"]] += 1
            self.outcomes[str(answer.status_code)] += 1
        except httpx2.TransportError as error:
            self.outcomes[type(error).__name__] += 1
        if body == b"\0":
            await asyncio.sleep(begin_s + self.bound_s + BEYOND_S - time.monotonic())
        data = array.array("B", body)
        address, length = data.buffer_info()
        response = loadgen.QuerySampleResponse(id_, address, length)
        loadgen.QuerySamplesComplete([response])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--qps", type=float, required=True)
    parser.add_argument("--bound-ms", type=float, default=500)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--percentile", type=float, default=0.99)
    arguments = parser.parse_args()
    sender = Sender(arguments.url, arguments.bound_ms / 1e3)
    settings = loadgen.TestSettings()
    settings.scenario = loadgen.TestScenario.Server
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = arguments.qps
    settings.server_target_latency_ns = int(arguments.bound_ms * 1e6)
    settings.server_target_latency_percentile = arguments.percentile
    settings.min_duration_ms = int(1e3 * arguments.seconds)
    settings.min_query_count = int(arguments.qps * arguments.seconds)
    logs = loadgen.LogSettings()
    logs.enable_trace = False
    with tempfile.TemporaryDirectory() as folder:
        logs.log_output.outdir = folder
        sut = loadgen.ConstructSUT(sender.issue, lambda: None)
        count = len(sender.bodies)
        qsl = loadgen.ConstructQSL(count, count, lambda _: None, lambda _: None)
        loadgen.StartTestWithLogSettings(sut, qsl, settings, logs, "")
        print((Path(folder) / "mlperf_log_summary.txt").read_text().split("Test Parameters")[0])
    print(json.dumps({"outcomes": sender.outcomes, "tiers": sender.tiers}))


if __name__ == "__main__":
    main()
