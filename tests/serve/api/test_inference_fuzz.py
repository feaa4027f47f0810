"""/v2 with requests that hypothesis makes: every answer is documented, every error one line."""

import json
from typing import Any

from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from tests.support.images import image_bytes
from tests.support.inference_requests import (
    INFER,
    LENGTH,
    binary,
    elements,
    error,
    files,
    numbers,
)

BMP = image_bytes(9, "BMP")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
DOCUMENTED = {200, 400, 413, 415, 422}
FIELDS = (
    ("inputs",), ("outputs",), ("id",), ("parameters",), ("parameters", "budget_ms"),
    ("parameters", "tier"), ("parameters", "min_tier"), ("parameters", "binary_data_output"),
    ("inputs", 0), ("inputs", 0, "name"), ("inputs", 0, "datatype"), ("inputs", 0, "shape"),
    ("inputs", 0, "shape", 0), ("inputs", 0, "data"), ("inputs", 0, "data", 0),
    ("inputs", 0, "parameters"), ("inputs", 0, "parameters", "binary_data_size"),
    ("outputs", 0), ("outputs", 0, "name"), ("outputs", 0, "parameters"),
    ("outputs", 0, "parameters", "classification"), ("outputs", 0, "parameters", "binary_data"),
)  # fmt: skip
PLAUSIBLE: st.SearchStrategy[Any] = st.sampled_from(
    ["image", "BYTES", "UINT8", "logits", "label", "fast", 0, 1, 2, 3, 255, 256, -1, 1.5, True,
     [1], [1, 1, 3], [1, 1, 1, 3], [0, 0, 3], [1, 2, 3], [[[1, 2, 3]]], {}, [], None, "AAAA"]
)  # fmt: skip


def fuzzed(client: TestClient, content: bytes, headers: dict[str, str]) -> None:
    response = client.post(INFER, content=content, headers=headers)
    assert response.status_code in DOCUMENTED, response.text
    if response.status_code != 200:
        error(response, response.status_code)


@effort(max_examples=60, deadline=None, derandomize=True)
@given(JSON)
def test_any_json_is_answered(instant: TestClient, document: Any) -> None:
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
