"""The Open Inference Protocol (v2, as KServe and Triton speak it) over REST: another way in.

It knows the protocol's tensors, as JSON and as Triton's binary extension, and turns them into image
files; each takes the way of POST /classify, by itself. It knows nothing of decoding and of models.
"""

import asyncio
import base64
import struct
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json

from pcae_serve.api import proxy_delay, server_timing
from pcae_serve.api.body import limited, unless_left
from pcae_serve.bundle.reader import Bundle
from pcae_serve.errors import (
    MalformedRequest,
    OutOfService,
    RequestError,
    TooLarge,
    UnknownModel,
    UnsupportedType,
    shown,
)
from pcae_serve.runtime.servable import InferenceRequest, InferenceResult
from pcae_serve.runtime.service import Service
from pcae_serve.version import __version__

INPUT = "image"
VERSION = "1"  # a bundle has no versions, and the protocol no request without
HEADER_LENGTH = "Inference-Header-Content-Length"

#: Images of one request. Each is admitted by itself, but their files are all in memory by then.
MAX_IMAGES = 64
#: Commas and opened brackets in the JSON: parsing holds up everybody else's request, and this many
#: take about 10 ms. An image of 256 x 256 pixels, nested, has as many; binary data are not parsed.
MAX_JSON_PARTS = 265_000

Text = Annotated[str, Field(max_length=1000)]  # what is told back to the client, or to the log
Size = Annotated[int, Field(ge=0, lt=2**63)]
File = Callable[[], bytes]


class _Said(BaseModel):
    """What clients say: types are not guessed, what is not known is passed over."""

    model_config = ConfigDict(strict=True)


class RequestParameters(_Said):
    budget_ms: Annotated[float | None, Field(gt=0, le=3_600_000, allow_inf_nan=False)] = Field(
        None, description="time you can wait, from the request's headers on; for each image"
    )
    tier: Text = Field("auto", description="a tier's name, or auto")
    min_tier: Text | None = Field(None, description="refuse rather than go below")
    binary_data_output: bool = Field(False, description="outputs as binary data by default")


class InputParameters(_Said):
    binary_data_size: Size | None = Field(None, description="bytes of it behind the JSON")


class RequestInput(_Said):
    name: Text
    datatype: Literal["BYTES", "UINT8"]
    shape: Annotated[list[Size], Field(max_length=4)] = Field(
        description="BYTES, image files: [N] or [N, 1]; UINT8, RGB pixels: [N, H, W, 3], [H, W, 3]"
    )
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(
        None, description="BYTES as base64; UINT8 as numbers, flat or nested; or binary_data_size"
    )


class OutputParameters(_Said):
    binary_data: bool | None = None
    classification: Annotated[int, Field(ge=1)] | None = Field(
        None, description="of logits: the best so many as 'logit:index:label' (BYTES)"
    )


class RequestOutput(_Said):
    name: Text
    parameters: OutputParameters | None = None


class InferRequest(_Said):
    id: Text | None = None
    parameters: RequestParameters | None = None
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=8, fail_fast=True)]
    outputs: Annotated[list[RequestOutput] | None, Field(max_length=8, fail_fast=True)] = Field(
        None, description="all of them where left out"
    )


class ResponseOutput(BaseModel):
    name: str
    datatype: Literal["FP32", "BYTES"]
    shape: list[int]
    parameters: dict[str, int] | None = Field(None, description="binary_data_size, where binary")
    data: list[float] | list[str] | None = Field(None, description="row by row")


class ResponseParameters(BaseModel):
    """How each image was answered, in their order."""

    tier: str = Field(description="that answered, joined by commas")
    reason: str = Field(description="why that tier, joined by semicolons")
    met_budget: str = Field(description="true or false, joined by commas")
    budget_ms: float


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: ResponseParameters
    outputs: list[ResponseOutput]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(Ready):
    name: str


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata] = Field(description="UINT8 [-1, -1, -1, 3] is taken as well")
    outputs: list[TensorMetadata]
    parameters: dict[str, str | float] = Field(description="the tiers, the cheapest first")


class Error(BaseModel):
    """An error, as the protocol says it."""

    error: str = Field(description="what was wrong and what to do, in one line")


_ERRORS: dict[int, str] = {
    400: "the request is malformed, or an image is empty, truncated or damaged",
    401: "an API key is needed",
    403: "the API key is not known",
    404: "this server has no such model or version",
    408: "the body did not arrive in time",
    413: "too many bytes, images, pixels or JSON numbers",
    415: "not an image type this server reads, or a compressed body",
    422: "a tier is unknown, or the budget is below what the fastest allowed tier needs",
    500: "the model did not run",
    503: "not ready, or the load leaves no allowed tier in time; see Retry-After",
    504: "the budget passed in the queue",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": _ERRORS[status]} for status in statuses}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema without references: OpenAPI looks for them elsewhere."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(part, definitions) for key, part in schema.items() if key != "$defs"}


def _schema(model: type[BaseModel]) -> Any:
    schema = model.model_json_schema()
    return _inlined(schema, schema.get("$defs", {}))


#: An image of one white pixel.
_PIXEL = {"name": INPUT, "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [255, 255, 255]}
_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)
EXAMPLES: dict[str, dict[str, Any]] = {
    "an image file": {
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [1], "data": [_PNG]}],
        "parameters": {"budget_ms": 500.0, "tier": "auto"},
    },
    "pixels, one output": {"inputs": [_PIXEL], "outputs": [{"name": "logits"}]},
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": _schema(InferRequest),
                "examples": {name: {"value": example} for name, example in EXAMPLES.items()},
            },
            "application/octet-stream": {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": f"The JSON, its length in the header {HEADER_LENGTH}, and behind"
                    " it the input's data; with length 0, one image file alone.",
                }
            },
        },
    }
}
_ANSWER: dict[str, Any] = {
    "model": InferResponse,
    "description": f"All images' answers. Where an output is binary, {HEADER_LENGTH} says how long"
    " the JSON is that its data stand behind.",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {
        HEADER_LENGTH: {
            "description": "bytes of the JSON, where binary data stand behind it",
            "schema": {"type": "integer"},
        }
    },
}


class _Route(APIRoute):
    """A route whose errors are told as the protocol has them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_tell(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestError as error:
                return JSONResponse({"error": error.detail}, error.status, error.headers)

        return handle_or_tell


def router(service: Service, caller: Callable[..., Any]) -> APIRouter:
    """The protocol's routes around a service. `caller` is what all but health depend on: a key."""
    router = APIRouter(prefix="/v2", route_class=_Route, tags=["Open Inference Protocol"])

    async def named(name: str) -> None:
        model = service.bundle.manifest.name
        if name != model:
            raise UnknownModel(f"this server has no model {shown(name)}: it serves {model!r}")

    async def versioned(name: str, version: str) -> None:
        await named(name)
        if version != VERSION:
            raise UnknownModel(
                f"model {name!r} has no version {shown(version)}: its one is {VERSION!r}"
            )

    @router.get("", responses=_errors(401, 403), dependencies=[Depends(caller)])
    async def server_metadata() -> ServerMetadata:
        """What this server is, and which extensions it speaks."""
        return ServerMetadata(
            name="pcae-serve",
            version=__version__,
            extensions=["binary_tensor_data", "classification"],
        )

    @router.get("/health/live", responses=_errors(503))
    async def live() -> Live:
        """The process answers, and no device is lost in a call that does not come back."""
        service.require_alive()
        return Live(live=True)

    @router.get("/health/ready", responses=_errors(503))
    async def ready() -> Ready:
        """Requests are taken: latencies are known and the server is not stopping."""
        service.require_ready()
        return Ready(ready=True)

    async def model_metadata() -> ModelMetadata:
        """The model's tensors and tiers. Its name is the bundle's."""
        return ModelMetadata(
            name=service.bundle.manifest.name,
            versions=[VERSION],
            platform=f"pcae-serve_{service.engines[0].name}",
            inputs=[TensorMetadata(name=INPUT, datatype="BYTES", shape=[-1])],
            outputs=[
                TensorMetadata(name=name, datatype=datatype, shape=[-1, *shape])
                for name, (datatype, shape) in _offered(service.bundle).items()
            ],
            parameters={
                "tiers": ",".join(tier.name for tier in service.bundle.tiers),
                "budget_ms": service.settings.budget_ms,
            },
        )

    async def model_ready() -> ModelReady:
        """As /v2/health/ready: there is one model."""
        service.require_ready()
        return ModelReady(name=service.bundle.manifest.name, ready=True)

    async def infer(request: Request) -> Response:
        """Answer one image or several, each on a tier of its own; one refused refuses all."""
        arrival_s = proxy_delay.arrival_s(request.scope.get("state", {}))
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise UnsupportedType(f"a body in {shown(encoding)} is not read: send it as it is")
        limit = int(service.settings.max_body_mb * 1e6)

        async def run(read: Callable[[], Awaitable[bytes]]) -> Response:
            with service.taking():
                return await answered(await service.receive(read))

        async def answered(body: bytes) -> Response:
            asked, files = _parse(body, request.headers.get(HEADER_LENGTH))
            if len(files) > (most := service.settings.max_images):
                raise TooLarge(f"{len(files)} images are too many: send at most {most}")
            _require_outputs(asked, service.bundle)
            said = asked.parameters or RequestParameters()
            service.bundle.allowed(said.tier, said.min_tier)
            budget_ms = said.budget_ms or service.settings.budget_ms
            ask = InferenceRequest(
                arrival_s, budget_ms, said.tier, said.min_tier, service.bundle.answers
            )
            answers = await _answers(service, ask, files)
            response = _response(asked, ask, answers)
            server_timing.record_timing(request, response, answers)
            return response

        async def read() -> bytes:
            return b"".join([chunk async for chunk in limited(request, limit)])

        return await unless_left(request, run, read)

    for path, known in (
        ("/models/{name}", named),
        ("/models/{name}/versions/{version}", versioned),
    ):
        those: Any = {"dependencies": [Depends(caller), Depends(known)]}
        router.add_api_route(path, model_metadata, responses=_errors(401, 403, 404), **those)
        ready_errors = _errors(401, 403, 404, 503)
        router.add_api_route(f"{path}/ready", model_ready, responses=ready_errors, **those)
        router.add_api_route(
            f"{path}/infer",
            infer,
            methods=["POST"],
            response_model=None,
            responses={**_errors(*_ERRORS), 200: _ANSWER},
            openapi_extra=_BODY,
            **those,
        )
    return router


def _offered(bundle: Bundle) -> dict[str, tuple[str, list[int]]]:
    """Outputs: datatype and, for one image, shape."""
    vectors = {bundle.answers: ("FP32", [bundle.width])}
    return vectors | ({"label": ("BYTES", list[int]())} if bundle.labels else {})


# --- what was asked


def _parse(body: bytes, header_length: str | None) -> tuple[InferRequest, list[File]]:
    """The request, and what makes each of its images' files."""
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdecimal()) or len(header_length) > 18:
            raise MalformedRequest(f"{HEADER_LENGTH} must be a number of bytes")
        length = int(header_length)
    if header_length is not None and length == 0:  # one tensor of one element, without JSON
        tensor = RequestInput(name=INPUT, datatype="BYTES", shape=[1])
        return InferRequest(inputs=[tensor]), [lambda: body]
    if length > len(body):
        raise MalformedRequest(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    asked = _request(body[:length])
    [tensor], binary = asked.inputs, memoryview(body)[length:]
    size = tensor.parameters.binary_data_size if tensor.parameters is not None else None
    if (size is None) == (tensor.data is None):
        raise MalformedRequest("inputs.0: give either data or parameters.binary_data_size")
    if len(binary) != (size or 0):
        raise MalformedRequest(
            f"{len(binary)} bytes stand behind the JSON, but binary_data_size says {size or 0}"
        )
    read = _files if tensor.datatype == "BYTES" else _pixels
    return asked, read(tensor, binary)


def _request(text: bytes) -> InferRequest:
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_PARTS:
        raise TooLarge(f"the JSON has over {MAX_JSON_PARTS:,} parts: send pixels as binary data")
    try:
        asked = InferRequest.model_validate(from_json(text, allow_inf_nan=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise MalformedRequest(f"{where}: {first['msg']}") from None
    except ValueError as error:
        raise MalformedRequest(f"the request is no valid JSON: {error}") from None
    names = [tensor.name for tensor in asked.inputs]
    if names != [INPUT]:
        raise MalformedRequest(
            f"inputs must be one, named {INPUT!r}, not {shown(', '.join(names))}"
        )
    return asked


def _require_outputs(asked: InferRequest, bundle: Bundle) -> None:
    """Raise MalformedRequest for outputs that there are not, before anything is computed."""
    offered, names = _offered(bundle), set[str]()
    for output in asked.outputs or ():
        if output.name not in offered:
            raise MalformedRequest(
                f"output {shown(output.name)} is unknown: choose of {', '.join(offered)}"
            )
        if output.name in names:
            raise MalformedRequest(f"output {shown(output.name)} is asked for twice")
        if output.parameters and output.parameters.classification and output.name != "logits":
            raise MalformedRequest(
                f"output {shown(output.name)} has no classification: ask for logits"
            )
        names.add(output.name)


def _require_count(count: int) -> None:
    if count == 0:
        raise MalformedRequest("inputs.0.shape: there is no image")
    if count > MAX_IMAGES:
        raise TooLarge(f"{count} images are too many: send at most {MAX_IMAGES} in one request")


def _files(tensor: RequestInput, binary: memoryview) -> list[File]:
    """Image files, out of a BYTES tensor."""
    if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ([], [1]):
        raise MalformedRequest(f"inputs.0.shape: BYTES are [N] or [N, 1], not {tensor.shape}")
    count = tensor.shape[0]
    _require_count(count)
    if tensor.data is None:
        return _elements(binary, count)
    data = tensor.data
    if len(data) == count and all(isinstance(row, list) and len(row) == 1 for row in data):
        data = [row[0] for row in data]
    if len(data) != count or not all(isinstance(element, str) for element in data):
        raise MalformedRequest(f"inputs.0.data: shape {tensor.shape} takes {count} base64 strings")
    return [partial(_from_base64, element) for element in data]


def _elements(binary: memoryview, count: int) -> list[File]:
    """Elements of a BYTES tensor, each behind its length."""
    elements, at = list[File](), 0
    while at + 4 <= len(binary) and len(elements) < count:
        [size] = struct.unpack_from("<I", binary, at)
        elements.append(partial(bytes, binary[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(binary) or len(elements) != count:
        raise MalformedRequest(
            f"the binary data are not {count} elements, each behind its length (4 bytes,"
            " the lowest first)"
        )
    return elements


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise MalformedRequest("BYTES in JSON must be an image file in base64") from None


def _pixels(tensor: RequestInput, binary: memoryview) -> list[File]:
    """Image files, out of a UINT8 tensor: all images take one way in, and it takes files."""
    if len(tensor.shape) not in (3, 4) or tensor.shape[-1] != 3 or 0 in tensor.shape[-3:]:
        raise MalformedRequest(
            f"inputs.0.shape: UINT8 are [N, H, W, 3] or [H, W, 3], not {tensor.shape}"
        )
    *counts, height, width, _ = tensor.shape
    count, size = prod(counts), height * width * 3
    _require_count(count)
    if tensor.data is not None:
        binary = memoryview(_numbers(tensor.data, tensor.shape))
    if len(binary) != count * size:
        raise MalformedRequest(
            f"inputs.0: shape {tensor.shape} takes {count * size} numbers, not {len(binary)}"
        )
    return [
        partial(_bitmap, binary[i * size : (i + 1) * size], height, width) for i in range(count)
    ]


def _numbers(data: list[Any], shape: Sequence[int]) -> bytes:
    """Numbers from 0 to 255, flat or nested as the shape is."""
    try:
        if any(isinstance(part, list) for part in data):
            level: list[Any] = [data]
            for size in shape:
                if any(len(part) != size for part in level):
                    raise ValueError
                level = list(chain.from_iterable(level))
            data = level
        return bytes(data)  # no floats, no strings, nothing beyond 255
    except (TypeError, ValueError):
        raise MalformedRequest(
            f"inputs.0.data: UINT8 {list(shape)} takes whole numbers from 0 to 255, flat or nested"
        ) from None


def _bitmap(pixels: memoryview, height: int, width: int) -> bytes:
    """The quickest of the file types read: nothing is compressed."""
    file = BytesIO()
    array = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    Image.fromarray(array).save(file, "BMP")
    return file.getvalue()


# --- what is answered


async def _answers(
    service: Service, ask: InferenceRequest, files: Sequence[File]
) -> list[InferenceResult]:
    """Every image's answer; the first refusal cancels the others."""

    async def answer(index: int, file: File) -> InferenceResult:
        async def read() -> bytes:
            return await asyncio.to_thread(file)

        try:
            return await service.answer(ask, read, admitted=True)
        except RequestError as error:
            if len(files) == 1:
                raise
            raise type(error)(f"image {index}: {error.detail}", **error.members) from None

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(i, file)) for i, file in enumerate(files)]
    except ExceptionGroup as refusals:
        raise refusals.exceptions[0] from None
    return [task.result() for task in tasks]


@dataclass(frozen=True)
class _Tensor:
    """An output; `values` row by row."""

    datatype: Literal["FP32", "BYTES"]
    shape: list[int]
    values: list[float] | list[str]

    def binary(self) -> bytes:
        if self.datatype == "FP32":
            return np.asarray(self.values, "<f4").tobytes()
        texts = [str(value).encode() for value in self.values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _tensor(name: str, classes: int | None, answers: list[InferenceResult]) -> _Tensor:
    vectors = np.stack([answer.vector for answer in answers])
    if name == "label":
        best_of = zip(answers, vectors.argmax(axis=1), strict=True)
        return _Tensor("BYTES", [len(answers)], [answer.bundle.labels[i] for answer, i in best_of])
    if classes is None:
        return _Tensor("FP32", list(vectors.shape), vectors.ravel().tolist())
    best = np.argsort(-vectors, axis=1, kind="stable")[:, :classes]
    ranked = [
        f"{answer.vector[i]:.6f}:{i}:{answer.bundle.labels[i]}"
        for answer, row in zip(answers, best, strict=True)
        for i in row
    ]
    return _Tensor("BYTES", list(best.shape), ranked)


def _response(
    asked: InferRequest, ask: InferenceRequest, answers: list[InferenceResult]
) -> Response:
    bundle = answers[0].bundle
    if any(answer.bundle is not bundle for answer in answers):
        raise OutOfService("a reload came between the images: retry", retry_after_s=1)
    said = asked.parameters or RequestParameters()
    outputs, blobs = list[dict[str, Any]](), list[bytes]()
    for wanted in asked.outputs or [RequestOutput(name=name) for name in _offered(bundle)]:
        parameters = wanted.parameters or OutputParameters()
        tensor = _tensor(wanted.name, parameters.classification, answers)
        output: dict[str, Any] = {
            "name": wanted.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        binary = parameters.binary_data
        if said.binary_data_output if binary is None else binary:
            blobs.append(tensor.binary())
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = tensor.values
        outputs.append(output)
    document = {
        "model_name": bundle.manifest.name,
        "model_version": VERSION,
        **({} if asked.id is None else {"id": asked.id}),
        "parameters": {
            "tier": ",".join(answer.tier.name for answer in answers),
            "reason": "; ".join(answer.reason for answer in answers),
            "met_budget": ",".join(str(answer.met_budget).lower() for answer in answers),
            "budget_ms": ask.budget_ms,
        },
        "outputs": outputs,
    }
    text = to_json(document)
    if not blobs:
        return Response(text, media_type="application/json")
    return Response(
        b"".join([text, *blobs]),
        headers={HEADER_LENGTH: str(len(text))},
        media_type="application/octet-stream",
    )
