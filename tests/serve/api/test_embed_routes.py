"""POST /embed, in process with the simulated engine."""

import pytest
from fastapi.testclient import TestClient

from tests.support.apps import problem
from tests.support.images import image_bytes


def test_a_bundle_without_a_head_answers_with_features(headless: TestClient) -> None:
    response = headless.post("/embed?tier=fast&budget_ms=8000", content=image_bytes(255))
    answer = response.json()
    assert response.status_code == 200, answer
    assert answer["features"] == [0, 0, 0, 0, 0, 0, 0, 5]
    reported = {key: answer[key] for key in ("tier", "keep_ratio", "tokens", "budget_ms", "reason")}
    assert reported == {
        "tier": "fast",
        "keep_ratio": 0.6,
        "tokens": [9, 5, 3],
        "budget_ms": 8000,
        "reason": "requested by name",
    }
    assert answer["kept"] is None
    assert set(answer["timings_ms"]) == {"decode", "queue", "compute", "total"}
    assert response.headers["server-timing"].startswith("decode;dur=")
    form = headless.post("/embed?explain=true", files={"image": ("a.png", image_bytes(255))})
    assert form.json()["features"] == answer["features"]
    assert [len(stage) for stage in form.json()["kept"]] == [16, 16, 16]


def test_embed_refuses_what_classify_refuses(headless: TestClient) -> None:
    problem(headless.post("/embed", content=b""), 400)
    problem(headless.post("/embed", content=b"just some text"), 415)
    problem(headless.post("/embed", content=bytes(200_000)), 413)
    problem(headless.post("/embed?tier=turbo", content=image_bytes()), 422)
    header = {"X-Latency-Budget-Ms": "1"}
    assert problem(headless.post("/embed", content=image_bytes(), headers=header), 422)["needed_ms"]


@pytest.mark.parametrize("body", [image_bytes(), bytes(200_000)], ids=["image", "too large"])
def test_the_route_of_the_other_task_names_the_right_one(
    client: TestClient, headless: TestClient, body: bytes
) -> None:
    document = problem(client.post("/embed", content=body), 404)
    assert "/classify" in document["detail"]
    assert document["type"] == "urn:pcae-serve:task-not-supported"
    assert "/embed" in problem(headless.post("/classify", content=body), 404)["detail"]
