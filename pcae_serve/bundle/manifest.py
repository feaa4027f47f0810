"""bundle.json as pydantic models: what a bundle contains, and what its tiers cost and achieve.

bundle.json            the manifest, with the SHA-256 of every other file
README.md              model card
models/<id>/           config.json, preprocessor_config.json, model.safetensors, *.onnx
"""

from datetime import datetime
from itertools import pairwise
from math import isqrt
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pcae_serve.bundle.calibration import Calibration
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity, wilson_interval
from pcae_serve.bundle.tokens import Pooling, Rule
from pcae_serve.frozen_model import FrozenModel

#: Version 3 says whether graphs return patch grids (`patch_width`) and has `calibration`; version 2
#: says what outputs mean (`answers`); version 1 had logits of classes, or features.
SCHEMA_VERSION = 3
MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
ELASTIC_GRAPH = "elastic.onnx"
INT8_GRAPH = "elastic.int8.onnx"
#: The last output of dense graphs: the state of every patch, float32 [N, H, W, patch_width].
PATCHES = "patches"

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,39}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
#: A text for people, and the path of a file.
Text = Annotated[str, Field(max_length=1000)]
#: Sizes of a model and numbers of its parts. The bounds are far above any ViT, and low enough that
#: no size makes the server allocate memory or loop before the weights have been read.
Side = Annotated[int, Field(ge=1, le=8192)]
Count = Annotated[int, Field(ge=1, le=100_000)]
#: Multiply-adds, parameters.
Amount = Annotated[int, Field(ge=1, le=10**18)]
#: Patches kept after each reduction point, and the points themselves.
Stages = Annotated[tuple[Annotated[int, Field(ge=0, le=100_000_000)], ...], Field(max_length=1000)]
#: Names that a tier must not have, and why.
RESERVED_NAMES = {
    "auto": "a request uses it to leave the choice to the server",
    "elastic": "it names the graph that serves all tiers",
}


#: What a model's outputs mean: classes by softmax, independent labels by sigmoid, or features.
Answers = Literal["classes", "labels", "features"]


class HalfRange(FrozenModel):
    """The largest value that a model computes where its graphs for GPUs are in half precision."""

    largest: Annotated[float, Field(ge=0)]
    tensor: str  # the module that computes it
    images: Annotated[int, Field(ge=1)]  # that it was measured on


class Model(FrozenModel):
    """The properties of one network that the server needs."""

    image_size: Side
    patches: Annotated[int, Field(ge=1, le=100_000_000)]
    patch_size: Side
    width: Count
    depth: Count
    parameters: Amount
    reduction_points: Stages
    reduction: Rule = "ptr"
    pooling: Pooling
    answers: Answers = "classes"
    patch_width: Count | None = None  # of the patch grid that its graphs return; None: without
    half: Literal["float16", "bfloat16"] | None = None  # of its graphs for GPUs; None: no graphs
    half_range: HalfRange | None = None  # None if it was not measured

    @property
    def output(self) -> Literal["logits", "features"]:
        """Return the name of the graphs' first output: logits or features, [N, width]."""
        return "features" if self.answers == "features" else "logits"


class Tier(FrozenModel):
    """A model at one keep ratio: a point of the trade-off between speed and accuracy."""

    name: Name
    model: Name
    keep_ratio: Annotated[float, Field(gt=0, le=1)]
    token_counts: Stages  # patches kept after each reduction point
    macs: Amount  # multiply-adds per image
    precision: Literal["float32", "int8"] = "float32"  # of products with weights, on a CPU
    accuracy: Accuracy | None = None
    agreement: Agreement | None = None
    fidelity: Fidelity | None = None
    dominated: bool = False  # a cheaper tier is better, by the interval of their difference

    @property
    def quality(self) -> float | None:
        """Return the measure that tiers are compared by: top-1 or its substitute, or None."""
        if self.accuracy is not None:
            return self.accuracy.top1
        if self.agreement is not None:
            return self.agreement.share
        return None if self.fidelity is None else self.fidelity.cosine

    @property
    def quality_images(self) -> int | None:
        """Return the number of images behind `quality`, or None if it has no interval."""
        share = self.accuracy or self.agreement
        return None if share is None else share.n

    @property
    def quality_interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of `quality`, or None if it has none."""
        if self.accuracy is not None:
            return self.accuracy.interval
        if self.agreement is not None:
            return wilson_interval(self.agreement.share, self.agreement.n)
        return None

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

    schema_version: Literal[1, 2, 3] = 3
    name: Text
    created: datetime
    producer: Annotated[dict[Text, Text], Field(max_length=100)]  # versions of what wrote it
    labels: Annotated[tuple[Text, ...], Field(max_length=100_000)]  # empty for features
    models: Annotated[dict[Name, Model], Field(min_length=1, max_length=100)]
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1, max_length=100)]  # by MACs, ascending
    calibration: Calibration | None = None  # None: temperatures are 1, and no image runs twice
    # path in the bundle -> SHA-256, for every other file
    files: Annotated[dict[Text, Text], Field(max_length=10_000)]

    @model_validator(mode="before")
    @classmethod
    def _read_version_1(cls, document: Any) -> Any:
        if not isinstance(document, dict) or document.get("schema_version") != 1:
            return document
        models = document.get("models")
        if not isinstance(models, dict):
            return document
        words = {"logits": "classes", "features": "features"}

        def read(model: Any) -> Any:
            word = model.get("answers", "logits") if isinstance(model, dict) else None
            return model | {"answers": words.get(word)} if isinstance(word, str) else model

        return document | {"models": {name: read(model) for name, model in models.items()}}

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
            raise ValueError(
                "all models of a bundle must give classes, labels, or features of one width"
            )
        if len({(m.patch_width, m.patches) for m in self.models.values() if m.patch_width}) > 1 or (
            len({m.patch_width is None for m in self.models.values()}) > 1
        ):
            raise ValueError("all models of a bundle must give patch grids of one shape, or none")
        for name, m in self.models.items():
            if m.patch_width and isqrt(m.patches) ** 2 != m.patches:
                raise ValueError(f"model {name!r} has {m.patches} patches, not a square grid")
        if bool(self.labels) != (answers.pop()[0] != "features"):
            raise ValueError(
                "models that give classes or labels need names for them; models that compute"
                " features have none"
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
        if self.calibration is not None:
            if set(self.calibration.tiers) != set(names):
                raise ValueError("calibration must have every tier, and no other")
            place = {name: i for i, name in enumerate(names)}
            for look in self.calibration.second_looks:
                if place[look.second] <= place[look.first]:
                    raise ValueError(
                        f"calibration: {look.second!r} must cost more than {look.first!r}"
                    )
        for path in self.files:
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts or "\\" in path:
                raise ValueError(f"{path!r} is outside the bundle")
        return self
