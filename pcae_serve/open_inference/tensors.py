"""Convert tensors of the Open Inference Protocol: inputs to image files, vectors to outputs.

JSON ----------------> InferRequest --+
binary data (bytes) ------------------+--> image files, as functions that return their bytes
vectors [N, width] --> OutputTensor (JSON values or binary data)
patch grids [H, W, D] --> OutputTensor (binary data)
"""

import base64
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from pydantic_core import from_json

from pcae_serve.bundle.features import convert
from pcae_serve.bundle.manifest import PATCHES
from pcae_serve.bundle.probabilities import sigmoid
from pcae_serve.bundle.reader import Bundle
from pcae_serve.errors import MalformedRequest, TooLarge, shown
from pcae_serve.open_inference.schema import (
    INPUT,
    InferRequest,
    OutputParameters,
    RequestInput,
)

#: Maximum commas and opening brackets in the JSON. Parsing blocks all other requests, and this
#: number takes about 10 ms; it allows a nested image of 256 x 256 pixels. Binary data are not
#: parsed.
MAX_JSON_PARTS = 265_000

#: Returns the bytes of an image file; runs in a thread.
File = Callable[[], bytes]


def parse_request(text: bytes) -> InferRequest:
    """Parse and validate the JSON of a request. Raise TooLarge or MalformedRequest."""
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_PARTS:
        raise TooLarge(
            f"the JSON has more than {MAX_JSON_PARTS:,} commas and brackets; send pixels as"
            " binary data"
        )
    try:
        return InferRequest.model_validate(from_json(text, allow_inf_nan=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise MalformedRequest(f"{where}: {first['msg']}") from None
    except ValueError as error:
        raise MalformedRequest(f"the request is not valid JSON: {error}") from None


def image_files(request: InferRequest, binary: memoryview, max_images: int) -> list[File]:
    """Return the image files of a request's input tensor.

    binary: the tensor's binary data; empty if its data is in the JSON. Raise MalformedRequest, or
    TooLarge for more than `max_images` images.
    """
    names = [tensor.name for tensor in request.inputs]
    if names != [INPUT]:
        raise MalformedRequest(
            f"inputs must be a single tensor named {INPUT!r}, not {shown(', '.join(names))}"
        )
    [tensor] = request.inputs
    size = tensor.parameters.binary_data_size if tensor.parameters is not None else None
    if (size is None) == (tensor.data is None):
        raise MalformedRequest("inputs.0: give either data or parameters.binary_data_size")
    if len(binary) != (size or 0):
        raise MalformedRequest(
            f"{len(binary)} bytes follow the JSON, but binary_data_size is {size or 0}"
        )
    read = _files if tensor.datatype == "BYTES" else _pixels
    return read(tensor, binary, max_images)


def _require_count(count: int, max_images: int) -> None:
    if count == 0:
        raise MalformedRequest("inputs.0.shape: the tensor has no images")
    if count > max_images:
        raise TooLarge(f"{count} images in one request, over the limit of {max_images}; send fewer")


def _files(tensor: RequestInput, binary: memoryview, max_images: int) -> list[File]:
    """Return the image files in a BYTES tensor."""
    if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ([], [1]):
        raise MalformedRequest(
            f"inputs.0.shape: a BYTES tensor is [N] or [N, 1], not {tensor.shape}"
        )
    count = tensor.shape[0]
    _require_count(count, max_images)
    if tensor.data is None:
        return _elements(binary, count)
    data = tensor.data
    if len(data) == count and all(isinstance(row, list) and len(row) == 1 for row in data):
        data = [row[0] for row in data]  # [N, 1], nested
    if len(data) != count or not all(isinstance(element, str) for element in data):
        raise MalformedRequest(f"inputs.0.data: shape {tensor.shape} needs {count} base64 strings")
    return [partial(_from_base64, element) for element in data]


def _elements(binary: memoryview, count: int) -> list[File]:
    """Return the elements of a binary BYTES tensor; each follows its length."""
    elements, at = list[File](), 0
    while at + 4 <= len(binary) and len(elements) < count:
        [size] = struct.unpack_from("<I", binary, at)
        elements.append(partial(bytes, binary[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(binary) or len(elements) != count:
        raise MalformedRequest(
            f"the binary data must have {count} elements, each after its length as 4 bytes in"
            " little-endian order"
        )
    return elements


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise MalformedRequest("BYTES in JSON must be an image file in base64") from None


def _pixels(tensor: RequestInput, binary: memoryview, max_images: int) -> list[File]:
    """Return image files with the pixels of a UINT8 tensor: all images take the same path."""
    if len(tensor.shape) not in (3, 4) or tensor.shape[-1] != 3 or 0 in tensor.shape[-3:]:
        raise MalformedRequest(
            f"inputs.0.shape: a UINT8 tensor is [N, H, W, 3] or [H, W, 3], not {tensor.shape}"
        )
    *counts, height, width, _ = tensor.shape
    count, size = prod(counts), height * width * 3
    _require_count(count, max_images)
    if tensor.data is not None:
        binary = memoryview(_numbers(tensor.data, tensor.shape))
    if len(binary) != count * size:
        raise MalformedRequest(
            f"inputs.0: shape {tensor.shape} needs {count * size} numbers, not {len(binary)}"
        )
    return [
        partial(_bitmap, binary[i * size : (i + 1) * size], height, width) for i in range(count)
    ]


def _numbers(data: list[Any], shape: Sequence[int]) -> bytes:
    """Return numbers from 0 to 255 as bytes; `data` is flat, or nested as `shape`."""
    try:
        if any(isinstance(part, list) for part in data):
            level: list[Any] = [data]
            for size in shape:
                if any(len(part) != size for part in level):
                    raise ValueError
                level = list(chain.from_iterable(level))
            data = level
        return bytes(data)  # refuses floats, strings and numbers above 255
    except (TypeError, ValueError):
        raise MalformedRequest(
            f"inputs.0.data: UINT8 {list(shape)} needs integers from 0 to 255, flat or nested"
        ) from None


def _bitmap(pixels: memoryview, height: int, width: int) -> bytes:
    """Return pixels as a BMP file, the type that is written fastest: it is not compressed."""
    file = BytesIO()
    array = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    Image.fromarray(array).save(file, "BMP")
    return file.getvalue()


def offered_outputs(bundle: Bundle) -> dict[str, tuple[str, list[int]]]:
    """Return the outputs of a bundle by name, with datatype and shape for one image."""
    vectors: dict[str, tuple[str, list[int]]] = {bundle.output: ("FP32", [bundle.width])}
    match bundle.answers:
        case "classes":
            return vectors | {"label": ("BYTES", list[int]())}
        case "labels":  # independent, so there may be none or several
            return vectors | {"probabilities": ("FP32", [bundle.width])}
        case "features" if bundle.patch_grid is not None:
            return vectors | {PATCHES: ("FP32", list(bundle.patch_grid))}
        case "features":
            return vectors


def default_outputs(bundle: Bundle) -> list[str]:
    """Return the outputs of a request that names none: all but patch grids, which are large."""
    return [name for name in offered_outputs(bundle) if name != PATCHES]


def wants_patches(request: InferRequest) -> bool:
    """Return whether a request names the output with patch grids."""
    return any(output.name == PATCHES for output in request.outputs or ())


def require_outputs(request: InferRequest, bundle: Bundle) -> None:
    """Raise MalformedRequest if the bundle does not offer a requested output."""
    offered, names = offered_outputs(bundle), set[str]()
    for output in request.outputs or ():
        if output.name not in offered:
            hint = "; this bundle was exported without --dense" if output.name == PATCHES else ""
            raise MalformedRequest(
                f"unknown output {shown(output.name)}; choose from {', '.join(offered)}{hint}"
            )
        if output.name in names:
            raise MalformedRequest(f"output {shown(output.name)} is requested twice")
        if output.parameters and output.parameters.classification and output.name != "logits":
            raise MalformedRequest(
                f"output {shown(output.name)} does not support classification; request logits"
            )
        form = output.parameters or OutputParameters()
        if (form.datatype or form.normalize) and output.name not in ("features", PATCHES):
            raise MalformedRequest(
                f"output {shown(output.name)} supports neither datatype nor normalize; request"
                " features"
            )
        if output.name == PATCHES and form.binary_data is False:
            raise MalformedRequest(f"output {PATCHES!r} is always binary; omit binary_data")
        if form.datatype == "FP16" and form.binary_data is False:
            raise MalformedRequest("FP16 is always binary; omit binary_data, or request FP32")
        names.add(output.name)


@dataclass(frozen=True)
class OutputTensor:
    """An output; `values` in row-major order, in an array if they are always binary."""

    datatype: Literal["FP32", "FP16", "BYTES"]
    shape: list[int]
    values: list[float] | list[str] | NDArray[Any]

    def binary(self) -> bytes:
        """Return the values as binary data: little-endian floats, or texts after their lengths."""
        if self.datatype != "BYTES":
            return np.asarray(self.values, "<f4" if self.datatype == "FP32" else "<f2").tobytes()
        texts = [str(value).encode() for value in self.values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def output_tensor(
    name: str, parameters: OutputParameters, vectors: NDArray[np.float32], labels: Sequence[str]
) -> OutputTensor:
    """Return one output for all images.

    vectors: [N, width] logits or features. parameters: with `classification`, return this number of
    best classes as 'logit:index:label' instead of the logits. Raises InvalidParameter for features
    that FP16 cannot hold.
    """
    classes = parameters.classification
    if name == "features":
        half = parameters.datatype == "FP16"
        vectors = convert(vectors, parameters.normalize, "float16" if half else "float32")
        values = vectors.ravel().tolist()
        return OutputTensor("FP16" if half else "FP32", list(vectors.shape), values)
    if name == "probabilities":
        probabilities = sigmoid(vectors)
        return OutputTensor("FP32", list(vectors.shape), probabilities.ravel().tolist())
    if name == "label":
        best_labels = [labels[i] for i in vectors.argmax(axis=1)]
        return OutputTensor("BYTES", [len(vectors)], best_labels)
    if classes is None:
        return OutputTensor("FP32", list(vectors.shape), vectors.ravel().tolist())
    best = np.argsort(-vectors, axis=1, kind="stable")[:, :classes]  # [N, classes]
    ranked = [
        f"{vector[i]:.6f}:{i}:{labels[i]}"
        for vector, row in zip(vectors, best, strict=True)
        for i in row
    ]
    return OutputTensor("BYTES", list(best.shape), ranked)


def patches_tensor(
    parameters: OutputParameters, grids: Sequence[NDArray[np.float32]]
) -> OutputTensor:
    """Return the patch grids [H, W, D] of all images as one output [N, H, W, D].

    Raises InvalidParameter for a state that FP16 cannot hold.
    """
    half = parameters.datatype == "FP16"
    dtype = "float16" if half else "float32"
    values = np.stack([convert(grid, parameters.normalize, dtype) for grid in grids])
    return OutputTensor("FP16" if half else "FP32", list(values.shape), values)
