"""The REST API in process, with the simulated engine: no port, no graph."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from pcae_serve.app import create_app
from pcae_serve.bundle import Bundle, Tier
from pcae_serve.engines import Output, Pixels
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.service import Service
from pcae_serve.settings import Settings
from tests.serve.conftest import image_bytes

MakeSettings = Callable[..., Settings]


def quick(tier: Tier, batch: int) -> float:
    """10, 20 and 40 ms for the three tiers."""
    return tier.macs * 1e-5


@contextmanager
def serving(service: Service, ready: bool = True) -> Iterator[TestClient]:
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        while ready and client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        yield client


@pytest.fixture
def client(small_bundle: Bundle, settings: MakeSettings) -> Iterator[TestClient]:
    engine = SimulatedEngine(small_bundle, seconds=quick)
    with serving(Service(settings(max_body_mb=0.1), small_bundle, engine)) as client:
        yield client


def problem(response: Any, status: int) -> dict[str, Any]:
    """The problem document, which must be one: status, type, one line."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert "\n" not in document["detail"]
    return document


def test_an_image_as_the_raw_body_is_classified(client: TestClient) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}  # what curl says
    response = client.post("/classify", content=image_bytes(250), headers=headers)
    answer = response.json()
    assert response.status_code == 200, answer
    assert answer["predictions"][0]["label"] == "bright"
    assert answer["predictions"][0]["probability"] > 0.9
    assert sum(p["probability"] for p in answer["predictions"]) == pytest.approx(1, abs=1e-4)
    assert answer["tier"] == "full"
    assert answer["tokens"] == [16, 16, 16]
    assert answer["budget_ms"] == 1000
    assert answer["met_budget"] is True
    assert answer["kept"] is None
    assert set(answer["timings_ms"]) == {"decode", "queue", "compute", "total"}
    assert answer["timings_ms"]["total"] >= answer["timings_ms"]["compute"] >= 40
    assert response.headers["server-timing"].startswith("decode;dur=")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_multipart_and_raw_agree_for_every_format(client: TestClient, kind: str) -> None:
    body = image_bytes(40, kind)
    raw = client.post("/classify", content=body).json()
    form = client.post("/classify", files={"image": ("a.bin", body)}).json()
    assert raw["predictions"] == form["predictions"]
    assert raw["predictions"][0]["label"] == "dark"


@pytest.mark.parametrize(
    ("query", "tier"),
    [
        ("tier=fast", "fast"),
        ("tier=full", "full"),
        ("tier=auto&budget_ms=500", "full"),
        ("tier=auto&budget_ms=36", "fast"),
        ("min_tier=balanced", "full"),
        ("tier=balanced&min_tier=fast", "balanced"),
    ],
)
def test_the_tier_is_the_asked_one_or_the_best_that_fits(
    client: TestClient, query: str, tier: str
) -> None:
    if "36" in query:  # between what fast (10 ms) and full (40 ms) need; the machine may be slow
        answers = [client.post(f"/classify?{query}", content=image_bytes()) for _ in range(20)]
        tiers = {a.json()["tier"] for a in answers if a.status_code == 200}
        assert tiers <= {"fast", "balanced"}
        assert tiers
    else:
        answer = client.post(f"/classify?{query}", content=image_bytes()).json()
        assert answer["tier"] == tier
        assert answer["reason"]


def test_top_k_and_explain(client: TestClient) -> None:
    answer = client.post("/classify?tier=fast&top_k=2&explain=true", content=image_bytes()).json()
    assert len(answer["predictions"]) == 2
    assert [len(stage) for stage in answer["kept"]] == [9, 5, 3]


def test_the_budget_may_come_as_a_header_and_the_parameter_wins(client: TestClient) -> None:
    headers = {"X-Latency-Budget-Ms": "700"}
    by_header = client.post("/classify", content=image_bytes(), headers=headers).json()
    both = client.post("/classify?budget_ms=800", content=image_bytes(), headers=headers).json()
    assert (by_header["budget_ms"], both["budget_ms"]) == (700, 800)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "empty"),
        (b"just some text, named .jpg", 415, "jpeg"),
        (image_bytes(9, "JPEG", (64, 64))[:-200], 400, "truncated"),
        (image_bytes(9, "PNG", (64, 64))[:-30], 400, "truncated"),
    ],
    ids=["zero bytes", "text", "truncated JPEG", "truncated PNG"],
)
def test_what_is_no_image_is_refused(
    client: TestClient, body: bytes, status: int, words: str
) -> None:
    detail = problem(client.post("/classify", content=body), status)["detail"]
    assert words in detail.lower()
    assert client.post("/classify", content=image_bytes()).status_code == 200


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("tier=turbo", "fast, balanced, full, auto"),
        ("min_tier=turbo", "fast, balanced, full"),
        ("tier=fast&min_tier=full", "below"),
        ("budget_ms=-5", "budget_ms '-5'"),
        ("budget_ms=0", "budget_ms '0'"),
        ("budget_ms=nan", "budget_ms 'nan'"),
        ("budget_ms=inf", "budget_ms 'inf'"),
        ("budget_ms=soon", "budget_ms 'soon'"),
        ("top_k=0", "top_k '0'"),
    ],
)
def test_a_senseless_parameter_is_refused(client: TestClient, query: str, words: str) -> None:
    document = problem(client.post(f"/classify?{query}", content=image_bytes()), 422)
    assert words in document["detail"]
    assert document["type"] == "urn:pcae-serve:invalid-parameter"


def test_a_budget_that_no_tier_can_meet_says_what_is_needed(client: TestClient) -> None:
    document = problem(client.post("/classify?budget_ms=1", content=image_bytes()), 422)
    assert "'fast'" in document["detail"]
    assert 10 <= document["needed_ms"] < 100
    pinned = problem(client.post("/classify?tier=full&budget_ms=20", content=image_bytes()), 422)
    assert pinned["needed_ms"] >= 40


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(client: TestClient, chunked: bool) -> None:
    body = bytes(200_000)
    content: Any = iter([body[:90_000], body[90_000:]]) if chunked else body
    assert "100,000" in problem(client.post("/classify", content=content), 413)["detail"]


def test_too_many_pixels_are_refused(small_bundle: Bundle, settings: MakeSettings) -> None:
    engine = SimulatedEngine(small_bundle, seconds=quick)
    with serving(Service(settings(max_pixels=100), small_bundle, engine)) as client:
        assert (
            "11 x 11"
            in problem(client.post("/classify", content=image_bytes(size=(11, 11))), 413)["detail"]
        )


def test_broken_multipart_is_refused(client: TestClient) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    problem(client.post("/classify", content=b"nonsense", headers=headers), 400)
    problem(client.post("/classify", files={"photo": ("a.png", image_bytes())}), 400)
    headers = {"content-type": "multipart/form-data"}  # no boundary
    problem(client.post("/classify", content=b"nonsense", headers=headers), 400)


def test_unknown_routes_and_methods_are_problems_too(client: TestClient) -> None:
    problem(client.get("/nowhere"), 404)
    assert problem(client.get("/classify"), 405)["title"]


def test_tiers_tells_accuracy_beside_latency(client: TestClient) -> None:
    document = client.get("/tiers").json()
    assert [tier["name"] for tier in document["tiers"]] == ["fast", "balanced", "full"]
    assert document["tiers"][0]["accuracy"]["top1"] == 0.80
    assert document["tiers"][2]["latency_ms"]["1"] >= 40
    assert document["backend"] == "simulated"


def test_health_and_documentation(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/docs").status_code == 200
    operation = client.get("/openapi.json").json()["paths"]["/classify"]["post"]
    assert "image/*" in operation["requestBody"]["content"]
    assert {"200", "400", "413", "415", "422", "503", "504"} <= set(operation["responses"])


class Gate:
    """An engine that runs when it is told to."""

    name, version, device = "gate", "1", "cpu"

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.batches: list[int] = []
        self.fails = False

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        assert self.open.wait(5)
        if self.fails:
            raise RuntimeError("out of memory")
        self.batches.append(len(pixels))
        return Output(np.zeros((len(pixels), 4), np.float32), ())


def test_not_ready_before_latencies_are_known(small_bundle: Bundle, settings: MakeSettings) -> None:
    gate = Gate()
    gate.open.clear()
    with serving(Service(settings(), small_bundle, gate), ready=False) as client:
        assert problem(client.get("/readyz"), 503)["status"] == 503
        assert client.get("/livez").status_code == 200
        refused = client.post("/classify", content=image_bytes())
        assert refused.headers["retry-after"] == "1"
        problem(refused, 503)
        gate.open.set()
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        assert client.post("/classify", content=image_bytes()).status_code == 200


def test_a_failing_engine_costs_its_batch_and_not_the_server(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    gate = Gate()
    with serving(Service(settings(), small_bundle, gate)) as client:
        gate.fails = True
        problem(client.post("/classify", content=image_bytes()), 500)
        gate.fails = False
        assert client.post("/classify", content=image_bytes()).status_code == 200


def test_a_request_whose_budget_passes_in_the_queue_gets_504(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    gate = Gate()
    with serving(Service(settings(), small_bundle, gate)) as client:
        gate.open.clear()
        first = threading.Thread(
            target=client.post, args=("/classify",), kwargs={"content": image_bytes()}
        )
        first.start()
        time.sleep(0.1)
        document = problem(client.post("/classify?budget_ms=150", content=image_bytes()), 504)
        assert "150 ms" in document["detail"]
        gate.open.set()
        first.join()


def test_requests_that_wait_together_run_together(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    def overhead(tier: Tier, batch: int) -> float:
        return 0.03 + 1e-4 * batch

    engine = SimulatedEngine(small_bundle, seconds=overhead)
    batches: list[int] = []
    run = engine.run

    class Counting(SimulatedEngine):
        def run(self, tier: Tier, pixels: Pixels) -> Output:
            batches.append(len(pixels))
            return run(tier, pixels)

    service = Service(settings(profile_s=3), small_bundle, Counting(small_bundle))

    async def together() -> list[Any]:
        from pcae_serve.service import Ask

        await service.start()
        batches.clear()
        now = asyncio.get_running_loop().time
        calls = [service.classify(image_bytes(i), Ask(now(), 5000)) for i in range(12)]
        answers = await asyncio.gather(*calls)
        await service.stop()
        return answers

    answers = asyncio.run(together())
    assert len(answers) == 12
    assert sum(batches) == 12
    assert max(batches) >= 4
