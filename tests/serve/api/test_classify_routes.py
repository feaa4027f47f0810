"""POST /classify and /classify/batch, in process with the simulated engine."""

from collections import Counter
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.service import Service
from tests.support.apps import MakeSettings, batch, outcomes, problem, quick, serving
from tests.support.images import image_bytes


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
    assert answer["budget_ms"] == 20_000
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
        ("tier=auto&budget_ms=10000", "full"),
        ("min_tier=balanced", "full"),
        ("tier=balanced&min_tier=fast", "balanced"),
    ],
)
def test_the_tier_is_the_requested_one_or_the_best_that_fits(
    client: TestClient, query: str, tier: str
) -> None:
    answer = client.post(f"/classify?{query}", content=image_bytes()).json()
    assert answer["tier"] == tier
    assert answer["reason"]


def test_a_smaller_budget_gets_a_faster_tier(small_bundle: Bundle, settings: MakeSettings) -> None:
    """The budget lies far from what the tiers need: 1, 2 and 500 ms."""
    engine = SimulatedEngine(
        small_bundle, seconds=lambda tier, _: 0.5 if tier.name == "full" else tier.macs * 1e-6
    )
    with serving(Service(settings(), small_bundle, [engine])) as client:
        for _ in range(50):  # on a busy machine, the budget may pass before the image is decoded
            response = client.post("/classify?budget_ms=400", content=image_bytes())
            if response.status_code == 200:
                break
    assert response.json()["tier"] == "balanced"


def test_top_k_and_explain(client: TestClient) -> None:
    answer = client.post("/classify?tier=fast&top_k=2&explain=true", content=image_bytes()).json()
    assert len(answer["predictions"]) == 2
    assert [len(stage) for stage in answer["kept"]] == [9, 5, 3]


def test_the_budget_parameter_takes_precedence_over_the_header(client: TestClient) -> None:
    headers = {"X-Latency-Budget-Ms": "17000"}
    by_header = client.post("/classify", content=image_bytes(), headers=headers).json()
    both = client.post("/classify?budget_ms=18000", content=image_bytes(), headers=headers).json()
    assert (by_header["budget_ms"], both["budget_ms"]) == (17_000, 18_000)


def test_each_image_of_a_batch_is_answered_or_refused_by_itself(client: TestClient) -> None:
    files = batch(image_bytes(250), b"no image", image_bytes(20), b"")
    before = outcomes(client)
    answer = client.post("/classify/batch?tier=fast&budget_ms=5000&top_k=1", files=files)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [result["status"] for result in results] == [200, 415, 200, 400]
    labels = [r["answer"] and r["answer"]["predictions"][0]["label"] for r in results]
    assert labels == ["bright", None, "dark", None]
    assert results[0]["answer"]["tier"] == "fast"
    assert results[1]["problem"]["type"] == "urn:pcae-serve:unsupported-type"
    assert outcomes(client) - before == {"in_time": 2, "unreadable": 2}


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
def test_a_batch_that_cannot_be_read_is_refused(
    client: TestClient, files: Any, headers: dict[str, str], status: int, words: str
) -> None:
    response = client.post("/classify/batch", files=files, headers=headers)
    assert words in problem(response, status)["detail"]
