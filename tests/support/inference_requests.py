"""Requests and answers of the Open Inference Protocol."""

import base64
import json
import struct
from typing import Any

import numpy as np

INFER = "/v2/models/test/infer"
LENGTH = "Inference-Header-Content-Length"


def files(*images: bytes, **changes: Any) -> dict[str, Any]:
    """A request with image files in JSON."""
    data = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}
    return {"inputs": [tensor | changes.pop("tensor", {})]} | changes


def numbers(pixels: Any, **changes: Any) -> dict[str, Any]:
    """A request with pixels in JSON."""
    array = np.asarray(pixels, np.uint8)
    tensor = {"name": "image", "datatype": "UINT8", "shape": list(array.shape)}
    return {"inputs": [tensor | {"data": array.tolist()} | changes]}


def elements(*images: bytes) -> bytes:
    """Image files as binary data: each after its length."""
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def binary(
    request: dict[str, Any], data: bytes, size: int | None = None
) -> tuple[bytes, dict[str, str]]:
    """The request with its input as binary data after the JSON, and the headers to send it with."""
    [tensor] = request["inputs"]
    parameters = {"binary_data_size": len(data) if size is None else size}
    kept = {key: value for key, value in tensor.items() if key != "data"}
    text = json.dumps(request | {"inputs": [kept | {"parameters": parameters}]}).encode()
    return text + data, {LENGTH: str(len(text))}


def outputs(response: Any) -> dict[str, dict[str, Any]]:
    """Outputs by name; `data` holds their values, whichever form they came in."""
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
    """The text of an error, which must be one line in the protocol's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document.keys() == {"error"}
    assert len(document["error"].splitlines()) == 1
    return str(document["error"])
