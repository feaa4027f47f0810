"""The bundle: the one contract between export and server, read, checked and never written here.

    bundle.json            the manifest below, and the sha256 of every other file
    README.md              model card
    models/<id>/           config.json, preprocessor_config.json, model.safetensors, *.onnx

It knows files and their meaning, nothing of engines or of this machine.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity
from pcae_serve.bundle.tokens import Rule
from pcae_serve.errors import BundleError, InvalidParameter, shown
from pcae_serve.frozen_model import FrozenModel

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
ELASTIC_GRAPH = "elastic.onnx"
INT8_GRAPH = "elastic.int8.onnx"

NAME = r"^[a-z0-9][a-z0-9_-]{0,39}$"
Name = Annotated[str, Field(pattern=NAME)]
#: Names that no tier may have, and why.
RESERVED = {
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
        for name in RESERVED.keys() & set(names):
            raise ValueError(f"no tier may be named {name!r}: {RESERVED[name]}")
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


@dataclass(frozen=True)
class Bundle:
    """A bundle whose schema and hashes have been checked."""

    root: Path
    manifest: Manifest
    digest: str  # sha256 of bundle.json, and so of everything in it

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """By MACs, the cheapest first."""
        return self.manifest.tiers

    def allowed(self, tier: str = "auto", min_tier: str | None = None) -> tuple[int, ...]:
        """Tiers that may answer, cheapest first. Raises InvalidParameter for an unknown name."""
        names = [t.name for t in self.tiers]
        known = {"tier": (*names, "auto"), "min_tier": (*names, None)}
        for parameter, name in (("tier", tier), ("min_tier", min_tier)):
            if name not in known[parameter]:
                choice = ", ".join(filter(None, known[parameter]))
                raise InvalidParameter(
                    f"{parameter} {shown(name)} is unknown: choose one of {choice}"
                )
        lowest = 0 if min_tier is None else names.index(min_tier)
        if tier != "auto":
            pinned = names.index(tier)
            if pinned < lowest:
                raise InvalidParameter(f"tier {tier!r} is below min_tier {min_tier!r}")
            return (pinned,)
        tiers = range(lowest, len(names))
        return tuple(i for i in tiers if i == lowest or not self.tiers[i].dominated)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.manifest.labels

    @property
    def image_size(self) -> int:
        return next(iter(self.manifest.models.values())).image_size

    @property
    def answers(self) -> Literal["logits", "features"]:
        """What its models say of an image."""
        return next(iter(self.manifest.models.values())).answers

    @property
    def width(self) -> int:
        """Numbers in an answer: one a label, or the features'."""
        return len(self.labels) or next(iter(self.manifest.models.values())).width

    def file(self, model: str, name: str) -> Path:
        """Path of one of a model's files."""
        return self.root / "models" / model / name

    @cached_property
    def preprocess(self) -> Preprocess:
        """How image bytes become pixels; one for all models, whose graphs normalise by themselves.

        Raises BundleError where they want other pixels.
        """
        found = {model: self._preprocess(model) for model in self.manifest.models}
        first = found[self.tiers[0].model]
        for model, preprocess in found.items():
            if not preprocess.same_pixels(first):
                raise BundleError(
                    f"{self.root}: model {model!r} resizes images in another way than"
                    f" {self.tiers[0].model!r}, but one decoding serves both"
                )
        return first

    def _preprocess(self, model: str) -> Preprocess:
        path = self.file(model, "preprocessor_config.json")
        try:
            return Preprocess.from_config(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path} is no preprocessor config: {error}") from None


def load(root: Path) -> Bundle:
    """Read and check a bundle. Raises BundleError with one line that says what is wrong."""
    path = root / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"no bundle at {root}: {MANIFEST} cannot be read ({error.strerror});"
            " make one with 'pcae-export bundle'"
        ) from None
    try:
        document = json.loads(raw)
        version = document.get("schema_version") if isinstance(document, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}, but this server reads {SCHEMA_VERSION}:"
                " update pcae-serve or export again"
            )
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        message = first["msg"].removeprefix("Value error, ")
        raise BundleError(f"{path} is no valid manifest: {where}: {message}") from None
    except ValueError as error:
        raise BundleError(f"{path} is no valid JSON: {error}") from None
    for name, expected in manifest.files.items():
        _check(root, name, expected)
    bundle = Bundle(root, manifest, hashlib.sha256(raw).hexdigest())
    if bundle.preprocess.image_size != bundle.image_size:
        raise BundleError(f"{root}: the preprocessor crops to another size than the model takes")
    return bundle


def sha256(file: Path) -> str:
    """Hex digest of a file, as the manifest lists it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def demo() -> Path:
    """Where the demo bundle lies inside the installed package."""
    return Path(str(files("pcae_serve"))) / "demo"


def _check(root: Path, name: str, expected: str) -> None:
    path = root / name
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise BundleError(f"{path} leads out of the bundle: it must be a file inside it")
        found = sha256(path)
    except OSError as error:
        raise BundleError(f"the bundle lacks {path}: {error.strerror}; export it again") from None
    if found != expected:
        raise BundleError(
            f"{path} is not the file that was sealed (its sha256 differs): copy or export the"
            " bundle again"
        )
