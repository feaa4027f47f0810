"""Requests, responses and metadata of the Open Inference Protocol, as pydantic models."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: Name of the only input tensor.
INPUT = "image"
#: The only model version: bundles have none, but the protocol's clients send one.
VERSION = "1"
#: Extensions of the protocol that requests may use.
EXTENSIONS = ["binary_tensor_data", "classification"]

Text = Annotated[str, Field(max_length=1000)]  # repeated in the answer or in the log
Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Input(BaseModel):
    """A part of a request: types are not converted, unknown fields are ignored."""

    model_config = ConfigDict(strict=True)


class RequestParameters(_Input):
    budget_ms: Annotated[float | None, Field(gt=0, le=3_600_000, allow_inf_nan=False)] = Field(
        None,
        description="milliseconds from the arrival of the headers until each image's answer is due;"
        " default: the server's budget_ms",
    )
    tier: Text = Field(
        "auto", description="name of a tier, or auto: the most accurate one that meets the budget"
    )
    min_tier: Text | None = Field(
        None,
        description="cheapest tier that auto may use; if it cannot meet the budget, the request"
        " is refused",
    )
    max_looks: Annotated[int | None, Field(ge=1, le=2)] = Field(
        None,
        description="how often an image may run at most: 1 forbids a second look on a better tier;"
        " default: the server's max_looks",
    )
    binary_data_output: bool = Field(
        False, description="return outputs as binary data unless an output sets binary_data"
    )


class InputParameters(_Input):
    binary_data_size: Size | None = Field(
        None, description="bytes of this tensor's binary data, which follow the JSON"
    )


class RequestInput(_Input):
    name: Text
    datatype: Literal["BYTES", "UINT8"]
    shape: Annotated[list[Size], Field(max_length=4)] = Field(
        description="BYTES (image files): [N] or [N, 1]; UINT8 (RGB pixels): [N, H, W, 3] or"
        " [H, W, 3]"
    )
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(
        None,
        description="BYTES as base64 strings, UINT8 as numbers, flat or nested; omit if"
        " binary_data_size is given",
    )


class OutputParameters(_Input):
    binary_data: bool | None = Field(
        None, description="return this output as binary data; patches always are"
    )
    datatype: Literal["FP32", "FP16"] | None = Field(
        None,
        description="for features and patches: their number format (default: FP32); FP16 is always"
        " binary",
    )
    normalize: bool = Field(
        False,
        description="for features and patches: divide each vector by its Euclidean length",
    )
    classification: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="for logits: number of best classes to return, as 'logit:index:label' (BYTES)",
    )


class RequestOutput(_Input):
    name: Text
    parameters: OutputParameters | None = None


class InferRequest(_Input):
    id: Text | None = Field(None, description="repeated in the response")
    parameters: RequestParameters | None = None
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=8, fail_fast=True)]
    outputs: Annotated[list[RequestOutput] | None, Field(max_length=8, fail_fast=True)] = Field(
        None, description="default: all outputs but patches"
    )


class ResponseOutput(BaseModel):
    name: str
    datatype: Literal["FP32", "FP16", "BYTES"]
    shape: list[int]
    parameters: dict[str, int] | None = Field(
        None, description="binary_data_size, if the output is binary"
    )
    data: list[float] | list[str] | None = Field(
        None, description="in row-major order; omitted if the output is binary"
    )


class ResponseParameters(BaseModel):
    """How each image was answered, in the order of the images."""

    tier: str = Field(description="the tiers used, joined by commas")
    reason: str = Field(description="why each tier was chosen, joined by semicolons")
    looks: str = Field(description="how often each image ran, joined by commas")
    met_budget: str = Field(description="true or false for each image, joined by commas")
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
    inputs: list[TensorMetadata] = Field(
        description="image files; RGB pixels as UINT8 [-1, -1, -1, 3] are accepted as well"
    )
    outputs: list[TensorMetadata]
    parameters: dict[str, str | int | float] = Field(
        description="tiers (cheapest first, joined by commas), budget_ms (default budget),"
        " max_images (maximum number of images in one request)"
    )


class Error(BaseModel):
    """An error in the protocol's form."""

    error: str = Field(description="the fault and what to do, in one line")
