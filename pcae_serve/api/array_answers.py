"""Answers with features in the form that a request accepts, sent and then forgotten.

json  application/json: the document of schemas
raw   application/octet-stream: the numbers in row-major, little-endian order; headers state
      shape and number format. Patches follow the features.
npy   application/x-npy: the file format of numpy, which states them itself. Patches are a
      second file after the first.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from pcae_serve import schemas
from pcae_serve.runtime.memory_budget import Reservation

RAW, NPY = "application/octet-stream", "application/x-npy"
SHAPE, PATCHES_SHAPE, DTYPE = "X-Shape", "X-Patches-Shape", "X-Dtype"
TIER, MET_BUDGET, STATUS = "X-Tier", "X-Met-Budget", "X-Status"
HEADERS = (SHAPE, PATCHES_SHAPE, DTYPE, TIER, MET_BUDGET, STATUS)

Format = Literal["json", "raw", "npy"]
_FORMATS: dict[str, Format] = {"application/json": "json", RAW: "raw", NPY: "npy"}

#: Bytes that a number of a patch grid takes at most until its answer has been sent: as computed
#: (4), in the form asked for (4), as it is written, and once more when the parts are joined.
NUMBER_BYTES: Mapping[Format, int] = {"json": 8 + 2 * 26, "raw": 8 + 2 * 4, "npy": 8 + 2 * 4}

_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _header(description: str) -> dict[str, Any]:
    return {"description": f"of an array: {description}", "schema": {"type": "string"}}


#: What OpenAPI documents of a response that may be an array.
DOCUMENTED: dict[str, Any] = {
    "content": {RAW: _BINARY, NPY: _BINARY},
    "headers": {
        SHAPE: _header("its shape, such as 384, or 8,384 for several images"),
        PATCHES_SHAPE: _header("with patches, the shape of the second array, such as 16,16,384"),
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


class HeldResponse(Response):
    """A response whose memory is held until it has been sent."""

    def __init__(
        self, content: bytes, media_type: str, headers: dict[str, str], held: Sequence[Reservation]
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for reservation in self._held:
                reservation.release()


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
    form: Format,
    features: NDArray[Any],
    patches: NDArray[Any] | None,
    headers: dict[str, str],
    held: Sequence[Reservation],
) -> Response:
    """Return a response with one or two arrays, and the headers that describe them.

    held: released once it has been sent.
    """
    shapes = {SHAPE: _shape(features), DTYPE: features.dtype.name}
    content = encode(features, form)
    if patches is not None:
        shapes[PATCHES_SHAPE] = _shape(patches)
        content += encode(patches, form)
    return HeldResponse(content, RAW if form == "raw" else NPY, shapes | headers, held)


def _shape(array: NDArray[Any]) -> str:
    return ",".join(map(str, array.shape))


async def embedding_json(document: schemas.Embedding, patches: NDArray[Any]) -> bytes:
    """Return an embedding without patches as JSON that has these, [H, W, D].

    Other requests run between the rows: writing a whole grid takes tens of milliseconds.
    """
    parts = []
    for row in patches:
        parts.append(to_json(row.tolist()))
        await asyncio.sleep(0)
    before, after = to_json(document).split(b'"patches":null', 1)
    return b"".join([before, b'"patches":[', b",".join(parts), b"]", after])
