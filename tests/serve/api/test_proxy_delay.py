"""A stamp from a proxy on this machine counts; any other counts for nothing."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send

from pcae_serve.api import proxy_delay
from pcae_serve.api.app import create_app
from pcae_serve.api.auth import Keys
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.service import Service
from tests.support.apps import wait_until
from tests.support.images import image_bytes

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def seen(headers: list[tuple[bytes, bytes]], *, stamped: bool = False) -> Scope:
    """The scope that an app behind it is called with."""
    scopes = list[Scope]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    chain: Any = proxy_delay.SubtractDelay(app)
    if stamped:
        chain = proxy_delay.StampArrival(chain)

    async def call() -> None:
        await chain({"type": "http", "headers": headers}, None, None)

    asyncio.run(call())
    return scopes[0]


def test_the_time_since_the_stamp_is_the_delay() -> None:
    stamp = f"{BOOT} {time.monotonic() - 0.2}".encode()
    assert 0.2 <= seen([(proxy_delay.HEADER, stamp)])["state"][proxy_delay.DELAY_S] < 20


@pytest.mark.parametrize(
    "stamp",
    ["another-machine 1.0", f"{BOOT} nan", f"{BOOT} -inf", f"{BOOT} soon", BOOT, " 1.0", ""],
)
def test_an_invalid_or_foreign_stamp_is_ignored(stamp: str) -> None:
    assert proxy_delay.DELAY_S not in seen([(proxy_delay.HEADER, stamp.encode())]).get("state", {})


def test_a_stamp_from_the_future_and_one_from_long_ago_are_bounded() -> None:
    later = f"{BOOT} {time.monotonic() + 60}".encode()
    assert seen([(proxy_delay.HEADER, later)])["state"][proxy_delay.DELAY_S] == 0
    long_ago = f"{BOOT} -1e9".encode()
    assert (
        seen([(proxy_delay.HEADER, long_ago)])["state"][proxy_delay.DELAY_S]
        == proxy_delay.MAX_DELAY_S
    )


def test_the_proxy_replaces_the_clients_stamp() -> None:
    forged = [
        (b"X-Pcae-Arrival", f"{BOOT} 0".encode()),
        (proxy_delay.HEADER, b"x"),
        (b"host", b"y"),
    ]
    scope = seen(forged, stamped=True)
    assert [name for name, _ in scope["headers"]] == [b"host", proxy_delay.HEADER]
    assert scope["state"][proxy_delay.DELAY_S] < 20  # not the time since the boot


@pytest.mark.parametrize("place", ["query", "header", "default", "/v2"])
def test_the_delay_counts_against_the_budget_wherever_it_is_given(
    small_bundle: Bundle, settings: Any, place: str
) -> None:
    service = Service(settings(budget_ms=900), small_bundle, [SimulatedEngine(small_bundle)])
    failures = list[BaseException]()
    app = proxy_delay.SubtractDelay(create_app(service, failures.append, Keys()))
    stamp = {proxy_delay.HEADER.decode(): f"{BOOT} {time.monotonic() - 1}"}
    with TestClient(app) as client:
        wait_until(lambda: service.ready)
        for headers, status in ((stamp, {422, 503, 504}), ({}, {200})):
            path, more = "/classify", dict[str, str]()
            if place == "query":
                path += "?budget_ms=900"
            elif place == "header":
                more = {"X-Latency-Budget-Ms": "900"}
            elif place == "/v2":
                path, more = "/v2/models/test/infer", {"Inference-Header-Content-Length": "0"}
            answer = client.post(path, content=image_bytes(), headers=headers | more)
            assert answer.status_code in status, answer.text
