"""/v2, the Open Inference Protocol, in process."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from pcae_serve.api.app import create_app
from pcae_serve.api.inference_routes import EXAMPLES
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.open_inference.schema import InferResponse
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from tests.support.apps import MakeSettings, busy, fail, outcomes, quick, serving, wait_until
from tests.support.bundles import backbone, manifest, write_bundle
from tests.support.gate import Gate
from tests.support.images import image_bytes
from tests.support.inference_requests import (
    INFER,
    LENGTH,
    elements,
    error,
    files,
    numbers,
    outputs,
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("classes")
    served = load_bundle(write_bundle(root / "bundle"))
    engine = SimulatedEngine(served, seconds=quick)
    known = Settings(
        cache_dir=root, profile_s=0.1, max_body_mb=0.1, max_pixels=10_000, budget_ms=20_000
    )
    with serving(Service(known, served, [engine])) as client:
        yield client


# --- health and metadata


def test_health(client: TestClient) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/test", "/v2/models/test/versions/1"):
        assert client.get(f"{path}/ready").json() == {"name": "test", "ready": True}


def test_metadata(client: TestClient) -> None:
    document = client.get("/v2").json()
    assert document["name"] == "pcae-serve"
    assert document["extensions"] == ["binary_tensor_data", "classification"]
    model = client.get("/v2/models/test").json()
    assert model == client.get("/v2/models/test/versions/1").json()
    assert model["name"] == "test"
    assert model["versions"] == ["1"]
    assert model["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert model["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 4]},
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
    ]
    assert model["parameters"] == {
        "tiers": "fast,balanced,full",
        "budget_ms": 20_000,
        "max_images": 64,
    }


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/test/versions/2"])
def test_an_unknown_model_or_version(client: TestClient, path: str) -> None:
    for response in (client.get(path), client.get(f"{path}/ready"), client.post(f"{path}/infer")):
        assert "'test'" in error(response, 404)


def test_not_ready_is_503_and_never_400(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    gate.shut()
    service = Service(settings(), small_bundle, [gate])
    with serving(service, ready=False) as client:
        refused = client.get("/v2/health/ready")
        assert refused.headers["retry-after"] == "1"
        error(refused, 503)
        error(client.get("/v2/models/test/ready"), 503)
        error(client.post(INFER, json=files(image_bytes())), 503)
        assert client.get("/v2/health/live").status_code == 200
        gate.open.set()
        wait_until(lambda: service.ready)
        assert client.get("/v2/health/ready").status_code == 200


# --- images in

LEVELS = (10, 100, 250)
GREY = np.stack([np.full((8, 8, 3), level, np.uint8) for level in LEVELS])


@pytest.mark.parametrize("url", [INFER, "/v2/models/test/versions/1/infer"])
def test_image_files_as_json(client: TestClient, url: str) -> None:
    request = files(*map(image_bytes, LEVELS), id="seven", parameters={"budget_ms": 5000})
    response = client.post(url, json=request)
    answer = InferResponse.model_validate(response.json(), extra="forbid")
    assert (answer.model_name, answer.model_version, answer.id) == ("test", "1", "seven")
    assert answer.parameters.budget_ms == 5000
    assert answer.parameters.tier == "full,full,full"
    assert answer.parameters.met_budget == "true,true,true"
    assert len(answer.parameters.reason.split("; ")) == 3
    by_name = outputs(response)
    assert by_name["label"]["data"] == ["dark", "dim", "bright"]
    assert by_name["logits"]["shape"] == [3, 4]
    assert by_name["logits"]["data"] == [5, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 5]


def test_pixels_arrive_as_they_were(small_bundle: Bundle, settings: MakeSettings) -> None:
    """Colours and rows in their order: the engine sees what was sent."""
    seen: list[Pixels] = []

    class Seeing(SimulatedEngine):
        def run(self, tier: Any, pixels: Pixels) -> Output:
            seen.append(pixels)
            return super().run(tier, pixels)

    sent = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    engine = Seeing(small_bundle, seconds=quick)
    service = Service(settings(budget_ms=60_000), small_bundle, [engine])
    with serving(service) as client:
        by_name = outputs(client.post(INFER, json=numbers(sent)))
    assert by_name["logits"]["shape"] == [1, 4]
    assert np.array_equal(seen[-1], sent[None])


def test_the_body_may_be_one_image_file(client: TestClient) -> None:
    response = client.post(INFER, content=image_bytes(250), headers={LENGTH: "0"})
    assert outputs(response)["label"]["data"] == ["bright"]


def test_images_of_one_request_are_scheduled_separately(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    service = Service(settings(), small_bundle, [gate])
    with serving(service) as client, busy(client, gate):
        gate.open.set()
        request = files(*[image_bytes()] * 12, parameters={"budget_ms": 20_000})
        by_name = outputs(client.post(INFER, json=request))
        assert by_name["logits"]["shape"] == [12, 4]
        assert 'outcome="in_time"} 13.0' in client.get("/metrics").text
    assert sum(gate.batches) == 13
    assert max(gate.batches) > 1


# --- parameters and outputs


def test_parameters(client: TestClient, instant: TestClient) -> None:
    def tier(client: TestClient, **parameters: Any) -> Any:
        answer = client.post(INFER, json=files(image_bytes(), parameters=parameters)).json()
        return answer["parameters"]["tier"]

    assert tier(client, tier="fast") == "fast"
    assert tier(client, tier="balanced", min_tier="fast", priority=3, timeout=9) == "balanced"
    assert tier(instant) == "fast"  # its policy would have it so
    assert tier(instant, min_tier="full") == "full"
    answer = client.post(INFER, json=files(image_bytes(), parameters={"tier": "fast"})).json()
    assert answer["parameters"] == {
        "tier": "fast",
        "reason": "the request names this tier",
        "looks": "1",
        "met_budget": "true",
        "budget_ms": 20_000,
    }


@pytest.mark.parametrize(
    ("parameters", "status", "words"),
    [
        ({"tier": "turbo"}, 422, "fast, balanced, full, auto"),
        ({"min_tier": "turbo"}, 422, "fast, balanced, full"),
        ({"tier": "fast", "min_tier": "full"}, 422, "below"),
        ({"budget_ms": 1}, 422, "'fast'"),
        ({"budget_ms": -5}, 400, "parameters.budget_ms"),
        ({"budget_ms": "soon"}, 400, "parameters.budget_ms"),
        ({"budget_ms": 1e999}, 400, "JSON"),
        ({"tier": 3}, 400, "parameters.tier"),
        ({"binary_data_output": "yes"}, 400, "parameters.binary_data_output"),
    ],
)
def test_invalid_parameters(
    client: TestClient, parameters: dict[str, Any], status: int, words: str
) -> None:
    content = json.dumps(files(image_bytes(), parameters=parameters))
    assert words in error(client.post(INFER, content=content), status)


def test_an_unknown_tier_is_reported_once_for_all_images(client: TestClient) -> None:
    request = files(image_bytes(), image_bytes(), parameters={"tier": "turbo"})
    assert error(client.post(INFER, json=request), 422).startswith("tier 'turbo' is unknown")


def test_only_requested_outputs_are_returned(client: TestClient) -> None:
    def names(*wanted: Any) -> list[str]:
        request = files(image_bytes(), outputs=[{"name": name} for name in wanted])
        return list(outputs(client.post(INFER, json=request)))

    assert names("label") == ["label"]
    assert names("label", "logits") == ["label", "logits"]
    assert names() == ["logits", "label"]


@pytest.mark.parametrize("default", [True, False])
def test_outputs_as_binary_data(client: TestClient, default: bool) -> None:
    request = files(
        image_bytes(250),
        image_bytes(10),
        parameters={"binary_data_output": default},
        outputs=[{"name": "label"}, {"name": "logits", "parameters": {"binary_data": not default}}],
    )
    response = client.post(INFER, json=request)
    assert response.headers["content-type"] == "application/octet-stream"
    by_name = outputs(response)
    assert by_name["label"]["data"] == ["bright", "dark"]
    assert by_name["logits"]["data"] == [0, 0, 0, 5, 5, 0, 0, 0]
    assert ("parameters" in by_name["label"]) is default
    assert ("parameters" in by_name["logits"]) is not default


def test_classification(client: TestClient) -> None:
    def best(count: int) -> Any:
        output = {"name": "logits", "parameters": {"classification": count}}
        request = files(image_bytes(250), image_bytes(10), outputs=[output])
        return outputs(client.post(INFER, json=request))["logits"]

    assert best(2) == {
        "name": "logits",
        "datatype": "BYTES",
        "shape": [2, 2],
        "data": ["5.000000:3:bright", "0.000000:0:dark", "5.000000:0:dark", "0.000000:1:dim"],
    }
    assert best(99)["shape"] == [2, 4]


def test_a_bundle_without_a_head_answers_with_features(
    tmp_path: Path, settings: MakeSettings
) -> None:
    models = {"vit": manifest({})["models"]["vit"] | {"answers": "features"}}
    served = load_bundle(write_bundle(tmp_path / "headless", labels=[], models=models))
    service = Service(settings(), served, [SimulatedEngine(served, seconds=quick)])
    with serving(service) as client:
        offered = client.get("/v2/models/test").json()["outputs"]
        assert offered == [{"name": "features", "datatype": "FP32", "shape": [-1, 8]}]
        by_name = outputs(client.post(INFER, json=files(image_bytes(255))))
        wanted = [{"name": "features", "parameters": {"classification": 2}}]
        error(client.post(INFER, json=files(image_bytes(255), outputs=wanted)), 400)
        halves = {"datatype": "FP16", "normalize": True}
        wanted = [{"name": "features", "parameters": halves}]
        half = client.post(INFER, json=files(image_bytes(255), outputs=wanted))
        values = np.frombuffer(half.content[int(half.headers[LENGTH]) :], "<f2")
        assert values.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
        wanted = [{"name": "features", "parameters": halves | {"binary_data": False}}]
        message = error(client.post(INFER, json=files(image_bytes(255), outputs=wanted)), 400)
        assert message.startswith("FP16 is always binary")
    assert by_name.keys() == {"features"}
    assert by_name["features"]["data"] == [0, 0, 0, 0, 0, 0, 0, 5]


#: The grid of the simulated engine.
GRID = np.repeat(np.arange(1, 17, dtype=np.float32).reshape(4, 4, 1), 6, axis=2)


def patches_of(response: Any, dtype: str) -> Any:
    """The values of the output `patches`, the last one; it must be binary."""
    assert response.status_code == 200, response.text
    length = int(response.headers[LENGTH])
    *_, last = json.loads(response.content[:length])["outputs"]
    assert (last["name"], "data" in last) == ("patches", False)
    data = response.content[-last["parameters"]["binary_data_size"] :]
    return np.frombuffer(data, dtype).reshape(last["shape"])


def test_patches_are_an_output_if_they_are_requested(dense: TestClient) -> None:
    offered = dense.get("/v2/models/test").json()["outputs"]
    assert offered[1] == {"name": "patches", "datatype": "FP32", "shape": [-1, 4, 4, 6]}
    two = files(image_bytes(255), image_bytes(0))
    assert outputs(dense.post(INFER, json=two)).keys() == {"features"}
    names = [{"name": "features"}, {"name": "patches"}]
    response = dense.post(INFER, json=two | {"outputs": names})
    assert np.array_equal(patches_of(response, "<f4"), np.stack([GRID, GRID]))
    first = json.loads(response.content[: int(response.headers[LENGTH])])["outputs"][0]
    assert first["data"] == [0, 0, 0, 0, 0, 0, 0, 5, 5, 0, 0, 0, 0, 0, 0, 0]
    unit = {"datatype": "FP16", "normalize": True}
    wanted = [{"name": "patches", "parameters": unit}]
    halves = patches_of(dense.post(INFER, json=two | {"outputs": wanted}), "<f2")
    np.testing.assert_allclose(halves, np.full((2, 4, 4, 6), 6**-0.5), rtol=1e-3)


def test_patches_that_cannot_be_returned(client: TestClient, headless: TestClient) -> None:
    for bundle, offered in ((client, "logits, label"), (headless, "features")):
        wanted = files(image_bytes(), outputs=[{"name": "patches"}])
        message = error(bundle.post(INFER, json=wanted), 400)
        assert message.endswith(f"choose from {offered}; this bundle was exported without --dense")


@pytest.mark.parametrize("parameters", [{"binary_data": False}, {"classification": 3}])
def test_patches_in_other_forms(dense: TestClient, parameters: dict[str, Any]) -> None:
    wanted = [{"name": "patches", "parameters": parameters}]
    message = error(dense.post(INFER, json=files(image_bytes(), outputs=wanted)), 400)
    assert message.startswith("output 'patches' ")


class _WithoutPatches:
    """An engine as those for GPUs are: it returns features only."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.name, self.version, self.device = engine.name, engine.version, engine.device
        self.threads, self.sizes = engine.threads, engine.sizes
        self.run, self.terminate, self.close = engine.run, engine.terminate, engine.close


def test_a_backend_without_patches_does_not_offer_them(
    tmp_path: Path, settings: MakeSettings
) -> None:
    served = load_bundle(write_bundle(tmp_path / "dense", **backbone(patch_width=6)))
    engine = _WithoutPatches(SimulatedEngine(served, seconds=quick))
    with serving(Service(settings(), served, [engine])) as client:
        names = [each["name"] for each in client.get("/v2/models/test").json()["outputs"]]
        assert names == ["features"]
        wanted = files(image_bytes(), outputs=[{"name": "patches"}])
        assert "does not return patches" in error(client.post(INFER, json=wanted), 404)


def test_patches_count_in_the_memory_budget_until_they_are_sent(
    tmp_path: Path, settings: MakeSettings
) -> None:
    served = load_bundle(write_bundle(tmp_path / "wide", **backbone(patch_width=20_000)))
    known = settings(memory_mb=15, budget_ms=20_000)
    service = Service(known, served, [SimulatedEngine(served, seconds=quick)])
    memory, wanted = service._resources.memory, {"outputs": [{"name": "patches"}]}
    with serving(service) as client:
        response = client.post(INFER, json=files(image_bytes()) | wanted)
        assert patches_of(response, "<f4").shape == (1, 4, 4, 20_000)
        assert memory.peak_bytes >= 16 * 16 * 20_000
        assert memory.used_bytes == 0
        several = files(*[image_bytes()] * 4) | wanted
        assert client.post(INFER, json=several).status_code == 503
        assert memory.used_bytes == 0


# --- faults

BMP = image_bytes(9, "BMP")


@pytest.mark.parametrize(
    ("content", "length", "words"),
    [
        (elements(BMP), "99999", "but the body has"),
        (elements(BMP), "-1", "must be a number of bytes"),
        (elements(BMP), "1e3", "must be a number of bytes"),
        (elements(BMP), "9" * 5000, "must be a number of bytes"),
        (b"", "0", "empty"),
    ],
)
def test_a_wrong_length_of_the_json_is_refused(
    client: TestClient, content: bytes, length: str, words: str
) -> None:
    assert words in error(client.post(INFER, content=content, headers={LENGTH: length}), 400)


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        (files(b""), 400, "empty"),
        (files(b"just some text"), 415, "JPEG"),
        (files(image_bytes(9, "PNG", (64, 64))[:-30]), 400, "truncated"),
        (files(image_bytes(size=(101, 101))), 413, "101 x 101"),
        (files(image_bytes(), image_bytes(), b"text"), 415, "image 2: "),
        (files(*[b"x"] * 65), 413, "65 images"),
        (files(bytes(80_000)), 413, "100,000 bytes"),
        (b"{}", 400, "inputs: "),
        (files(BMP, tensor={"data": ["no base64!"]}), 400, "base64"),
        (files(BMP, outputs=[{"name": "features"}]), 400, "choose from logits, label"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_are_reported_in_the_form_of_the_protocol(
    client: TestClient, request_: Any, status: int, words: str
) -> None:
    content = request_ if isinstance(request_, bytes) else json.dumps(request_)
    assert words in error(client.post(INFER, content=content), status)


@pytest.mark.parametrize("max_images", [3, 100])
def test_max_images_is_the_limit(
    small_bundle: Bundle, settings: MakeSettings, max_images: int
) -> None:
    known = settings(max_images=max_images, budget_ms=60_000, profile_s=0.1)
    engine = SimulatedEngine(small_bundle, seconds=lambda *_: 1e-3)
    with serving(Service(known, small_bundle, [engine])) as client:
        metadata = client.get("/v2/models/test").json()
        assert metadata["parameters"]["max_images"] == max_images
        by_name = outputs(client.post(INFER, json=numbers(np.zeros((max_images, 1, 1, 3)))))
        assert by_name["logits"]["shape"] == [max_images, 4]
        refused = client.post(INFER, json=numbers(np.zeros((max_images + 1, 1, 1, 3))))
        assert f"the limit of {max_images}" in error(refused, 413)


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    headers = {"content-encoding": "gzip"}
    assert "'gzip'" in error(client.post(INFER, content=b"\x1f\x8b", headers=headers), 415)


def test_a_malformed_request_has_one_outcome(client: TestClient) -> None:
    before = outcomes(client)
    error(client.post(INFER, content=b"{"), 400)
    assert outcomes(client) - before == {"unreadable": 1}
    request = files(image_bytes(), parameters={"tier": "slowest"})
    error(client.post(INFER, json=request), 422)
    assert outcomes(client) - before == {"unreadable": 1}  # invalid parameters are not counted


def test_a_query_is_refused(client: TestClient) -> None:
    """A budget in the query would be ignored."""
    answer = client.post(f"{INFER}?budget_ms=50", json=files(image_bytes()))
    assert "unknown query parameter 'budget_ms'" in error(answer, 422)


# --- one for all


def test_one_refused_image_refuses_the_request_and_cancels_the_others(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    service = Service(settings(queue_limit=4), small_bundle, [gate])
    with serving(service) as client, busy(client, gate) as first:
        request = files(*[image_bytes()] * 6, parameters={"budget_ms": 50_000})
        refused = client.post(INFER, json=request)
        assert "image 4: the queue is full: 4 requests are waiting" in error(refused, 503)
        assert int(refused.headers["retry-after"]) >= 1
        wait_until(lambda: service.waiting == 0, limit_s=5)  # before the device is done
        gate.open.set()
        first.join()
        metrics = client.get("/metrics").text
    assert gate.batches == [1]
    assert 'outcome="rejected_full"} 2.0' in metrics
    assert 'outcome="cancelled"} 4.0' in metrics


def test_an_unreadable_image_cancels_the_others(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    service = Service(settings(), small_bundle, [gate])
    with serving(service) as client, busy(client, gate) as first:
        request = files(image_bytes(), b"text", parameters={"budget_ms": 50_000})
        assert "image 1: " in error(client.post(INFER, json=request), 415)
        wait_until(lambda: service.waiting == 0, limit_s=5)  # before the device is done
        gate.open.set()
        first.join()
    assert gate.batches == [1]


def test_a_failing_engine_is_reported(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    with serving(Service(settings(), small_bundle, [gate])) as client:
        gate.fails = True
        assert "the model failed" in error(client.post(INFER, json=files(image_bytes())), 500)


@pytest.mark.parametrize("announced", [True, False], ids=["after the upload", "while uploading"])
def test_a_client_that_leaves_takes_all_its_images_along(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate, announced: bool
) -> None:
    async def scenario() -> list[Any]:
        service = Service(settings(), small_bundle, [gate])
        await service.start()
        app = create_app(service, fail)
        gate.shut()
        one, five = (
            json.dumps(files(*[image_bytes()] * n, parameters={"budget_ms": 60_000})).encode()
            for n in (1, 5)
        )
        first = asyncio.create_task(post(app, one))
        await asyncio.to_thread(gate.entered.wait, 20)
        assert service.waiting == 0
        left = asyncio.Event()
        second = asyncio.create_task(post(app, five, left, more=not announced))
        while announced and service.waiting < 5:
            await asyncio.sleep(0.005)
        left.set()
        sent = await second
        await asyncio.sleep(0)  # those cancelled have their turn
        assert service.waiting == 0
        gate.open.set()
        assert (await first)[0]["status"] == 200
        await service.stop()
        return sent

    [start, _] = asyncio.run(scenario())
    assert start["status"] == 499
    assert gate.batches == [1]


def test_the_budget_counts_from_the_headers(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    async def scenario() -> list[Any]:
        service = Service(settings(), small_bundle, [gate])
        await service.start()
        body = json.dumps(files(image_bytes(), parameters={"budget_ms": 200})).encode()
        sent = await post(create_app(service, fail), body, upload_s=0.3)
        await service.stop()
        return sent

    start, sent = asyncio.run(scenario())
    assert start["status"] == 504
    assert "200 ms passed before the image was received" in json.loads(sent["body"])["error"]


async def post(
    app: Any,
    body: bytes,
    left: asyncio.Event | None = None,
    more: bool = False,
    upload_s: float = 0.0,
) -> list[Any]:
    """One request as the server would make it, of a client that leaves once `left` is set."""
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": body, "more_body": more}]

    async def receive() -> Any:
        if messages:
            await asyncio.sleep(upload_s)
            return messages.pop()
        await (left or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": INFER, "raw_path": INFER.encode(),
        "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "asgi": {"version": "3.0"},
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


# --- the documentation


def test_the_documentation_is_complete_and_its_examples_work(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert "#/$defs/" not in json.dumps(document)
    paths = {path: item for path, item in document["paths"].items() if path.startswith("/v2")}
    assert len(paths) == 9
    for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        operation = paths[f"{base}/infer"]["post"]
        statuses = {"200", "400", "404", "413", "415", "422", "500", "503", "504"}
        assert statuses <= operation["responses"].keys()
        for status in statuses - {"200"}:
            [media] = operation["responses"][status]["content"].values()
            assert media["schema"]["$ref"].endswith("/Error")
        named = {parameter["name"] for parameter in operation["parameters"]}
        assert named == set(re.findall(r"{(\w+)}", base))
        body = operation["requestBody"]["content"]
        assert body["application/json"]["schema"]["properties"]["inputs"]["items"]["properties"]
        assert "application/octet-stream" in body
        for example in body["application/json"]["examples"].values():
            answer = client.post(INFER, json=example["value"])
            assert "logits" in outputs(answer)


def test_independent_labels_have_probabilities_in_place_of_a_label(
    multi_label: TestClient,
) -> None:
    metadata = multi_label.get("/v2/models/test").json()
    assert [output["name"] for output in metadata["outputs"]] == ["logits", "probabilities"]
    by_name = outputs(multi_label.post(INFER, json=EXAMPLES["an image file"]))
    logits, found = (np.array(by_name[n]["data"]) for n in ("logits", "probabilities"))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert by_name["probabilities"]["shape"] == [1, 4]


def test_patches_beyond_the_memory_have_a_hint_for_this_protocol(
    tmp_path: Path, settings: MakeSettings
) -> None:
    served = load_bundle(write_bundle(tmp_path / "wide", **backbone(patch_width=20_000)))
    known = settings(memory_mb=4, budget_ms=20_000)
    service = Service(known, served, [SimulatedEngine(served, seconds=quick)])
    with serving(service) as client:
        response = client.post(
            INFER, json=files(image_bytes()) | {"outputs": [{"name": "patches"}]}
        )
        assert response.status_code == 413
        assert "leave patches out of the outputs" in response.text
        assert "accept" not in response.text.lower()
