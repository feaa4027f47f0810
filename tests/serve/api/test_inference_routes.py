"""The Open Inference Protocol: in process, and with a client that others wrote."""

import asyncio
import base64
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from pcae_serve.api import inference_routes
from pcae_serve.api.app import create_app
from pcae_serve.bundle import reader
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from tests.support.apps import busy, fail, quick, serving, wait_until
from tests.support.bundles import manifest, write_bundle
from tests.support.gate import Gate
from tests.support.images import image_bytes
from tests.support.server_process import server

MakeSettings = Callable[..., Settings]
INFER = "/v2/models/test/infer"
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("oip")
    served = reader.load(write_bundle(root / "bundle"))
    engine = SimulatedEngine(served, seconds=quick)
    known = Settings(cache_dir=root, profile_s=0.3, max_body_mb=1.0, max_pixels=10_000)
    with serving(Service(known, served, [engine])) as client:
        yield client


def files(*images: bytes, **changes: Any) -> dict[str, Any]:
    """A request with image files, as JSON has them."""
    data = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}
    return {"inputs": [tensor | changes.pop("tensor", {})]} | changes


def numbers(pixels: Any, **changes: Any) -> dict[str, Any]:
    """A request with pixels, as JSON has them."""
    array = np.asarray(pixels, np.uint8)
    tensor = {"name": "image", "datatype": "UINT8", "shape": list(array.shape)}
    return {"inputs": [tensor | {"data": array.tolist()} | changes]}


def elements(*images: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def binary(request: dict[str, Any], data: bytes, size: int | None = None) -> tuple[bytes, Any]:
    """The request with its input's data behind the JSON, and the headers to send it with."""
    [tensor] = request["inputs"]
    told = {"binary_data_size": len(data) if size is None else size}
    kept = {key: value for key, value in tensor.items() if key != "data"} | {"parameters": told}
    text = json.dumps(request | {"inputs": [kept]}).encode()
    return text + data, {LENGTH: str(len(text))}


def outputs(response: Any) -> dict[str, dict[str, Any]]:
    """Outputs by name, each with its data, wherever they stood."""
    assert response.status_code == 200, response.text
    length = int(response.headers.get(LENGTH, len(response.content)))
    document, rest = json.loads(response.content[:length]), response.content[length:]
    for output in document["outputs"]:
        if "data" not in output:
            size = output["parameters"]["binary_data_size"]
            own, rest = rest[:size], rest[size:]
            if output["datatype"] == "FP32":
                output["data"] = np.frombuffer(own, "<f4").tolist()
            else:
                output["data"] = []
                while own:
                    end = 4 + struct.unpack_from("<I", own)[0]
                    output["data"].append(own[4:end].decode())
                    own = own[end:]
    assert not rest
    return {output["name"]: output for output in document["outputs"]}


def error(response: Any, status: int) -> str:
    """What an error says: one line, in the protocol's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document.keys() == {"error"}
    assert len(document["error"].splitlines()) == 1
    return str(document["error"])


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
    assert model["parameters"] == {"tiers": "fast,balanced,full", "budget_ms": 1000}


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
    answer = inference_routes.InferResponse.model_validate(response.json(), extra="forbid")
    assert (answer.model_name, answer.model_version, answer.id) == ("test", "1", "seven")
    assert answer.parameters.budget_ms == 5000
    assert answer.parameters.tier == "full,full,full"
    assert answer.parameters.met_budget == "true,true,true"
    assert len(answer.parameters.reason.split("; ")) == 3
    by_name = outputs(response)
    assert by_name["label"]["data"] == ["dark", "dim", "bright"]
    assert by_name["logits"]["shape"] == [3, 4]
    assert by_name["logits"]["data"] == [5, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 5]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (files(*map(image_bytes, LEVELS), tensor={"shape": [3, 1]}), {}),
        (
            {"inputs": [files(b"")["inputs"][0] | {"shape": [3, 1], "data": [
                [base64.b64encode(image_bytes(level)).decode()] for level in LEVELS]}]}, {},
        ),
        (numbers(GREY), {}),
        (numbers(GREY, data=GREY.ravel().tolist()), {}),
        binary(numbers(GREY), GREY.tobytes()),
        binary(files(b"", tensor={"shape": [3]}), elements(*map(image_bytes, LEVELS))),
        binary(files(b"", tensor={"shape": [3, 1]}), elements(*map(image_bytes, LEVELS))),
    ],
    ids=["N, 1", "N, 1 nested", "pixels nested", "pixels flat", "pixels binary", "files binary",
         "files binary N, 1"],
)  # fmt: skip
def test_every_way_to_send_images_gives_the_same(
    client: TestClient, body: Any, headers: dict[str, str]
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body)
    by_name = outputs(client.post(INFER, content=content, headers=headers))
    assert by_name["label"]["data"] == ["dark", "dim", "bright"]
    assert by_name["logits"]["shape"] == [3, 4]


def test_pixels_arrive_as_they_were(small_bundle: Bundle, settings: MakeSettings) -> None:
    """Colours and rows in their order: the engine sees what was sent."""
    seen: list[Pixels] = []

    class Seeing(SimulatedEngine):
        def run(self, tier: Any, pixels: Pixels) -> Output:
            seen.append(pixels)
            return super().run(tier, pixels)

    sent = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    service = Service(settings(), small_bundle, [Seeing(small_bundle, seconds=quick)])
    with serving(service) as client:
        by_name = outputs(client.post(INFER, json=numbers(sent)))
    assert by_name["logits"]["shape"] == [1, 4]
    assert np.array_equal(seen[-1], sent[None])


def test_an_image_file_alone_may_be_the_body(client: TestClient) -> None:
    response = client.post(INFER, content=image_bytes(250), headers={LENGTH: "0"})
    assert outputs(response)["label"]["data"] == ["bright"]


def test_images_of_one_request_run_together_and_each_by_itself(
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


# --- what is asked


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
        "reason": "asked for",
        "met_budget": "true",
        "budget_ms": 1000,
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
def test_senseless_parameters(
    client: TestClient, parameters: dict[str, Any], status: int, words: str
) -> None:
    content = json.dumps(files(image_bytes(), parameters=parameters))
    assert words in error(client.post(INFER, content=content), status)


def test_an_unknown_tier_is_no_matter_of_one_image(client: TestClient) -> None:
    request = files(image_bytes(), image_bytes(), parameters={"tier": "turbo"})
    assert error(client.post(INFER, json=request), 422).startswith("tier 'turbo' is unknown")


def test_outputs_are_those_asked_for(client: TestClient) -> None:
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


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([{"name": "features"}], "'features' is unknown: choose of logits, label"),
        ([{"name": "label"}] * 2, "twice"),
        ([{"name": "label", "parameters": {"classification": 2}}], "ask for logits"),
        ([{"name": "logits", "parameters": {"classification": 0}}], "classification"),
    ],
)
def test_outputs_that_there_are_not(client: TestClient, wanted: Any, words: str) -> None:
    assert words in error(client.post(INFER, json=files(image_bytes(), outputs=wanted)), 400)


def test_a_bundle_without_a_head_answers_with_features(
    tmp_path: Path, settings: MakeSettings
) -> None:
    models = {"vit": manifest({})["models"]["vit"] | {"answers": "features"}}
    served = reader.load(write_bundle(tmp_path / "headless", labels=[], models=models))
    service = Service(settings(), served, [SimulatedEngine(served, seconds=quick)])
    with serving(service) as client:
        told = client.get("/v2/models/test").json()["outputs"]
        assert told == [{"name": "features", "datatype": "FP32", "shape": [-1, 8]}]
        by_name = outputs(client.post(INFER, json=files(image_bytes(255))))
        wanted = [{"name": "features", "parameters": {"classification": 2}}]
        error(client.post(INFER, json=files(image_bytes(255), outputs=wanted)), 400)
    assert by_name.keys() == {"features"}
    assert by_name["features"]["data"] == [0, 0, 0, 0, 0, 0, 0, 5]


# --- what is malformed, too large, or no image

BMP = image_bytes(9, "BMP")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no valid JSON"),
        (b"\xff\xd8\xff", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"inputs": [NaN]}', "no valid JSON"),
        (b'{"id": "\\ud800", "inputs": []}', "no valid JSON"),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", "no valid JSON"),
        (b"[]", "the request: "),
        (b"{}", "inputs: "),
        (b'{"inputs": []}', "inputs: "),
        (json.dumps({"inputs": files(BMP)["inputs"] * 2}), "must be one, named 'image'"),
        (json.dumps(files(BMP, tensor={"name": "x\ny"})), "must be one, named 'image'"),
        (json.dumps(files(BMP, tensor={"datatype": "FP32"})), "inputs.0.datatype"),
        (json.dumps(files(BMP, tensor={"shape": []})), "[N] or [N, 1]"),
        (json.dumps(files(BMP, tensor={"shape": [0], "data": []})), "there is no image"),
        (json.dumps(files(BMP, tensor={"shape": [2]})), "2 base64 strings"),
        (json.dumps(files(BMP, tensor={"shape": [1, 2]})), "[N] or [N, 1]"),
        (json.dumps(files(BMP, tensor={"shape": [-1]})), "inputs.0.shape.0"),
        (json.dumps(files(BMP, tensor={"shape": [1.0]})), "inputs.0.shape.0"),
        (json.dumps(files(BMP, tensor={"shape": [10**400]})), "inputs.0.shape.0"),
        (json.dumps(files(BMP, tensor={"shape": [1] * 9})), "inputs.0.shape"),
        (json.dumps(files(BMP, tensor={"data": [7]})), "1 base64 strings"),
        (json.dumps(files(BMP, tensor={"data": [["x"]] * 2})), "1 base64 strings"),
        (json.dumps(files(BMP, tensor={"data": ["no base64!"]})), "base64"),
        (json.dumps(files(BMP, tensor={"data": ["ünïcode="]})), "base64"),
        (json.dumps(files(BMP, tensor={"data": None})), "either data or"),
        (json.dumps(files(BMP, tensor={"parameters": {"binary_data_size": 0}})), "either data or"),
        (json.dumps(files(BMP, id="x" * 2000)), "id: "),
        (json.dumps(numbers([[[1, 2, 3]]], data=[1, 2])), "takes 3 numbers, not 2"),
        (json.dumps(numbers([[[1, 2, 3]]], data=[1, 2, 256])), "from 0 to 255"),
        (json.dumps(numbers([[[1, 2, 3]]], data=[1, 2, 3.5])), "from 0 to 255"),
        (json.dumps(numbers([[[1, 2, 3]]], data=["1", "2", "3"])), "from 0 to 255"),
        (json.dumps(numbers([[[1, 2, 3]]], data=[[1, 2, 3]])), "from 0 to 255"),
        (json.dumps(numbers([[[1, 2, 3]]], data=[[[1, 2], [3]]])), "from 0 to 255"),
        (json.dumps(numbers([[[1, 2, 3]]], data=[{"a": 1}])), "from 0 to 255"),
        (json.dumps(numbers([[[1, 2, 3]]], shape=[1, 3, 1])), "[N, H, W, 3] or [H, W, 3]"),
        (json.dumps(numbers([[[1, 2, 3]]], shape=[0, 1, 3], data=[])), "[N, H, W, 3]"),
        (json.dumps(numbers([[[1, 2, 3]]], shape=[0, 1, 1, 3], data=[])), "there is no image"),
        (json.dumps(numbers([[[1, 2, 3]]], shape=[2**62, 2**62, 3])), "from 0 to 255"),
        (json.dumps(numbers([[[1, 2, 3]]], shape=[2**62, 2**62, 3], data=[1])), "numbers, not 1"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_told(client: TestClient, content: Any, words: str) -> None:
    assert words in error(client.post(INFER, content=content), 400)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (binary(files(b""), elements(BMP), size=5), "but binary_data_size says 5"),
        (binary(files(b""), elements(BMP), size=10**12), "but binary_data_size says"),
        (binary(files(b""), elements(BMP)[:-1]), "not 1 elements"),
        (binary(files(b""), elements(BMP) + b"x"), "not 1 elements"),
        (binary(files(b""), elements(BMP, BMP)), "not 1 elements"),
        (binary(files(b"", tensor={"shape": [2]}), elements(BMP)), "not 2 elements"),
        (binary(files(b""), b"\xff\xff\xff\xff" + BMP), "not 1 elements"),
        (binary(files(b""), b"\1\0"), "not 1 elements"),
        (binary(numbers(GREY), bytes(7)), "takes 576 numbers, not 7"),
        ((elements(BMP), {LENGTH: "99999"}), "but the body has"),
        ((elements(BMP), {LENGTH: "-1"}), "must be a number of bytes"),
        ((elements(BMP), {LENGTH: "1e3"}), "must be a number of bytes"),
        ((elements(BMP), {LENGTH: "9" * 5000}), "must be a number of bytes"),
        ((b"", {LENGTH: "0"}), "empty"),
        ((json.dumps(files(BMP)).encode() + b"more", {LENGTH: str(len(json.dumps(files(BMP))))}),
         "4 bytes stand behind the JSON"),
    ],
)  # fmt: skip
def test_sizes_that_lie_are_told(client: TestClient, sent: Any, words: str) -> None:
    content, headers = sent
    assert words in error(client.post(INFER, content=content, headers=headers), 400)


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        (files(b""), 400, "empty"),
        (files(b"just some text"), 415, "JPEG"),
        (files(image_bytes(9, "PNG", (64, 64))[:-30]), 400, "truncated"),
        (files(image_bytes(size=(101, 101))), 413, "101 x 101"),
        (files(image_bytes(), image_bytes(), b"text"), 415, "image 2: "),
        (files(*[b"x"] * 65), 413, "65 images are too many"),
        (files(b"", tensor={"shape": [10**18]}), 413, "at most 64"),
        (numbers([[[1, 2, 3]]], data=[0] * 270_000), 413, "send pixels as binary data"),
        (files(bytes(800_000)), 413, "1,000,000 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_or_too_large(
    client: TestClient, request_: Any, status: int, words: str
) -> None:
    assert words in error(client.post(INFER, json=request_), status)


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    headers = {"content-encoding": "gzip"}
    assert "'gzip'" in error(client.post(INFER, content=b"\x1f\x8b", headers=headers), 415)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
TOLD = {200, 400, 413, 415, 422}
FIELDS = (
    ("inputs",), ("outputs",), ("id",), ("parameters",), ("parameters", "budget_ms"),
    ("parameters", "tier"), ("parameters", "min_tier"), ("parameters", "binary_data_output"),
    ("inputs", 0), ("inputs", 0, "name"), ("inputs", 0, "datatype"), ("inputs", 0, "shape"),
    ("inputs", 0, "shape", 0), ("inputs", 0, "data"), ("inputs", 0, "data", 0),
    ("inputs", 0, "parameters"), ("inputs", 0, "parameters", "binary_data_size"),
    ("outputs", 0), ("outputs", 0, "name"), ("outputs", 0, "parameters"),
    ("outputs", 0, "parameters", "classification"), ("outputs", 0, "parameters", "binary_data"),
)  # fmt: skip
PLAUSIBLE = st.sampled_from(
    ["image", "BYTES", "UINT8", "logits", "label", "fast", 0, 1, 2, 3, 255, 256, -1, 1.5, True,
     [1], [1, 1, 3], [1, 1, 1, 3], [0, 0, 3], [1, 2, 3], [[[1, 2, 3]]], {}, [], None, "AAAA"]
)  # fmt: skip


def fuzzed(client: TestClient, content: bytes, headers: dict[str, str]) -> None:
    response = client.post(INFER, content=content, headers=headers)
    assert response.status_code in TOLD, response.text
    if response.status_code != 200:
        error(response, response.status_code)


@pytest.fixture(scope="module")
def instant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("instant")
    served = reader.load(write_bundle(root / "bundle"))
    engine = SimulatedEngine(served, seconds=lambda tier, _: tier.macs * 1e-7)
    # time enough on a slow machine: what is late is not what is looked for
    known = Settings(cache_dir=root, profile_s=0.1, budget_ms=20_000, policy="nexus:fast")
    with serving(Service(known, served, [engine])) as client:
        yield client


@effort(max_examples=60, deadline=None, derandomize=True)
@given(JSON)
def test_any_json_is_answered_in_one_line(instant: TestClient, document: Any) -> None:
    fuzzed(instant, json.dumps(document).encode(), {})


@effort(max_examples=200, deadline=None, derandomize=True)
@given(
    request=st.sampled_from(
        [
            files(BMP, id="a", outputs=[{"name": "logits"}], parameters={"tier": "auto"}),
            numbers([[[[1, 2, 3]]]]) | {"outputs": [{"name": "label"}]},
        ]
    ),
    changes=st.lists(st.tuples(st.sampled_from(FIELDS), PLAUSIBLE | JSON), min_size=1, max_size=3),
)
def test_a_request_with_anything_changed_is_answered(
    instant: TestClient, request: Any, changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    document = json.loads(json.dumps(request))
    for (*path, last), value in changes:
        place = document
        for part in path:
            if isinstance(place, dict):
                place = place.setdefault(part, {})
            elif isinstance(place, list) and isinstance(part, int) and part < len(place):
                place = place[part]
        if isinstance(place, dict) or (isinstance(place, list) and last == 0 and place):
            place[last] = value
    fuzzed(instant, json.dumps(document).encode(), {})


@effort(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_bytes_and_any_sizes_are_answered(instant: TestClient, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([[1], [2], [2, 1]]))
    size = data.draw(st.none() | st.integers(0, 2**40))
    content, headers = binary(files(b"", tensor={"shape": shape}), elements(BMP, BMP), size)
    cut = data.draw(st.none() | st.integers(0, len(content)))
    at = data.draw(st.integers(0, len(content) - 1))
    some = data.draw(st.binary(max_size=4))
    length = data.draw(st.sampled_from([headers[LENGTH], "0", "7", "999", "x", ""]))
    fuzzed(instant, (content[:at] + some + content[at + len(some) :])[:cut], {LENGTH: length})


# --- one for all


def test_one_image_refused_refuses_all_and_cancels_the_others(
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
        told = client.get("/metrics").text
    assert gate.batches == [1]
    assert 'outcome="rejected_full"} 2.0' in told
    assert 'outcome="cancelled"} 4.0' in told


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


def test_a_failing_engine_is_told(small_bundle: Bundle, settings: MakeSettings, gate: Gate) -> None:
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
        body = json.dumps(files(*[image_bytes()] * 5, parameters={"budget_ms": 60_000})).encode()
        first = asyncio.create_task(post(app, body))
        await asyncio.to_thread(gate.entered.wait, 20)
        waiting = service.waiting
        left = asyncio.Event()
        second = asyncio.create_task(post(app, body, left, more=not announced))
        while announced and service.waiting < waiting + 5:
            await asyncio.sleep(0.005)
        left.set()
        sent = await second
        await asyncio.sleep(0)  # those cancelled have their turn
        assert service.waiting == waiting
        gate.open.set()
        assert (await first)[0]["status"] == 200
        await service.stop()
        return sent

    [start, _] = asyncio.run(scenario())
    assert start["status"] == 499
    assert sum(gate.batches) == 5


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

    start, told = asyncio.run(scenario())
    assert start["status"] == 504
    assert "200 ms passed before the image was received" in json.loads(told["body"])["error"]


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


def test_the_documentation_is_whole_and_its_examples_work(client: TestClient) -> None:
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


# --- Triton's client


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of Triton's, and a server process for it."""
    from tritonclient import http

    root = tmp_path_factory.mktemp("triton")
    flags = ("--bundle", str(write_bundle(root / "bundle")), "--backend", "simulated")
    with (
        server(*flags, "--profile-s", "0.3", "--budget-ms", "20000", cache=root) as (url, _),
        http.InferenceServerClient(url.removeprefix("http://"), network_timeout=60) as client,
    ):
        yield client


def tensor(values: Any, datatype: str, binary: bool = True) -> Any:
    from tritonclient import http

    given = http.InferInput("image", list(values.shape), datatype)
    given.set_data_from_numpy(values, binary_data=binary)
    return given


IMAGES = np.array([image_bytes(level) for level in LEVELS], dtype=np.object_)
LABELS = [b"dark", b"dim", b"bright"]


def test_tritons_client_finds_the_model(triton: Any) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("test")
    assert triton.is_model_ready("test", "1")
    assert not triton.is_model_ready("other")
    assert triton.get_server_metadata()["name"] == "pcae-serve"
    assert triton.get_model_metadata("test", "1")["inputs"][0]["datatype"] == "BYTES"


@pytest.mark.parametrize(
    "given",
    [
        lambda: tensor(IMAGES, "BYTES"),
        lambda: tensor(IMAGES.reshape(3, 1), "BYTES"),
        lambda: tensor(np.array([base64.b64encode(i) for i in IMAGES], np.object_), "BYTES", False),
        lambda: tensor(GREY, "UINT8"),
        lambda: tensor(GREY, "UINT8", False),
    ],
    ids=["files", "files N, 1", "files as JSON", "pixels", "pixels as JSON"],
)
def test_tritons_client_is_answered(triton: Any, given: Callable[[], Any]) -> None:
    result = triton.infer("test", [given()], request_id="7", parameters={"tier": "fast"})
    assert result.as_numpy("logits").dtype == np.float32
    assert result.as_numpy("logits").argmax(axis=1).tolist() == [0, 1, 3]
    assert result.as_numpy("label").tolist() == LABELS
    told = result.get_response()
    assert told["id"] == "7"
    assert told["parameters"]["tier"] == "fast,fast,fast"


def test_tritons_client_chooses_outputs(triton: Any) -> None:
    from tritonclient import http

    wanted = [
        http.InferRequestedOutput("label", binary_data=False),
        http.InferRequestedOutput("logits", class_count=1),
    ]
    result = triton.async_infer("test", [tensor(IMAGES, "BYTES")], "1", wanted).get_result()
    assert result.as_numpy("label").tolist() == [label.decode() for label in LABELS]
    assert result.as_numpy("logits").tolist() == [
        [b"5.000000:0:dark"],
        [b"5.000000:1:dim"],
        [b"5.000000:3:bright"],
    ]


def test_tritons_client_is_told_what_was_wrong(triton: Any) -> None:
    from tritonclient.utils import InferenceServerException

    for parameters, status, words in (
        ({"tier": "turbo"}, "422", "choose one of fast"),
        ({"budget_ms": 0.01}, "422", "needs .* ms on an idle server"),
    ):
        with pytest.raises(InferenceServerException, match=words) as refused:
            triton.infer("test", [tensor(IMAGES, "BYTES")], parameters=parameters)
        assert refused.value.status() == status
        assert "exception occurred" not in refused.value.message()  # while it read the error
    with pytest.raises(InferenceServerException, match="it serves 'test'"):
        triton.infer("other", [tensor(IMAGES, "BYTES")])
