"""The application in process, with the simulated engine: no port, no graph."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pcae_serve.api.app import create_app
from pcae_serve.bundle.manifest import Tier
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from tests.support.gate import Gate
from tests.support.images import image_bytes

MakeSettings = Callable[..., Settings]


def quick(tier: Tier, batch: int) -> float:
    """10, 20 and 40 ms for the three tiers."""
    return tier.macs * 1e-5


def fail(error: BaseException) -> None:
    pytest.fail(f"the service does not start: {error!r}")


@contextmanager
def serving(service: Service, ready: bool = True) -> Iterator[TestClient]:
    with TestClient(create_app(service, fail), raise_server_exceptions=False) as client:
        if ready:
            wait_until(lambda: service.ready)
        yield client


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    give_up_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up_s, "it did not come about"
        time.sleep(0.005)


def outcomes(client: TestClient) -> Counter[str]:
    """Requests so far by outcome."""
    text = client.get("/metrics").text
    counts = re.findall(r'^pcae_requests_total\{outcome="(\w+)"\} (\d+)', text, re.MULTILINE)
    return Counter({name: int(count) for name, count in counts})


def problem(response: Any, status: int) -> dict[str, Any]:
    """The problem document, which must be one: status, type, one line."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert "\n" not in document["detail"]
    return document


def batch(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """Multipart fields `image`, as a browser sends several files."""
    return [("image", (f"{i}.png", image)) for i, image in enumerate(images)]


@contextmanager
def busy(client: TestClient, gate: Gate) -> Iterator[threading.Thread]:
    """A request on the device, which does not end before the gate opens."""
    gate.shut()
    first = threading.Thread(
        target=lambda: client.post("/classify?budget_ms=60000", content=image_bytes())
    )
    first.start()
    assert gate.entered.wait(20)
    yield first
    gate.open.set()
    first.join()
