"""POST /classify and /classify/batch, in process with the simulated engine."""

import gzip
from collections import Counter
from typing import Any

import numpy as np
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


def test_the_budget_may_be_a_header(client: TestClient) -> None:
    headers = {"X-Latency-Budget-Ms": "17000"}
    answer = client.post("/classify", content=image_bytes(), headers=headers).json()
    assert answer["budget_ms"] == 17_000
    both = client.post("/classify?budget_ms=18000", content=image_bytes(), headers=headers)
    detail = problem(both, 422)["detail"]
    assert detail == "budget_ms is '18000' in the query and '17000' in the header; give it once"


def test_fields_of_a_form_count_like_the_query(client: TestClient) -> None:
    image = ("dress.png", image_bytes(250))
    fields = {"tier": "fast", "top_k": "1", "budget_ms": "15000", "explain": "true"}
    answer = client.post("/classify", data=fields, files={"image": image}).json()
    assert (answer["tier"], answer["budget_ms"]) == ("fast", 15_000)
    assert len(answer["predictions"]) == 1
    assert answer["kept"] is not None
    rest = {"top_k": "1"}
    batched = client.post("/classify/batch?tier=fast", data=rest, files={"image": image}).json()
    assert batched["results"][0]["answer"]["tier"] == "fast"
    assert len(batched["results"][0]["answer"]["predictions"]) == 1


def test_a_form_may_raise_the_budget_above_the_default(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    engine = SimulatedEngine(small_bundle, seconds=quick)
    service = Service(settings(budget_ms=1), small_bundle, [engine])
    with serving(service) as short:
        problem(short.post("/classify", files={"image": image_bytes()}), 422)
        fields = {"budget_ms": "60000"}
        answer = short.post("/classify", data=fields, files={"image": image_bytes()})
        assert answer.json()["budget_ms"] == 60_000


@pytest.mark.parametrize(
    ("query", "fields", "files", "words"),
    [
        ("topk=1", {}, ["image"], "unknown parameter 'topk' in the query; did you mean top_k?"),
        ("budget=5", {}, ["image"], "unknown parameter 'budget' in the query; did you mean budget"),
        ("", {"topk": "1"}, ["image"], "unknown field 'topk' in the form; did you mean top_k?"),
        (
            "",
            {},
            ["image", "meta"],
            "file field 'meta' in the form; the only file field is 'image'",
        ),
        ("", {}, ["photo"], "unknown file field 'photo' in the form; the only file field is"),
        ("", {"image": "x"}, [], "the field 'image' is text; send the file"),
        ("tier=fast", {"tier": "full"}, ["image"], "tier is 'fast' in the query and 'full' in the"),
        ("", {"tier": "none"}, ["image"], "tier 'none' is unknown"),
        ("", {"budget_ms": "-1"}, ["image"], "budget_ms '-1': input should be greater than 0"),
    ],
)
@pytest.mark.parametrize("route", ["/classify", "/classify/batch"])
def test_what_would_be_ignored_is_refused(
    client: TestClient, route: str, query: str, fields: Any, files: list[str], words: str
) -> None:
    parts = [(name, (f"{name}.png", image_bytes())) for name in files]
    if not parts:  # only then does httpx send a form
        parts = [(name, (None, value)) for name, value in fields.items()]  # type: ignore[misc]
        fields = {}
    response = client.post(f"{route}?{query}", data=fields, files=parts)
    assert words in problem(response, 422)["detail"]


def test_several_images_belong_to_a_batch(client: TestClient) -> None:
    response = client.post("/classify", files=batch(image_bytes(), image_bytes()))
    detail = problem(response, 422)["detail"]
    assert detail == "the form has 2 fields 'image'; send several images to /classify/batch"


@pytest.mark.parametrize("route", ["/classify", "/classify/batch"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
def test_a_compressed_body_is_refused_by_name(
    client: TestClient, route: str, encoding: str
) -> None:
    headers = {"Content-Encoding": encoding}
    response = client.post(route, content=gzip.compress(image_bytes()), headers=headers)
    assert f"content encoding '{encoding}' is not supported" in problem(response, 415)["detail"]
    same = {"Content-Encoding": "identity"}
    assert client.post("/classify", content=image_bytes(), headers=same).status_code == 200


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


@pytest.mark.parametrize("route", ["/classify", "/classify/batch"])
def test_requests_with_invalid_form_fields_are_not_counted(client: TestClient, route: str) -> None:
    before = outcomes(client)
    answer = client.post(route, files=batch(image_bytes()), data={"budget_mz": "50"})
    problem(answer, 422)
    assert outcomes(client) - before == {}


def test_images_of_a_batch_do_not_slip_past_the_limit(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    """What does not fit is refused image by image, not as a whole, and counts as alone."""
    engine = SimulatedEngine(small_bundle, seconds=quick)
    with serving(Service(settings(queue_limit=8), small_bundle, [engine])) as client:
        files = batch(*[image_bytes(250)] * 30)
        answer = client.post("/classify/batch?budget_ms=60000", files=files)
    statuses = Counter(result["status"] for result in answer.json()["results"])
    assert statuses == {200: 9, 503: 21}  # one runs at once, eight wait


@pytest.mark.parametrize(
    ("files", "headers", "status", "words"),
    [
        (None, {}, 415, "multipart/form-data"),
        (batch(*[b"x"] * 65), {}, 413, "more than 64 files"),
        (batch(*[bytes(60_000)] * 2), {}, 413, "over the limit of 100,000 bytes"),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused(
    client: TestClient, files: Any, headers: dict[str, str], status: int, words: str
) -> None:
    response = client.post("/classify/batch", files=files, headers=headers)
    assert words in problem(response, status)["detail"]


@pytest.mark.parametrize("charset", ["punycode", "undefined", "utf-16", "none-such"])
def test_the_text_of_a_form_is_utf_8(client: TestClient, charset: str) -> None:
    """Python decodes a megabyte of punycode for minutes, and fails to decode `undefined`."""
    body = b'--B\r\nContent-Disposition: form-data; name="tier"\r\n\r\nauto\r\n--B--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=B; charset={charset}"}
    response = client.post("/classify", content=body, headers=headers)
    assert charset in problem(response, 415)["detail"]


def test_independent_labels_have_probabilities_of_their_own(multi_label: TestClient) -> None:
    answer = multi_label.post("/classify?top_k=3", content=image_bytes()).json()
    first, *others = answer["predictions"]
    assert first["probability"] == pytest.approx(1 / (1 + np.exp(-5.0)), abs=1e-6)
    assert [each["probability"] for each in others] == [0.5, 0.5]  # they need not sum to 1
    assert multi_label.get("/tiers").json()["answers"] == "labels"
    assert multi_label.post("/embed", content=image_bytes()).status_code == 404
