"""The installed server with a greedy and a polite client: each has its own API key."""

import threading
import time
from pathlib import Path

import httpx2
import pytest

from tests.support.images import image_bytes
from tests.support.server_process import server

GREEDY, POLITE = "greedy-0123456789abcdef", "polite-0123456789abcdef"
#: Requests of the polite client, and the seconds between them.
REQUESTS, INTERVAL_S = 40, 0.2


@pytest.mark.slow
def test_a_greedy_client_does_not_push_a_polite_one_below_its_share(tmp_path: Path) -> None:
    """Batches of 64 images on 4 connections with a budget of 60 s fill a queue of 64."""
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text(f"{GREEDY} name=greedy\n{POLITE} name=polite\n")
    image, over = image_bytes(), threading.Event()
    # nothing reads the log here, and a full pipe would stop the server
    flags = ("--backend", "simulated", "--queue-limit", "64", "--no-access-log")

    def greedy(url: str) -> None:
        fields = [("image", (f"{i}.png", image)) for i in range(64)]
        with httpx2.Client(timeout=60, headers={"X-API-Key": GREEDY}) as client:
            while not over.is_set():
                target = f"{url}/classify/batch?budget_ms=60000&tier=full"
                client.post(target, files=fields)

    with server(*flags, "--api-keys-file", str(keys), cache=tmp_path / "cache") as (url, _):
        threads = [threading.Thread(target=greedy, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            statuses = []
            with httpx2.Client(timeout=60, headers={"X-API-Key": POLITE}) as client:
                for _ in range(REQUESTS):
                    begin_s = time.monotonic()
                    statuses.append(
                        client.post(f"{url}/classify?budget_ms=5000", content=image).status_code
                    )
                    time.sleep(max(0.0, INTERVAL_S - (time.monotonic() - begin_s)))
                metrics = client.get(f"{url}/metrics").text
        finally:
            over.set()
            for thread in threads:
                thread.join()
    settled = statuses[REQUESTS // 2 :]
    assert settled.count(200) >= 0.9 * len(settled), statuses
    counts = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(counts['pcae_caller_requests_total{caller="greedy",outcome="rejected_share"}']) > 0
    assert float(counts['pcae_caller_requests_total{caller="greedy",outcome="in_time"}']) > 0
