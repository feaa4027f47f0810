"""bundle.json as pydantic models: what a bundle contains, and what its tiers cost and achieve.

bundle.json            the manifest, with the SHA-256 of every other file
README.md              model card
models/<id>/           config.json, preprocessor_config.json, model.safetensors, *.onnx
"""

from datetime import datetime
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity
from pcae_serve.bundle.tokens import Rule
from pcae_serve.frozen_model import FrozenModel

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
ELASTIC_GRAPH = "elastic.onnx"
INT8_GRAPH = "elastic.int8.onnx"

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,39}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
#: Names that a tier must not have, and why.
RESERVED_NAMES = {
    "auto": "a request uses it to leave the choice to the server",
    "elastic": "it names the graph that serves all tiers",
}


class Model(FrozenModel):
    """The properties of one network that the server needs."""

    image_size: Annotated[int, Field(ge=1)]
    patches: Annotated[int, Field(ge=1)]
    patch_size: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    depth: Annotated[int, Field(ge=1)]
    parameters: Annotated[int, Field(ge=1)]
    reduction_points: tuple[int, ...]
    reduction: Rule = "ptr"
    pooling: Literal["mean", "cls"]
    answers: Literal["logits", "features"] = "logits"  # features [N, width] without a head
    half: Literal["float16", "bfloat16"] | None = None  # of its graphs for GPUs; None: no graphs


class Tier(FrozenModel):
    """A model at one keep ratio: a point of the trade-off between speed and accuracy."""

    name: Name
    model: Name
    keep_ratio: Annotated[float, Field(gt=0, le=1)]
    token_counts: tuple[int, ...]  # patches kept after each reduction point
    macs: Annotated[int, Field(ge=1)]  # multiply-adds per image
    precision: Literal["float32", "int8"] = "float32"  # of products with weights, on a CPU
    accuracy: Accuracy | None = None
    agreement: Agreement | None = None
    fidelity: Fidelity | None = None
    dominated: bool = False  # a cheaper tier is at least as good

    @property
    def quality(self) -> float | None:
        """Return the measure that tiers are compared by: top-1 or its substitute, or None."""
        if self.accuracy is not None:
            return self.accuracy.top1
        if self.agreement is not None:
            return self.agreement.share
        return None if self.fidelity is None else self.fidelity.cosine

    @property
    def elastic_graph(self) -> str:
        """Return the file name of the graph for CPUs, whose token counts are an input."""
        return INT8_GRAPH if self.precision == "int8" else ELASTIC_GRAPH

    @property
    def graph(self) -> str:
        """Return the file name of the static float32 graph, whose token counts are constant."""
        return f"{self.name}.onnx"

    @property
    def cuda_graph(self) -> str:
        """Return the file name of the half-precision graph for ONNX Runtime (fused attention)."""
        return f"{self.name}.cuda.onnx"

    @property
    def tensorrt_graph(self) -> str:
        """Return the file name of the half-precision graph for TensorRT (plain operators)."""
        return f"{self.name}.tensorrt.onnx"


class Manifest(FrozenModel):
    """The content of bundle.json."""

    schema_version: Literal[1] = 1
    name: str
    created: datetime
    producer: dict[str, str]  # versions of the packages that wrote it
    labels: tuple[str, ...]  # empty if the models compute features
    models: Annotated[dict[Name, Model], Field(min_length=1)]
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1)]  # by MACs, ascending
    files: dict[str, str]  # path in the bundle -> SHA-256, for every other file

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names):
            raise ValueError(f"tier names must be different: {names}")
        for name in RESERVED_NAMES.keys() & set(names):
            raise ValueError(f"tier name {name!r} is reserved: {RESERVED_NAMES[name]}")
        costs = [tier.macs for tier in self.tiers]
        if costs != sorted(costs):
            raise ValueError("tiers must be in ascending order of MACs")
        if len({model.image_size for model in self.models.values()}) > 1:
            raise ValueError("all models of a bundle must have the same image size")
        answers = {(m.answers, m.answers == "features" and m.width) for m in self.models.values()}
        if len(answers) > 1:
            raise ValueError("all models of a bundle must compute logits, or features of one width")
        if bool(self.labels) != (answers.pop()[0] == "logits"):
            raise ValueError(
                "models that compute logits need labels; models that compute features have none"
            )
        for tier in self.tiers:
            model = self.models.get(tier.model)
            if model is None:
                raise ValueError(
                    f"tier {tier.name!r} refers to model {tier.model!r}, which does not exist"
                )
            falling = (model.patches, *tier.token_counts)
            if len(tier.token_counts) != len(model.reduction_points) or any(
                b > a or b < 1 for a, b in pairwise(falling)
            ):
                raise ValueError(
                    f"tier {tier.name!r}: token counts {tier.token_counts} do not decrease from"
                    f" {model.patches} over {len(model.reduction_points)} stages"
                )
            for file in (tier.elastic_graph, WEIGHTS, "preprocessor_config.json"):
                if f"models/{tier.model}/{file}" not in self.files:
                    raise ValueError(f"models/{tier.model}/{file} is not listed in files")
        for path in self.files:
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts or "\\" in path:
                raise ValueError(f"{path!r} is outside the bundle")
        return self
