"""Tensors out of JSON and binary data: what is accepted, and every kind of fault."""

import json
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.preprocess import decode_image
from pcae_serve.bundle.reader import Bundle
from pcae_serve.errors import MalformedRequest, TooLarge
from pcae_serve.open_inference.schema import InferRequest, OutputParameters
from pcae_serve.open_inference.tensors import (
    MAX_JSON_PARTS,
    image_files,
    output_tensor,
    parse_request,
    require_outputs,
)
from tests.support.images import image_bytes
from tests.support.inference_requests import LENGTH, binary, elements, files, numbers

BMP = image_bytes(9, "BMP")
IMAGES = [image_bytes(level, "BMP") for level in (10, 100, 250)]
TEXTS = files(*IMAGES)["inputs"][0]["data"]
PIXELS = np.stack([np.asarray(decode_image(image)) for image in IMAGES])  # [3, 8, 8, 3]


def read(content: bytes | str | dict[str, Any], length: int | None = None) -> list[bytes]:
    """The image files in a request; `length`: of the JSON, if binary data follow."""
    body = json.dumps(content) if isinstance(content, dict) else content
    body = body.encode() if isinstance(body, str) else body
    request, data = parse_request(body[:length]), body[length or len(body) :]
    return [file() for file in image_files(request, memoryview(data), max_images=64)]


@pytest.mark.parametrize(
    "request_",
    [
        files(*IMAGES),
        files(*IMAGES, tensor={"shape": [3, 1]}),
        files(*IMAGES, tensor={"shape": [3, 1], "data": [[text] for text in TEXTS]}),
        numbers(PIXELS),
        numbers(PIXELS, data=PIXELS.ravel().tolist()),
        binary(numbers(PIXELS), PIXELS.tobytes()),
        binary(files(tensor={"shape": [3]}), elements(*IMAGES)),
        binary(files(tensor={"shape": [3, 1]}), elements(*IMAGES)),
    ],
    ids=["N", "N, 1", "N, 1 nested", "pixels nested", "pixels flat", "pixels binary",
         "files binary", "files binary N, 1"],
)  # fmt: skip
def test_every_form_of_the_same_images(request_: Any) -> None:
    if isinstance(request_, tuple):
        content, headers = request_
        read_files = read(content, int(headers[LENGTH]))
    else:
        read_files = read(request_)
    np.testing.assert_array_equal([np.asarray(decode_image(file)) for file in read_files], PIXELS)


def test_one_image_of_pixels_needs_no_batch_axis() -> None:
    [file] = read(numbers(PIXELS[0]))
    np.testing.assert_array_equal(np.asarray(decode_image(file)), PIXELS[0])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xd8\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"inputs": [NaN]}', "not valid JSON"),
        (b'{"id": "\\ud800", "inputs": []}', "not valid JSON"),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", "not valid JSON"),
        (b"[]", "the request: "),
        (b"{}", "inputs: "),
        (b'{"inputs": []}', "inputs: "),
        ({"inputs": files(BMP)["inputs"] * 2}, "single tensor named 'image'"),
        (files(BMP, tensor={"name": "x\ny"}), "single tensor named 'image'"),
        (files(BMP, tensor={"datatype": "FP32"}), "inputs.0.datatype"),
        (files(BMP, tensor={"shape": []}), "[N] or [N, 1]"),
        (files(BMP, tensor={"shape": [0], "data": []}), "no images"),
        (files(BMP, tensor={"shape": [2]}), "2 base64 strings"),
        (files(BMP, tensor={"shape": [1, 2]}), "[N] or [N, 1]"),
        (files(BMP, tensor={"shape": [-1]}), "inputs.0.shape.0"),
        (files(BMP, tensor={"shape": [1.0]}), "inputs.0.shape.0"),
        (files(BMP, tensor={"shape": [10**400]}), "inputs.0.shape.0"),
        (files(BMP, tensor={"shape": [1] * 9}), "inputs.0.shape"),
        (files(BMP, tensor={"data": [7]}), "1 base64 strings"),
        (files(BMP, tensor={"data": [["x"]] * 2}), "1 base64 strings"),
        (files(BMP, tensor={"data": ["no base64!"]}), "image file in base64"),
        (files(BMP, tensor={"data": ["ünïcode="]}), "image file in base64"),
        (files(BMP, tensor={"data": None}), "either data or"),
        (files(BMP, tensor={"parameters": {"binary_data_size": 0}}), "either data or"),
        (files(BMP, id="x" * 2000), "id: "),
        (numbers([[[1, 2, 3]]], data=[1, 2]), "needs 3 numbers, not 2"),
        (numbers([[[1, 2, 3]]], data=[1, 2, 256]), "from 0 to 255"),
        (numbers([[[1, 2, 3]]], data=[1, 2, 3.5]), "from 0 to 255"),
        (numbers([[[1, 2, 3]]], data=["1", "2", "3"]), "from 0 to 255"),
        (numbers([[[1, 2, 3]]], data=[[1, 2, 3]]), "from 0 to 255"),
        (numbers([[[1, 2, 3]]], data=[[[1, 2], [3]]]), "from 0 to 255"),
        (numbers([[[1, 2, 3]]], data=[{"a": 1}]), "from 0 to 255"),
        (numbers([[[1, 2, 3]]], shape=[1, 3, 1]), "[N, H, W, 3] or [H, W, 3]"),
        (numbers([[[1, 2, 3]]], shape=[0, 1, 3], data=[]), "[N, H, W, 3]"),
        (numbers([[[1, 2, 3]]], shape=[0, 1, 1, 3], data=[]), "no images"),
        (numbers([[[1, 2, 3]]], shape=[2**62, 2**62, 3]), "from 0 to 255"),
        (numbers([[[1, 2, 3]]], shape=[2**62, 2**62, 3], data=[1]), "numbers, not 1"),
    ],
)
def test_a_malformed_request_is_refused(content: Any, words: str) -> None:
    with pytest.raises(MalformedRequest) as refused:
        read(content)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (binary(files(b""), elements(BMP), size=5), "but binary_data_size is 5"),
        (binary(files(b""), elements(BMP), size=10**12), "but binary_data_size is 10"),
        (binary(files(b""), elements(BMP)[:-1]), "must have 1 elements"),
        (binary(files(b""), elements(BMP) + b"x"), "must have 1 elements"),
        (binary(files(b""), elements(BMP, BMP)), "must have 1 elements"),
        (binary(files(tensor={"shape": [2]}), elements(BMP)), "must have 2 elements"),
        (binary(files(b""), b"\xff\xff\xff\xff" + BMP), "must have 1 elements"),
        (binary(files(b""), b"\1\0"), "must have 1 elements"),
        (binary(numbers(PIXELS), bytes(7)), "needs 576 numbers, not 7"),
        ((json.dumps(files(BMP)).encode() + b"more", {LENGTH: len(json.dumps(files(BMP)))}),
         "4 bytes follow the JSON"),
    ],
)  # fmt: skip
def test_binary_data_of_another_size_are_refused(sent: Any, words: str) -> None:
    content, headers = sent
    with pytest.raises(MalformedRequest, match=words):
        read(content, int(headers[LENGTH]))


@pytest.mark.parametrize("max_images", [3, 100])
@pytest.mark.parametrize("kind", ["files", "files binary", "pixels"])
def test_the_limit_of_images_holds_for_every_form(kind: str, max_images: int) -> None:
    def count_read(count: int) -> int:
        data = memoryview(b"")
        if kind == "files":
            request = files(*[b"x"] * count)
        elif kind == "pixels":
            request = numbers(np.zeros((count, 1, 1, 3)))
        else:
            data = memoryview(elements(*[b"x"] * count))
            parameters = {"binary_data_size": len(data)}
            request = files(tensor={"shape": [count], "data": None, "parameters": parameters})
        parsed = parse_request(json.dumps(request).encode())
        return len(image_files(parsed, data, max_images))

    assert count_read(max_images) == max_images
    with pytest.raises(TooLarge, match=f"{max_images + 1} images .* limit of {max_images};"):
        count_read(max_images + 1)


def test_limits_are_checked_before_the_data() -> None:
    with pytest.raises(TooLarge, match="the limit of 64"):
        read(files(b"", tensor={"shape": [10**18]}))
    with pytest.raises(TooLarge, match="send pixels as binary data"):
        read(numbers([[[1, 2, 3]]], data=[0] * (MAX_JSON_PARTS + 1)))


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ([{"name": "features"}], "unknown output 'features'; choose from logits, label"),
        ([{"name": "label"}] * 2, "twice"),
        ([{"name": "label", "parameters": {"classification": 2}}], "request logits"),
    ],
)
def test_an_output_that_the_bundle_does_not_offer(
    small_bundle: Bundle, outputs: Any, words: str
) -> None:
    request = InferRequest.model_validate(files(BMP, outputs=outputs))
    with pytest.raises(MalformedRequest, match=words):
        require_outputs(request, small_bundle)


VECTORS = np.array([[0.5, 2.0, -1.0], [3.0, 1.0, 3.0]], np.float32)
NAMES = ["a", "b", "ç"]


def test_output_tensors() -> None:
    logits = output_tensor("logits", OutputParameters(), VECTORS, NAMES)
    assert (logits.datatype, logits.shape, logits.values) == (
        "FP32",
        [2, 3],
        VECTORS.ravel().tolist(),
    )
    assert logits.binary() == VECTORS.tobytes()
    label = output_tensor("label", OutputParameters(), VECTORS, NAMES)
    assert (label.datatype, label.shape, label.values) == ("BYTES", [2], ["b", "a"])
    assert label.binary() == elements(b"b", b"a")
    ranked = output_tensor("logits", OutputParameters(classification=2), VECTORS, NAMES)
    assert (ranked.datatype, ranked.shape) == ("BYTES", [2, 2])
    assert ranked.values == ["2.000000:1:b", "0.500000:0:a", "3.000000:0:a", "3.000000:2:ç"]
    many = OutputParameters(classification=99)
    assert output_tensor("logits", many, VECTORS, NAMES).shape == [2, 3]


def test_features_in_half_precision() -> None:
    wanted = OutputParameters(datatype="FP16", normalize=True)
    half = output_tensor("features", wanted, VECTORS, [])
    assert (half.datatype, half.shape) == ("FP16", [2, 3])
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    assert half.binary() == unit.astype("<f2").tobytes()
