"""The REST API in process, with the simulated engine: no port, no graph."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pcae_serve.api.app import create_app
from pcae_serve.bundle import reader
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.servable import Servable
from pcae_serve.runtime.service import Service
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.greedy import Greedy
from tests.support.apps import MakeSettings, batch, busy, fail, problem, quick, serving, wait_until
from tests.support.bundles import manifest, write_bundle
from tests.support.gate import Gate
from tests.support.images import image_bytes


@pytest.fixture
def client(small_bundle: Bundle, settings: MakeSettings) -> Iterator[TestClient]:
    engine = SimulatedEngine(small_bundle, seconds=quick)
    with serving(Service(settings(max_body_mb=0.1), small_bundle, [engine])) as client:
        yield client


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
        ("min_tier=auto", "fast, balanced, full"),
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
    with serving(Service(settings(max_pixels=100), small_bundle, [engine])) as client:
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


def test_each_image_of_a_batch_is_answered_or_refused_by_itself(client: TestClient) -> None:
    files = batch(image_bytes(250), b"no image", image_bytes(20), b"")
    answer = client.post("/classify/batch?tier=fast&budget_ms=5000&top_k=1", files=files)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [result["status"] for result in results] == [200, 415, 200, 400]
    labels = [r["answer"] and r["answer"]["predictions"][0]["label"] for r in results]
    assert labels == ["bright", None, "dark", None]
    assert results[0]["answer"]["tier"] == "fast"
    assert results[1]["problem"]["type"] == "urn:pcae-serve:unsupported-type"
    counts = client.get("/metrics").text
    assert 'pcae_requests_total{outcome="in_time"} 2.0' in counts
    assert 'pcae_requests_total{outcome="unreadable"} 2.0' in counts


def test_images_of_a_batch_do_not_slip_past_the_limit(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    """What does not fit is refused image by image, not as a whole, and counts as alone."""
    engine = SimulatedEngine(small_bundle, seconds=quick)
    with serving(Service(settings(queue_limit=8), small_bundle, [engine])) as client:
        files = batch(*[image_bytes(250)] * 30)
        answer = client.post("/classify/batch?budget_ms=60000", files=files)
    statuses = Counter(result["status"] for result in answer.json()["results"])
    assert statuses == {200: 8, 503: 22}


@pytest.mark.parametrize(
    ("files", "headers", "status", "words"),
    [
        (None, {}, 415, "multipart/form-data"),
        ([("other", ("a", b"x"))], {}, 400, "no file field 'image'"),
        (batch(*[b"x"] * 65), {}, 413, "more than 64 files"),
        (batch(*[bytes(60_000)] * 2), {}, 413, "over the limit of 100,000 bytes"),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused_whole(
    client: TestClient, files: Any, headers: dict[str, str], status: int, words: str
) -> None:
    response = client.post("/classify/batch", files=files, headers=headers)
    assert words in problem(response, status)["detail"]


def test_what_a_caller_says_comes_back_escaped_and_short(client: TestClient) -> None:
    told = problem(client.post(f"/classify?tier=%1b[31m%0a{'x' * 5000}", content=b"x"), 422)
    assert "\\x1b" in told["detail"]
    assert len(told["detail"]) < 300
    told = problem(client.post(f"/classify?top_k=%1b[31m{'9' * 5000}", content=b"x"), 422)
    assert len(told["detail"]) < 300


def test_unknown_routes_and_methods_are_problems_too(client: TestClient) -> None:
    problem(client.get("/nowhere"), 404)
    assert problem(client.get("/classify"), 405)["title"]


def test_metrics_count_what_became_of_requests(client: TestClient) -> None:
    client.post("/classify", content=image_bytes())
    client.post("/classify?budget_ms=1", content=image_bytes())
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'pcae_requests_total{outcome="in_time"} 1.0' in response.text
    assert 'pcae_requests_total{outcome="rejected_budget"} 1.0' in response.text
    assert "pcae_compute_seconds_total" in response.text
    assert 'pcae_wasted_compute_seconds_total{reason="padding"} 0.0' in response.text


def test_tiers_tells_accuracy_beside_latency(client: TestClient) -> None:
    document = client.get("/tiers").json()
    assert [tier["name"] for tier in document["tiers"]] == ["fast", "balanced", "full"]
    assert document["tiers"][0]["accuracy"]["top1"] == 0.80
    assert document["tiers"][2]["latency_ms"]["1"] >= 40
    assert (document["backend"], document["backend_note"]) == ("simulated", None)
    assert (document["answers"], document["width"]) == ("logits", 4)
    told = {key: document["tiers"][0][key] for key in ("model", "reduction", "precision")}
    assert told == {"model": "vit", "reduction": "ptr", "precision": "float32"}


def test_a_backend_that_no_gpu_has_run_says_so(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    vit = small_bundle.manifest.models["vit"].model_copy(update={"half": "bfloat16"})
    served = replace(
        small_bundle, manifest=small_bundle.manifest.model_copy(update={"models": {"vit": vit}})
    )
    engine = SimulatedEngine(served, device="cuda:0", seconds=quick)
    engine.name = "cuda"
    with serving(Service(settings(), served, [engine])) as client:
        document = client.get("/tiers").json()
    assert document["backend_note"] == "built, not yet run on a GPU"
    assert document["tiers"][0]["precision"] == "bfloat16"


def test_health_and_documentation(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/docs").status_code == 200
    operation = client.get("/openapi.json").json()["paths"]["/classify"]["post"]
    assert "image/*" in operation["requestBody"]["content"]
    assert {"200", "400", "413", "415", "422", "503", "504"} <= set(operation["responses"])


@pytest.fixture
def headless(tmp_path: Path, settings: MakeSettings) -> Iterator[TestClient]:
    """A server whose model answers with 8 features."""
    models = {"vit": manifest({})["models"]["vit"] | {"answers": "features"}}
    served = reader.load(write_bundle(tmp_path / "headless", labels=[], models=models))
    engine = SimulatedEngine(served, seconds=quick)
    with serving(Service(settings(max_body_mb=0.1), served, [engine])) as client:
        yield client


def test_a_bundle_without_a_head_answers_with_features(headless: TestClient) -> None:
    response = headless.post("/embed?tier=fast&budget_ms=800", content=image_bytes(255))
    answer = response.json()
    assert response.status_code == 200, answer
    assert answer["features"] == [0, 0, 0, 0, 0, 0, 0, 5]
    told = {key: answer[key] for key in ("tier", "keep_ratio", "tokens", "budget_ms", "reason")}
    assert told == {
        "tier": "fast",
        "keep_ratio": 0.6,
        "tokens": [9, 5, 3],
        "budget_ms": 800,
        "reason": "asked for",
    }
    assert answer["kept"] is None
    assert set(answer["timings_ms"]) == {"decode", "queue", "compute", "total"}
    assert response.headers["server-timing"].startswith("decode;dur=")
    form = headless.post("/embed?explain=true", files={"image": ("a.png", image_bytes(255))})
    assert form.json()["features"] == answer["features"]
    assert [len(stage) for stage in form.json()["kept"]] == [16, 16, 16]


def test_features_are_refused_as_classes_are(headless: TestClient) -> None:
    problem(headless.post("/embed", content=b""), 400)
    problem(headless.post("/embed", content=b"just some text"), 415)
    problem(headless.post("/embed", content=bytes(200_000)), 413)
    problem(headless.post("/embed?tier=turbo", content=image_bytes()), 422)
    header = {"X-Latency-Budget-Ms": "1"}
    assert problem(headless.post("/embed", content=image_bytes(), headers=header), 422)["needed_ms"]


@pytest.mark.parametrize("body", [image_bytes(), bytes(200_000)], ids=["image", "too large"])
def test_the_route_of_the_other_kind_of_bundle_names_the_right_one(
    client: TestClient, headless: TestClient, body: bytes
) -> None:
    document = problem(client.post("/embed", content=body), 404)
    assert "/classify" in document["detail"]
    assert document["type"] == "urn:pcae-serve:not-offered"
    assert "/embed" in problem(headless.post("/classify", content=body), 404)["detail"]


def test_tiers_tells_of_features(headless: TestClient) -> None:
    document = headless.get("/tiers").json()
    assert (document["answers"], document["width"], document["labels"]) == ("features", 8, [])
    assert document["tiers"][0]["fidelity"] is None


def test_not_ready_before_latencies_are_known(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    gate.shut()
    service = Service(settings(), small_bundle, [gate])
    with serving(service, ready=False) as client:
        problem(client.get("/readyz"), 503)
        assert client.get("/livez").status_code == 200
        refused = client.post("/classify", content=image_bytes())
        assert refused.headers["retry-after"] == "1"
        problem(refused, 503)
        gate.open.set()
        wait_until(lambda: service.ready)
        assert client.get("/readyz").status_code == 200
        assert client.post("/classify", content=image_bytes()).status_code == 200


def test_a_start_that_fails_is_told(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    gate.fails = True
    failures: list[BaseException] = []
    with TestClient(create_app(Service(settings(), small_bundle, [gate]), failures.append)):
        wait_until(lambda: bool(failures))
    assert "out of memory" in str(failures[0])


def test_a_failing_engine_costs_its_batch_and_not_the_server(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    with serving(Service(settings(), small_bundle, [gate])) as client:
        gate.fails = True
        problem(client.post("/classify", content=image_bytes()), 500)
        gate.fails = False
        assert client.post("/classify", content=image_bytes()).status_code == 200


def test_a_request_whose_budget_passes_in_the_queue_gets_504(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    with serving(Service(settings(), small_bundle, [gate])) as client, busy(client, gate):
        document = problem(client.post("/classify?budget_ms=700", content=image_bytes()), 504)
        assert "700 ms" in document["detail"]
        gate.open.set()


def test_a_request_whose_budget_passes_while_images_are_decoded_gets_504(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Preprocess, "__call__", lambda *_: time.sleep(1.0))
    with serving(Service(settings(), small_bundle, [gate])) as client:
        document = problem(client.post("/classify?budget_ms=200", content=image_bytes()), 504)
        assert "before the image was received and decoded" in document["detail"]


def test_no_memory_for_an_image_is_no_fault_of_its_client(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    for where in ("Image.open", "ImageFile.ImageFile.load"):  # its header, its pixels
        with monkeypatch.context() as patched:
            patched.setattr(f"PIL.{where}", no_memory)
            refused = client.post("/classify", content=image_bytes())
        assert "too little memory" in problem(refused, 503)["detail"]
        assert refused.headers["retry-after"] == "1"
    assert 'pcae_requests_total{outcome="failed"} 2.0' in client.get("/metrics").text
    assert caplog.text.count("too little memory") == 2
    assert client.post("/classify", content=image_bytes()).status_code == 200


class Hard(Greedy):
    """Lets go of whoever is first, for all the others."""

    name = "hard"

    def choose(self, view: SchedulerView) -> Run:
        head, *others = view.queue.by_deadline
        return Run(0, tuple(others), dropped=(head,)) if others else super().choose(view)


def decoded(service: Service) -> int:
    """How many of those who wait are in the queue, no longer at the decoder."""
    assert isinstance(service._current, Servable)
    return len(service._current._driver.scheduler._queue)


def test_a_request_that_the_policy_lets_go_gets_503_and_a_time_to_come_back(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PUBLISHED, "greedy", lambda tier_table: Hard())
    responses: list[Any] = []

    def ask(client: TestClient, budget_ms: int) -> threading.Thread:
        query, content = f"/classify?budget_ms={budget_ms}", image_bytes()
        thread = threading.Thread(
            target=lambda: responses.append(client.post(query, content=content))
        )
        thread.start()
        return thread

    service = Service(settings(policy="greedy"), small_bundle, [gate])
    with serving(service) as client, busy(client, gate):
        waiting = [ask(client, budget_ms) for budget_ms in (50_000, 60_000)]
        wait_until(lambda: service.waiting == 2 and decoded(service) == 2)
        gate.open.set()
        for thread in waiting:
            thread.join()
    refused, answered = sorted(responses, key=lambda response: -response.status_code)
    document = problem(refused, 503)
    assert "'hard'" in document["detail"]
    assert document["type"] == "urn:pcae-serve:overloaded"
    assert refused.headers["retry-after"] == "1"
    assert answered.status_code == 200
    assert "under the present load, policy 'hard' chose it" in answered.json()["reason"]


async def asgi(app: Any, body: bytes, receive: Callable[[], Awaitable[Any]]) -> list[Any]:
    """One POST /classify as the server would make it; what the application sends back."""
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return messages.pop() if messages else await receive()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/classify", "raw_path": b"/classify",
        "query_string": b"budget_ms=60000", "headers": [], "http_version": "1.1",
        "scheme": "http", "server": ("test", 80), "client": ("test", 1), "asgi": {"version": "3.0"},
    }  # fmt: skip
    await app(scope, next_message, send)
    return sent


def test_a_client_that_leaves_while_it_waits_is_never_computed(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    async def scenario() -> None:
        service = Service(settings(), small_bundle, [gate])
        await service.start()
        app = create_app(service, fail)
        gate.shut()

        async def stays() -> Any:
            await asyncio.Event().wait()

        async def leaves() -> Any:
            return {"type": "http.disconnect"}

        first = asyncio.create_task(asgi(app, image_bytes(), stays))
        await asyncio.to_thread(gate.entered.wait, 20)
        left = await asgi(app, image_bytes(), leaves)
        assert left[0]["status"] == 499
        gate.open.set()
        assert (await first)[0]["status"] == 200
        await service.stop()

    asyncio.run(scenario())
    assert gate.batches == [1]
