"""/v2 through Triton's own client, against a server process."""

import base64
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.bundles import write_bundle
from tests.support.images import image_bytes
from tests.support.server_process import server

LEVELS = (10, 100, 250)
GREY = np.stack([np.full((8, 8, 3), level, np.uint8) for level in LEVELS])


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of Triton's, and a server process for it."""
    from tritonclient import http  # type: ignore[import-untyped]

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
    reported = result.get_response()
    assert reported["id"] == "7"
    assert reported["parameters"]["tier"] == "fast,fast,fast"


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


def test_tritons_client_reports_the_fault(triton: Any) -> None:
    from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

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
