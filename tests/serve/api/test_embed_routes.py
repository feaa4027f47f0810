"""POST /embed, in process with the simulated engine."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from pcae_serve.bundle.reader import load_bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from tests.support.apps import batch, problem, quick, serving
from tests.support.bundles import backbone, write_bundle
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
        "reason": "the request names this tier",
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


RAW, NPY = "application/octet-stream", "application/x-npy"


def test_features_of_length_1_in_float16(headless: TestClient) -> None:
    answer = headless.post("/embed?normalize=true&dtype=float16", content=image_bytes(255)).json()
    assert answer["features"] == [0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(("dtype", "order"), [("float32", "<f4"), ("float16", "<f2")])
def test_features_as_an_array(headless: TestClient, dtype: str, order: str) -> None:
    url = f"/embed?tier=fast&dtype={dtype}"
    raw = headless.post(url, content=image_bytes(255), headers={"Accept": RAW})
    assert raw.headers["content-type"] == RAW
    assert np.frombuffer(raw.content, order).tolist() == [0, 0, 0, 0, 0, 0, 0, 5]
    stated = [raw.headers[name] for name in ("x-shape", "x-dtype", "x-tier", "x-met-budget")]
    assert stated == ["8", dtype, "fast", "true"]
    assert raw.headers["vary"] == "Accept"
    assert "server-timing" in raw.headers
    npy = headless.post(url, content=image_bytes(255), headers={"Accept": NPY})
    loaded = np.load(BytesIO(npy.content), allow_pickle=False)
    assert (loaded.dtype, loaded.tobytes()) == (np.dtype(order), raw.content)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("text/html", "application/json"),
        (f"{RAW};q=0.5, application/json", "application/json"),
        (f"application/json;q=0.1, {NPY};q=x, {RAW};q=0.5", RAW),
        (f"{NPY}, {RAW}", NPY),
    ],
)
def test_the_form_that_the_client_prefers(headless: TestClient, accept: str, kind: str) -> None:
    response = headless.post("/embed", content=image_bytes(), headers={"Accept": accept})
    assert response.headers["content-type"] == kind


@pytest.mark.parametrize(
    ("query", "accept", "words"),
    [
        ("dtype=int8", "*/*", "dtype 'int8': input should be 'float32' or 'float16'"),
        ("normalize=maybe", "*/*", "normalize 'maybe': input should be a valid boolean"),
        ("normalise=true", "*/*", "did you mean normalize?"),
        ("explain=true", RAW, "explain needs an answer in JSON"),
    ],
)
def test_what_an_answer_cannot_be_is_refused(
    headless: TestClient, query: str, accept: str, words: str
) -> None:
    for route, body in (
        ("/embed", {"content": image_bytes()}),
        ("/embed/batch", {"files": batch(image_bytes())}),
    ):
        response = headless.post(f"{route}?{query}", headers={"Accept": accept}, **body)
        assert words in problem(response, 422)["detail"]


def test_each_image_of_a_batch_has_features_or_a_problem(headless: TestClient) -> None:
    images = batch(image_bytes(255), b"no image", image_bytes(0))
    items = headless.post("/embed/batch?normalize=true", files=images).json()["results"]
    assert [item["status"] for item in items] == [200, 415, 200]
    assert items[0]["answer"]["features"] == [0, 0, 0, 0, 0, 0, 0, 1]
    assert items[1]["problem"]["type"] == "urn:pcae-serve:unsupported-type"
    raw = headless.post("/embed/batch?tier=fast", files=images, headers={"Accept": RAW})
    stated = [raw.headers[name] for name in ("x-shape", "x-status", "x-tier", "x-met-budget")]
    assert stated == ["2,8", "200,415,200", "fast,fast", "true,true"]
    assert np.frombuffer(raw.content, "<f4").reshape(2, 8)[:, [0, 7]].tolist() == [[0, 5], [5, 0]]
    broken = batch(b"no image")
    raw = headless.post("/embed/batch", files=broken, headers={"Accept": RAW})
    assert (raw.headers["x-shape"], raw.content) == ("0,0", b"")


#: The grid of the simulated engine, and the same with vectors of length 1.
GRID = np.repeat(np.arange(1, 17, dtype=np.float32).reshape(4, 4, 1), 6, axis=2)
UNIT = np.full((4, 4, 6), 6**-0.5)


def test_patches_come_with_the_features_if_they_are_asked_for(dense: TestClient) -> None:
    assert dense.get("/tiers").json()["patch_grid"] == [4, 4, 6]
    assert dense.post("/embed", content=image_bytes()).json()["patches"] is None
    answer = dense.post("/embed?patches=true&tier=fast", content=image_bytes(255)).json()
    assert answer["patches"] == GRID.tolist()
    assert (answer["features"], answer["tier"]) == ([0, 0, 0, 0, 0, 0, 0, 5], "fast")
    unit = dense.post(
        "/embed?normalize=true&dtype=float16",
        files={"image": ("a.png", image_bytes())},
        data={"patches": "true"},
    ).json()["patches"]
    np.testing.assert_allclose(unit, UNIT, rtol=1e-3)


def test_patches_as_arrays(dense: TestClient) -> None:
    url = "/embed?patches=true"
    raw = dense.post(url, content=image_bytes(), headers={"Accept": RAW})
    assert (raw.headers["x-shape"], raw.headers["x-patches-shape"]) == ("8", "4,4,6")
    assert np.array_equal(np.frombuffer(raw.content, "<f4")[8:], GRID.ravel())
    file = BytesIO(dense.post(url, content=image_bytes(), headers={"Accept": NPY}).content)
    assert np.load(file).shape == (8,)
    assert np.array_equal(np.load(file), GRID)


def test_patches_of_a_batch(dense: TestClient) -> None:
    url, images = "/embed/batch?patches=true", batch(image_bytes(), b"no image", image_bytes())
    items = dense.post(url, files=images).json()["results"]
    assert [item["status"] for item in items] == [200, 415, 200]
    assert items[2]["answer"]["patches"] == GRID.tolist()
    assert items[1]["answer"] is None
    raw = dense.post(url, files=images, headers={"Accept": RAW})
    assert raw.headers["x-patches-shape"] == "2,4,4,6"
    numbers = np.frombuffer(raw.content, "<f4")[16:]
    assert np.array_equal(numbers.reshape(2, 4, 4, 6), np.stack([GRID, GRID]))


def test_a_bundle_without_patches_says_how_to_export_them(headless: TestClient) -> None:
    assert headless.get("/tiers").json()["patch_grid"] is None
    document = problem(headless.post("/embed?patches=true", content=image_bytes()), 404)
    assert document["type"] == "urn:pcae-serve:task-not-supported"
    assert "export it again with --dense" in document["detail"]
    files = {"image": ("a.png", image_bytes())}
    refused = headless.post("/embed", files=files, data={"patches": "true"})
    assert "--dense" in problem(refused, 404)["detail"]


def test_patches_count_in_the_memory_budget_until_they_are_sent(tmp_path: Path) -> None:
    served = load_bundle(write_bundle(tmp_path / "bundle", **backbone(patch_width=20_000)))
    known = Settings(cache_dir=tmp_path, profile_s=0.1, memory_mb=10, budget_ms=20_000)
    service = Service(known, served, [SimulatedEngine(served, seconds=quick)])
    memory = service._resources.memory
    with serving(service) as client:
        too_large = problem(client.post("/embed?patches=true", content=image_bytes()), 413)
        assert "19,200,192 bytes of memory" in too_large["detail"]
        assert "accept application/octet-stream" in too_large["detail"]
        memory.peak_bytes = 0
        raw = client.post("/embed?patches=true", content=image_bytes(), headers={"Accept": RAW})
        assert len(raw.content) == 4 * (8 + 16 * 20_000)
        assert memory.peak_bytes >= 16 * 16 * 20_000
        assert memory.used_bytes == 0
