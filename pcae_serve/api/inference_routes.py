"""/v2: the Open Inference Protocol over REST. Each image is scheduled like POST /classify."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel
from pydantic_core import to_json

from pcae_serve.api import problems, proxy_delay, server_timing
from pcae_serve.api.array_answers import NUMBER_BYTES, RAW, HeldResponse
from pcae_serve.api.auth import require_key
from pcae_serve.api.body import announced_bytes, read_body, unless_disconnected
from pcae_serve.api.form import require_plain_body
from pcae_serve.api.image_requests import body_limit, callers_of
from pcae_serve.api.parameters import MAX_BUDGET_MS, require_no_query
from pcae_serve.api.state import service_of
from pcae_serve.bundle.manifest import PATCHES
from pcae_serve.errors import (
    MalformedRequest,
    OutOfService,
    RequestError,
    UnknownModel,
    shown,
)
from pcae_serve.open_inference.schema import (
    EXTENSIONS,
    INPUT,
    VERSION,
    Error,
    InferRequest,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    OutputParameters,
    Ready,
    RequestInput,
    RequestOutput,
    RequestParameters,
    ServerMetadata,
    TensorMetadata,
)
from pcae_serve.open_inference.tensors import (
    File,
    default_outputs,
    image_files,
    offered_outputs,
    output_tensor,
    parse_request,
    patches_tensor,
    require_outputs,
    wants_patches,
)
from pcae_serve.runtime import refusals
from pcae_serve.runtime.memory_budget import Reservation
from pcae_serve.runtime.request_group import RequestGroup
from pcae_serve.runtime.requests import InferenceRequest, InferenceResult
from pcae_serve.version import __version__

#: Header with the length of the JSON, if binary data follow it.
HEADER_LENGTH = "Inference-Header-Content-Length"


Name = Annotated[str, Path(description="the name of the bundle")]
Version = Annotated[str, Path(description=f"always {VERSION}")]

router = APIRouter(prefix=problems.PROTOCOL, tags=["Open Inference Protocol"])


# --- OpenAPI

_ERRORS: dict[int, str] = {
    400: "the request is malformed, or an image is empty, truncated or damaged",
    401: "the request has no API key",
    403: "the API key is unknown",
    404: "this server has no such model or version",
    408: "the body did not arrive within the upload time",
    413: "too many bytes, images, pixels or JSON numbers",
    415: "not an image type that this server reads, or a compressed body",
    422: "a tier is unknown, or the budget is below what the fastest allowed tier needs",
    429: "the API key sends more images per second than it may; see Retry-After",
    500: "inference failed",
    503: "overloaded, starting, shutting down, or every allowed tier has failed; see Retry-After",
    504: "the budget passed before an image was answered",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": _ERRORS[status]} for status in statuses}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a JSON schema without references, which OpenAPI would resolve in its own document."""
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


#: An image of one white pixel, as pixels and as a PNG file.
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
                    "description": f"The JSON, followed by the input's binary data; the header"
                    f" {HEADER_LENGTH} has the length of the JSON. With length 0, the body is one"
                    " image file.",
                }
            },
        },
    }
}
_ANSWER: dict[str, Any] = {
    "model": InferResponse,
    "description": "The outputs for all images. If an output is binary, its data follow the JSON,"
    f" and the header {HEADER_LENGTH} has the length of the JSON.",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {
        HEADER_LENGTH: {
            "description": "length of the JSON in bytes, if binary data follow it",
            "schema": {"type": "integer"},
        }
    },
}


# --- routes


async def known_model(request: Request, name: Name) -> None:
    """Raise UnknownModel unless the bundle has this name."""
    model = service_of(request).bundle.manifest.name
    if name != model:
        raise UnknownModel(f"this server has no model {shown(name)}: it serves {model!r}")


async def known_version(request: Request, name: Name, version: Version) -> None:
    """Raise UnknownModel unless the bundle has this name, and the version is the only one."""
    await known_model(request, name)
    if version != VERSION:
        raise UnknownModel(
            f"model {name!r} has no version {shown(version)}: the only version is {VERSION!r}"
        )


@router.get("", responses=_errors(401, 403), dependencies=[Depends(require_key)])
async def server_metadata() -> ServerMetadata:
    """Return the server's name, version and protocol extensions."""
    return ServerMetadata(name="pcae-serve", version=__version__, extensions=EXTENSIONS)


@router.get("/health/live", responses=_errors(503))
async def live(request: Request) -> Live:
    """Report whether the process works; 503 if a device never returned from a call."""
    service_of(request).require_alive()
    return Live(live=True)


@router.get("/health/ready", responses=_errors(503))
async def ready(request: Request) -> Ready:
    """Report whether requests are accepted: latencies are measured and a tier works."""
    service_of(request).require_ready()
    return Ready(ready=True)


async def model_metadata(request: Request) -> ModelMetadata:
    """Return the model's tensors, tiers and limits. The model's name is the bundle's."""
    service = service_of(request)
    bundle, settings = service.bundle, service.settings
    offered = offered_outputs(bundle)
    if refusals.no_patches(bundle, service.engines):
        offered.pop(PATCHES, None)  # the backend does not return them
    return ModelMetadata(
        name=bundle.manifest.name,
        versions=[VERSION],
        platform=f"pcae-serve_{service.engines[0].name}",
        inputs=[TensorMetadata(name=INPUT, datatype="BYTES", shape=[-1])],
        outputs=[
            TensorMetadata(name=name, datatype=datatype, shape=[-1, *shape])
            for name, (datatype, shape) in offered.items()
        ],
        parameters={
            "tiers": ",".join(tier.name for tier in bundle.tiers),
            "budget_ms": settings.budget_ms,
            "max_images": settings.max_images,
        },
    )


async def model_ready(request: Request) -> ModelReady:
    """Report whether requests are accepted, as /v2/health/ready does; there is only one model."""
    service = service_of(request)
    service.require_ready()
    return ModelReady(name=service.bundle.manifest.name, ready=True)


async def infer(request: Request) -> Response:
    """Answer one or several images, each on its own tier. One refusal refuses the whole request."""
    arrival_s = proxy_delay.arrival_s(request.scope.get("state", {}))
    require_plain_body(request)
    require_no_query(request)
    service = service_of(request)
    read = partial(read_body, request, body_limit(service.settings))
    callers = callers_of(request)
    image = InferenceRequest(arrival_s, MAX_BUDGET_MS, "auto", None, None, *callers)
    with service.offer_group(image) as group:
        copies = 3  # the body, its text in base64, and the files
        body = await group.receive(read, announced_bytes(request), copies)
        max_images = service.settings.max_images
        infer_request, files = _parse(body, request.headers.get(HEADER_LENGTH), max_images)
        require_outputs(infer_request, service.bundle)
        dense = wants_patches(infer_request)
        if dense and (refused := refusals.no_patches(service.bundle, service.engines)):
            raise refused
        parameters = infer_request.parameters or RequestParameters()
        service.bundle.allowed_tiers(parameters.tier, parameters.min_tier)
        budget_ms = parameters.budget_ms or service.settings.budget_ms
        inference = InferenceRequest(
            arrival_s,
            budget_ms,
            parameters.tier,
            parameters.min_tier,
            service.bundle.output,
            *callers,
            max_looks=parameters.max_looks,
            patches=dense,
            number_bytes=NUMBER_BYTES["raw"],
            smaller="leave patches out of the outputs",
        )
        group.take(len(files))
        answered = await unless_disconnected(request, _answers(group, inference, files))
    answers = [answer for answer, _ in answered]
    held = [reservation for _, reservation in answered if reservation is not None]
    response = _response(infer_request, inference, answers, held)
    server_timing.record_timing(request, response, answers)
    return response


for _path, _known in (
    ("/models/{name}", known_model),
    ("/models/{name}/versions/{version}", known_version),
):
    _needs: Any = {"dependencies": [Depends(require_key), Depends(_known)]}
    router.add_api_route(_path, model_metadata, responses=_errors(401, 403, 404), **_needs)
    router.add_api_route(
        f"{_path}/ready", model_ready, responses=_errors(401, 403, 404, 503), **_needs
    )
    router.add_api_route(
        f"{_path}/infer",
        infer,
        methods=["POST"],
        response_model=None,
        responses={**_errors(*_ERRORS), 200: _ANSWER},
        openapi_extra=_BODY,
        **_needs,
    )


# --- body and answer


def _parse(
    body: bytes, header_length: str | None, max_images: int
) -> tuple[InferRequest, list[File]]:
    """Return the request in a body and the image files of its input."""
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdecimal()) or len(header_length) > 18:
            raise MalformedRequest(f"{HEADER_LENGTH} must be a number of bytes")
        length = int(header_length)
    if header_length is not None and length == 0:  # a single image file without JSON
        tensor = RequestInput(name=INPUT, datatype="BYTES", shape=[1])
        return InferRequest(inputs=[tensor]), [lambda: body]
    if length > len(body):
        raise MalformedRequest(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    infer_request = parse_request(body[:length])
    return infer_request, image_files(infer_request, memoryview(body)[length:], max_images)


async def _answers(
    group: RequestGroup, inference: InferenceRequest, files: Sequence[File]
) -> list[tuple[InferenceResult, Reservation | None]]:
    """Return the results of all images, and what holds the memory of their patch grids.

    The first refusal cancels the others and is raised.
    """

    async def answer(index: int, file: File) -> tuple[InferenceResult, Reservation | None]:
        try:
            with group.offer(inference) as offered:
                image = await offered.extract(asyncio.to_thread(file))
                result = await offered.run(image)
                return result, offered.hand_over_answer() if inference.patches else None
        except RequestError as error:
            if len(files) == 1:
                raise
            raise type(error)(f"image {index}: {error.detail}", **error.members) from None

    try:
        async with asyncio.TaskGroup() as running:
            tasks = [running.create_task(answer(i, file)) for i, file in enumerate(files)]
    except ExceptionGroup as refusals:
        raise refusals.exceptions[0] from None
    return [task.result() for task in tasks]


def _response(
    infer_request: InferRequest,
    inference: InferenceRequest,
    answers: list[InferenceResult],
    held: Sequence[Reservation],
) -> Response:
    """Return the answer with the requested outputs, as JSON or as JSON and binary data.

    held: released once it has been sent.
    """
    bundle = answers[0].bundle
    if any(answer.bundle is not bundle for answer in answers):
        raise OutOfService("the bundle was reloaded between the images; retry", retry_after_s=1)
    vectors = np.stack([answer.vector for answer in answers])  # [N, width]
    binary_default = (infer_request.parameters or RequestParameters()).binary_data_output
    outputs, blobs = list[dict[str, Any]](), list[bytes]()
    for wanted in infer_request.outputs or [
        RequestOutput(name=name) for name in default_outputs(bundle)
    ]:
        parameters = wanted.parameters or OutputParameters()
        if wanted.name == PATCHES:
            grids = [answer.patches for answer in answers if answer.patches is not None]
            tensor = patches_tensor(parameters, grids)
        else:
            tensor = output_tensor(wanted.name, parameters, vectors, bundle.labels)
        output: dict[str, Any] = {
            "name": wanted.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        binary = parameters.binary_data
        always = tensor.datatype == "FP16" or wanted.name == PATCHES
        if always or (binary_default if binary is None else binary):
            blobs.append(tensor.binary())
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = tensor.values
        outputs.append(output)
    document = {
        "model_name": bundle.manifest.name,
        "model_version": VERSION,
        **({} if infer_request.id is None else {"id": infer_request.id}),
        "parameters": {
            "tier": ",".join(answer.tier.name for answer in answers),
            "reason": "; ".join(answer.reason for answer in answers),
            "looks": ",".join(str(answer.looks) for answer in answers),
            "met_budget": ",".join(str(answer.met_budget).lower() for answer in answers),
            "budget_ms": inference.budget_ms,
        },
        "outputs": outputs,
    }
    text = to_json(document)
    if not blobs:
        return Response(text, media_type="application/json")
    content = b"".join([text, *blobs])
    return HeldResponse(content, RAW, {HEADER_LENGTH: str(len(text))}, held)
