"""Answers with features as arrays in place of JSON: which form a request accepts, and the bytes.

raw   application/octet-stream: the numbers in row-major, little-endian order; headers state
      shape and number format
npy   application/x-npy: the file format of numpy, which states them itself
"""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray

RAW, NPY = "application/octet-stream", "application/x-npy"
SHAPE, DTYPE = "X-Shape", "X-Dtype"
TIER, MET_BUDGET, STATUS = "X-Tier", "X-Met-Budget", "X-Status"
HEADERS = (SHAPE, DTYPE, TIER, MET_BUDGET, STATUS)

Format = Literal["json", "raw", "npy"]
_FORMATS: dict[str, Format] = {"application/json": "json", RAW: "raw", NPY: "npy"}

_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _header(description: str) -> dict[str, Any]:
    return {"description": f"of an array: {description}", "schema": {"type": "string"}}


#: What OpenAPI documents of a response that may be an array.
DOCUMENTED: dict[str, Any] = {
    "content": {RAW: _BINARY, NPY: _BINARY},
    "headers": {
        SHAPE: _header("its shape, such as 384, or 8,384 for several images"),
        DTYPE: _header("its number format, float32 or float16; the order is little-endian"),
        TIER: _header("the tier that answered, or one for each row, joined by commas"),
        MET_BUDGET: _header("whether the answer was in time (true or false), one for each row"),
        "Vary": {"description": "Accept", "schema": {"type": "string"}},
    },
}
#: The same for several images.
DOCUMENTED_BATCH: dict[str, Any] = DOCUMENTED | {
    "headers": DOCUMENTED["headers"]
    | {STATUS: _header("the status of each image; those with 200 have a row, in their order")}
}


def accepted_format(request: Request) -> Format:
    """Return the form that the header Accept prefers; JSON if it names none of the three.

    Of equal preferences, the first counts. Wildcards mean JSON.
    """
    best, chosen = 0.0, _FORMATS["application/json"]
    for kind, weight in _accepted(request.headers.getlist("accept")):
        name = _FORMATS.get(kind, "json" if kind in ("*/*", "application/*") else None)
        if name is not None and weight > best:
            best, chosen = weight, name
    return chosen


def _accepted(headers: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield media types and their weights. A weight that is not a number counts as 0."""
    for part in ",".join(headers).split(","):
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        weight = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        try:
            yield kind, float(weight)
        except ValueError:
            yield kind, 0.0


def encode(array: NDArray[Any], form: Format) -> bytes:
    """Return the bytes of an array, raw or as an .npy file."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    if form == "raw":
        return array.tobytes()
    with BytesIO() as file:
        np.save(file, array, allow_pickle=False)
        return file.getvalue()


def array_response(
    form: Format, array: NDArray[Any], headers: dict[str, str], response: Response
) -> Response:
    """Return a response with an array, the headers that describe it, and those of `response`."""
    answer = Response(
        encode(array, form),
        media_type=RAW if form == "raw" else NPY,
        headers={SHAPE: ",".join(map(str, array.shape)), DTYPE: array.dtype.name} | headers,
    )
    answer.headers.update(response.headers)
    return answer
