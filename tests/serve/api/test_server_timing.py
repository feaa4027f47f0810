"""Server-Timing and the access log, for one image and for several."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pcae_serve.api.app import create_app
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.observability.logs import RequestId
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from tests.support.apps import batch, fail, quick, wait_until
from tests.support.images import image_bytes

TIMES = (
    r'decode;dur=[\d.]+, queue;dur=[\d.]+, compute;dur=[\d.]+, total;dur=([\d.]+), looks;desc="1"'
)


def test_every_route_records_timing_alike(
    small_bundle: Bundle, settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(settings(), small_bundle, [SimulatedEngine(small_bundle, seconds=quick)])
    caplog.set_level("INFO", "pcae_serve.access")
    image, alone = image_bytes(), {"Inference-Header-Content-Length": "0"}
    pixels = {"name": "image", "datatype": "UINT8", "shape": [2, 1, 1, 3], "data": [9] * 6}
    infer = {"inputs": [pixels], "parameters": {"tier": "fast", "budget_ms": 9000}}
    query, path = "?tier=fast&budget_ms=9000", "/v2/models/test/infer"
    with TestClient(RequestId(create_app(service, fail))) as client:
        wait_until(lambda: service.ready)

        def timed(path: str, **how: Any) -> tuple[str | None, dict[str, Any]]:
            caplog.clear()
            response = client.post(path, **how)
            [record] = caplog.records
            fields = record.__dict__["fields"]
            logged = {name: fields[name] for name in ("tier", "looks", "images") if name in fields}
            return response.headers.get("server-timing"), logged

        several = timed(f"/classify/batch{query}", files=batch(image, b"no image", image))
        for (times, logged), wanted in (
            (timed(f"/classify{query}", content=image), {"tier": "fast", "looks": 1}),
            (timed(path, content=image, headers=alone), {"tier": "full", "looks": 1}),
            (timed(path, json=infer), {"tier": "fast:2", "looks": 2}),
            (several, {"tier": "fast:2", "looks": 2, "images": "200:2,415:1"}),
        ):
            assert times is not None
            match = re.fullmatch(TIMES, times)
            assert match is not None
            assert float(match[1]) >= 10
            assert logged == wanted
        times, logged = timed(f"/classify/batch{query}", files=batch(b"no image"))
        assert times is None
        assert logged == {"images": "415"}
