"""Faults as problem documents: of the request, the server and the engine."""

import gc
import threading
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.memory_budget import ParallelWork
from pcae_serve.runtime.servable import Servable
from pcae_serve.runtime.service import Service
from pcae_serve.scheduling import scheduler
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.greedy import Greedy
from tests.support.apps import MakeSettings, busy, outcomes, problem, quick, serving, wait_until
from tests.support.gate import Gate
from tests.support.images import image_bytes
from tests.support.inference_requests import error


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
def test_a_body_that_is_not_an_image_is_refused(
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
def test_an_invalid_parameter_is_refused(client: TestClient, query: str, words: str) -> None:
    document = problem(client.post(f"/classify?{query}", content=image_bytes()), 422)
    assert words in document["detail"]
    assert document["type"] == "urn:pcae-serve:invalid-parameter"


def test_a_budget_that_no_tier_can_meet_says_what_is_needed(client: TestClient) -> None:
    document = problem(client.post("/classify?budget_ms=1", content=image_bytes()), 422)
    assert "'fast'" in document["detail"]
    assert document["needed_ms"] >= 10
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
    empty = b"--x--\r\n"
    assert (
        "no file field"
        in problem(client.post("/classify", content=empty, headers=headers), 400)["detail"]
    )
    headers = {"content-type": "multipart/form-data"}  # no boundary
    problem(client.post("/classify", content=b"nonsense", headers=headers), 400)


def test_a_callers_text_is_repeated_escaped_and_short(client: TestClient) -> None:
    reported = problem(client.post(f"/classify?tier=%1b[31m%0a{'x' * 5000}", content=b"x"), 422)
    assert "\\x1b" in reported["detail"]
    assert len(reported["detail"]) < 300
    reported = problem(client.post(f"/classify?top_k=%1b[31m{'9' * 5000}", content=b"x"), 422)
    assert len(reported["detail"]) < 300


def test_errors_of_the_framework_have_codes(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = problem(client.get("/nowhere%1b[31m"), 404)
    assert unknown["type"] == "urn:pcae-serve:unknown-route"
    assert "'/nowhere\\x1b[31m'" in unknown["detail"]
    wrong = client.get("/classify")
    assert problem(wrong, 405)["type"] == "urn:pcae-serve:method-not-allowed"
    assert wrong.headers["allow"] == "POST"
    monkeypatch.setattr(Service, "require_ready", lambda _: 1 / 0)
    assert problem(client.get("/readyz"), 500)["type"] == "urn:pcae-serve:internal-error"


def test_under_v2_errors_of_the_framework_have_the_protocols_form(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no route '/v2/nowhere'" in error(client.get("/v2/nowhere"), 404)
    assert "does not accept 'DELETE'" in error(client.delete("/v2"), 405)
    monkeypatch.setattr(Service, "require_ready", lambda _: 1 / 0)
    assert "unexpected error" in error(client.get("/v2/health/ready"), 500)
    problem(client.get("/v2x"), 404)


def test_an_engine_error_fails_only_its_batch(
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
        image = image_bytes(size=(400, 400))  # for a thread
        document = problem(client.post("/classify?budget_ms=200", content=image), 504)
        assert "before the image was received and decoded" in document["detail"]


def test_out_of_memory_is_503(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    before = outcomes(client)
    for where in ("Image.open", "ImageFile.ImageFile.load"):  # its header, its pixels
        with monkeypatch.context() as patched:
            patched.setattr(f"PIL.{where}", no_memory)
            refused = client.post("/classify", content=image_bytes())
        assert "too little memory" in problem(refused, 503)["detail"]
        assert refused.headers["retry-after"] == "1"
    assert outcomes(client) - before == {"failed": 2}
    assert caplog.text.count("too little memory") == 2
    assert client.post("/classify", content=image_bytes()).status_code == 200


@pytest.mark.parametrize("path", ["/classify", "/tiers"])
def test_out_of_memory_anywhere_in_a_route_is_503(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Also in what is not decoding: the answer's document, or a route without an image."""

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    for target in ("runtime.results.classification", "api.tier_routes.describe_bundle"):
        monkeypatch.setattr(f"pcae_serve.{target}", no_memory)
    method = "POST" if path == "/classify" else "GET"
    refused = client.request(method, path, content=image_bytes() if method == "POST" else None)
    assert problem(refused, 503)["type"] == "urn:pcae-serve:out-of-memory"
    assert refused.headers["retry-after"] == "1"


class Watched(bytes):
    """A body that reports when its memory is free."""

    freed = 0

    def __del__(self) -> None:
        Watched.freed += 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (image_bytes(), 200),
        (b"not an image", 415),
        (image_bytes(9, "PNG", (64, 64))[:-30], 400),  # from a decoder's thread
        (image_bytes(), 503),
    ],
    ids=["answered", "not an image", "truncated", "no memory"],
)
def test_the_memory_of_a_body_is_free_once_it_is_answered(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, body: bytes, status: int
) -> None:
    """Without a garbage collection: errors of tasks are parts of reference cycles."""

    async def read(*_: Any) -> bytes:
        return Watched(body)

    monkeypatch.setattr("pcae_serve.api.form.read_body", read)
    monkeypatch.setattr(Watched, "freed", 0)
    if status == 503:
        monkeypatch.setattr(ParallelWork, "try_add", lambda *_: False)
    gc.collect()
    gc.disable()
    try:
        assert client.post("/classify", content=b"x").status_code == status
        wait_until(lambda: Watched.freed == 1)
    finally:
        gc.enable()


class Hard(Greedy):
    """Drops the first request for the sake of all others."""

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
    # the scheduler would not let it drop a request that has time left
    monkeypatch.setattr(scheduler, "keep_feasible", lambda choice, *_, **__: choice)
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
    assert document["type"] == "urn:pcae-serve:dropped"
    assert refused.headers["retry-after"] == "1"
    assert answered.status_code == 200
    assert "chosen by policy 'hard' under the current load" in answered.json()["reason"]
