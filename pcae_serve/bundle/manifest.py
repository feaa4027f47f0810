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
#: Names that no tier may have, and why.
RESERVED_NAMES = {
    "auto": "requests say that to leave the choice",
    "elastic": "that is the graph that serves all of them",
}


class Model(FrozenModel):
    """What the server needs to know of one network, and the exporter took from it."""

    image_size: Annotated[int, Field(ge=1)]
    patches: Annotated[int, Field(ge=1)]
    patch_size: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    depth: Annotated[int, Field(ge=1)]
    parameters: Annotated[int, Field(ge=1)]
    reduction_points: tuple[int, ...]
    reduction: Rule = "ptr"  # DESIGN section 2
    pooling: Literal["mean", "cls"]
    answers: Literal["logits", "features"] = "logits"  # features [N, width] where it has no head
    half: Literal["float16", "bfloat16"] | None = None  # of the graphs for GPUs; None: it has none


class Tier(FrozenModel):
    """One point of the speed/accuracy front: a model at a token budget."""

    name: Name
    model: Name
    keep_ratio: Annotated[float, Field(gt=0, le=1)]
    token_counts: tuple[int, ...]  # patches left after each reduction point
    macs: Annotated[int, Field(ge=1)]  # multiply-adds for one image
    precision: Literal["float32", "int8"] = "float32"  # of the weights' products on a CPU
    accuracy: Accuracy | None = None
    agreement: Agreement | None = None
    fidelity: Fidelity | None = None
    dominated: bool = False  # a cheaper tier is at least as good

    @property
    def quality(self) -> float | None:
        """What tiers are compared by: top-1, or what stands in for it; None: not measured."""
        if self.accuracy is not None:
            return self.accuracy.top1
        if self.agreement is not None:
            return self.agreement.share
        return None if self.fidelity is None else self.fidelity.cosine

    @property
    def elastic_graph(self) -> str:
        """File name of the graph that serves it on a CPU, its counts an input."""
        return INT8_GRAPH if self.precision == "int8" else ELASTIC_GRAPH

    @property
    def graph(self) -> str:
        """File name of the static float32 graph, its counts constant."""
        return f"{self.name}.onnx"

    @property
    def cuda_graph(self) -> str:
        """File name of the static half-precision graph with fused attention, for ONNX Runtime."""
        return f"{self.name}.cuda.onnx"

    @property
    def tensorrt_graph(self) -> str:
        """File name of the static half-precision graph in plain operators, for TensorRT."""
        return f"{self.name}.tensorrt.onnx"


class Manifest(FrozenModel):
    """bundle.json."""

    schema_version: Literal[1] = 1
    name: str
    created: datetime
    producer: dict[str, str]  # versions of what made it
    labels: tuple[str, ...]  # none where the models answer with features
    models: Annotated[dict[Name, Model], Field(min_length=1)]
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1)]  # by MACs, the cheapest first
    files: dict[str, str]  # path inside the bundle -> sha256, of every file but this one

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names):
            raise ValueError(f"tier names must differ, not {names}")
        for name in RESERVED_NAMES.keys() & set(names):
            raise ValueError(f"no tier may be named {name!r}: {RESERVED_NAMES[name]}")
        costs = [tier.macs for tier in self.tiers]
        if costs != sorted(costs):
            raise ValueError("tiers must be ordered by MACs, the cheapest first")
        if len({model.image_size for model in self.models.values()}) > 1:
            raise ValueError("all models of a bundle must take one image size")
        answers = {(m.answers, m.answers == "features" and m.width) for m in self.models.values()}
        if len(answers) > 1:
            raise ValueError("all models of a bundle must answer alike: logits, or features")
        if bool(self.labels) != (answers.pop()[0] == "logits"):
            raise ValueError("there must be labels where the models answer with logits, else none")
        for tier in self.tiers:
            model = self.models.get(tier.model)
            if model is None:
                raise ValueError(
                    f"tier {tier.name!r} names model {tier.model!r}, which is not there"
                )
            falling = (model.patches, *tier.token_counts)
            if len(tier.token_counts) != len(model.reduction_points) or any(
                b > a or b < 1 for a, b in pairwise(falling)
            ):
                raise ValueError(
                    f"tier {tier.name!r}: token counts {tier.token_counts} do not fall from"
                    f" {model.patches} over {len(model.reduction_points)} stages"
                )
            for file in (tier.elastic_graph, WEIGHTS, "preprocessor_config.json"):
                if f"models/{tier.model}/{file}" not in self.files:
                    raise ValueError(f"models/{tier.model}/{file} is not among the files")
        for path in self.files:
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts or "\\" in path:
                raise ValueError(f"{path!r} leaves the bundle")
        return self
