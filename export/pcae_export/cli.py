"""pcae-export: the command line of export. It only reads flags, fetches data and prints results."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, CliSubCommand, NoDecode

from pcae_export import card, measure, pack, source, verify
from pcae_export.choice import DEFAULT_REDUCTION, choose_reduction
from pcae_export.images import decode, generate
from pcae_export.pack import Half, Part, TierSpec
from pcae_export.profiling import Profile
from pcae_export.source import Source, SourceOverrides
from pcae_export.tensorrt_plans import TensorRt
from pcae_serve.bundle.manifest import NAME_PATTERN, RESERVED_NAMES
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.bundle.tokens import Rule, parse_keep_ratio
from pcae_serve.command import config, run
from pcae_serve.engines.base import Pixels
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages, load

IMAGES_HELP = "class folders, plain images, parquet or a hub name"


class Write(BaseModel):
    """Export checkpoints to a bundle: proven against torch, measured as served, sealed."""

    paths: CliPositionalArg[list[Path]] = Field(
        min_length=1,
        max_length=2,
        description="SOURCE, a checkpoint (of pcae-train; timm, MAE, DeiT, DINO or DINOv2 state"
        " dict; Hugging Face folder), and OUT, the bundle to write; OUT alone where every --tier"
        " names its checkpoint",
    )
    tier: list[str] = Field(
        [f"{name}={ratio}" for name, ratio in pack.DEFAULT_TIERS.items()],
        description="NAME=RATIO, NAME=CHECKPOINT@RATIO, either with :int8 after it; repeated",
    )
    reduction: Literal[Rule, "auto"] | None = Field(
        None,
        description="what becomes of redundant patches; auto: the best on --eval-data, the default"
        " for weights that were not trained with one",
    )
    reduction_points: Annotated[tuple[int, ...] | None, NoDecode] = Field(
        None, description="after which blocks, such as 0,7,10 (the default where there are 12)"
    )
    eval_data: str | None = Field(
        None, description=f"images that prove and measure: {IMAGES_HELP}; without: made-up ones"
    )
    eval_split: str = Field("test", description="split of --eval-data")
    agreement: bool = Field(
        False, description="do not read labels: measure how well tiers agree with k = 1"
    )
    limit: int | None = Field(
        None, ge=1, description="measure quality on so many images, drawn by seed 0"
    )
    parity_images: int = Field(
        64, ge=verify.MIN_IMAGES, description="images that parity is proven on"
    )
    choice_images: int = Field(32, ge=2, description="images that --reduction auto tries on")
    half: Literal[Half, "none"] = Field(
        "float16", description="type of the graphs for GPUs; none: write no such graphs"
    )
    labels: Path | None = Field(None, description="class names, one a line, where SOURCE has none")
    heads: int | None = Field(None, ge=1, description="attention heads, where a state dict")
    image_size: int | None = Field(None, ge=1, description="pixels; positions are interpolated")
    resize: int | None = Field(None, ge=1, description="shorter side before the centre is cropped")
    normalise: Literal["imagenet", "half"] | None = Field(
        None, description="mean and std that SOURCE was trained with, where it does not say"
    )
    features: bool = Field(False, description="leave the head out: the bundle answers /embed")
    name: str | None = Field(None, min_length=1, description="of the bundle; default: OUT's name")
    model_id: str = Field("vit", pattern=NAME_PATTERN, description="folder of SOURCE's model")
    card_note: str = Field("", description="a paragraph more for the card, such as licences")
    force: bool = Field(False, description="replace a bundle that stands at OUT")

    @field_validator("tier")
    @classmethod
    def _tiers(cls, given: list[str]) -> list[str]:
        parse_tiers(given)
        return given

    @field_validator("reduction_points", mode="before")
    @classmethod
    def _points(cls, given: object) -> object:
        return tuple(part for part in given.split(",") if part) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _sources(self) -> Self:
        tiers = parse_tiers(self.tier)
        if self.source is None and not all(tier.path for tier in tiers.values()):
            missing = next(name for name, tier in tiers.items() if not tier.path)
            raise ValueError(f"tier {missing!r} has no checkpoint: give SOURCE before OUT")
        if self.reduction == "auto" and self.eval_data is None:
            raise ValueError("--reduction auto needs images to try on: give --eval-data")
        return self

    @property
    def source(self) -> Path | None:
        return self.paths[0] if len(self.paths) == 2 else None

    @property
    def out(self) -> Path:
        return self.paths[-1]

    def cli_cmd(self) -> None:
        pack.check_output(self.out, self.force)  # before the slow part
        parts: dict[str, Part] = {}
        notes: list[str] = []
        unsettled: set[str] = set()  # models of which nobody says how to reduce them
        for model_id, (path, tiers) in self._models().items():
            read = source.read_source(path, self._told())
            notes += read.notes
            unsettled |= set() if read.reduced else {model_id}
            parts[model_id] = self._reduced(read, Part(read.checkpoint, tiers))
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        pack.plan_tiers(parts)
        first = next(iter(parts.values())).checkpoint
        images = self._images(first)
        order = shuffled(len(images)) if images else []
        chosen = self._choose(parts, unsettled, images, order)

        def judge(draft: Bundle, stored: Mapping[str, Checkpoint]) -> pack.Evidence:
            size = first.preprocess.image_size
            count = self.parity_images
            pixels = decode(images, order[:count]) if images else generate(count, size)
            parity = {m: verify.verify_model(draft, c, pixels, m) for m, c in stored.items()}
            if images is None:
                return pack.Evidence(parity=parity)
            engine = OnnxRuntimeEngine(draft)
            rows = order[: self.limit]
            found = measure.measure_quality(draft, engine, images, rows, bool(images.classes))
            return pack.Evidence(found, parity)

        bundle = pack.write_bundle(
            parts,
            self.out,
            name=self.name,
            half=None if self.half == "none" else self.half,
            judge=judge,
            note="\n\n".join(filter(None, [self.card_note, *chosen])),
            force=self.force,
        )
        print(f"wrote {self.out} ({_megabytes(bundle.root):.1f} MB)")
        for text in chosen:
            print(text.split("\n\n")[-1])
        _print_tiers(bundle)

    def _models(self) -> dict[str, tuple[Path, dict[str, TierSpec]]]:
        """Model id to its checkpoint and its tiers."""
        models: dict[str, tuple[Path, dict[str, TierSpec]]] = {}
        ids: dict[Path, str] = {} if self.source is None else {self.source: self.model_id}
        for name, tier in parse_tiers(self.tier).items():
            path = tier.path or self.source
            assert path is not None  # `_sources` has seen to it
            if path not in ids:
                ids[path] = _model_id(path, set(ids.values()))
            models.setdefault(ids[path], (path, {}))[1][name] = tier.wanted
        return models

    def _told(self) -> SourceOverrides:
        return SourceOverrides(
            heads=self.heads,
            image_size=self.image_size,
            resize=self.resize,
            normalise=self.normalise,
            labels=self.labels,
            reduction_points=self.reduction_points,
            reduction=None if self.reduction == "auto" else self.reduction,
            features=self.features,
        )

    def _reduced(self, read: Source, part: Part) -> Part:
        """With the rule for weights that nothing can be tried for."""
        if read.reduced or self.eval_data is not None:
            return part
        return _with_rule(part, DEFAULT_REDUCTION)

    def _choose(
        self,
        parts: dict[str, Part],
        unsettled: set[str],
        images: LabelledImages | None,
        order: Sequence[int],
    ) -> list[str]:
        """Settle which reduction each model takes, where that is open; the tables, for the card."""
        tables = []
        for model_id, part in parts.items():
            if images is None or not (model_id in unsettled or self.reduction == "auto"):
                continue
            if not any(parse_keep_ratio(wanted.keep_ratio) < 1 for wanted in part.tiers.values()):
                continue
            ratios = list(dict.fromkeys(wanted.keep_ratio for wanted in part.tiers.values()))
            pixels = decode(images, order[: self.choice_images])
            found = choose_reduction(part.checkpoint, pixels, ratios)
            parts[model_id] = _with_rule(part, found.rule)
            title = f"Reductions tried on these weights ({model_id}):"
            tables.append("\n\n".join([title, "\n".join(found.lines())]))
        return tables

    def _images(self, checkpoint: Checkpoint) -> LabelledImages | None:
        """The images of --eval-data, checked to carry the checkpoint's labels if they are read."""
        if self.eval_data is None:
            return None
        labelled = bool(checkpoint.labels) and not self.agreement
        images = load(self.eval_data, self.eval_split, checkpoint.preprocess, labelled=labelled)
        if labelled and images.classes != checkpoint.labels:
            raise PcaeError(
                f"{images.name} has {len(images.classes)} labels ({_first(images.classes)}), but"
                f" the checkpoint {len(checkpoint.labels)} ({_first(checkpoint.labels)}): give data"
                " with the labels it was trained on, or measure without labels by --agreement"
            )
        if len(images) < self.parity_images:
            raise PcaeError(
                f"{images.name} has {len(images)} images, but parity is proven on"
                f" {self.parity_images}: give more, or a smaller --parity-images"
            )
        return images


class Verify(BaseModel):
    """Prove again, from a bundle's own files, that its graphs answer as torch does."""

    bundle: CliPositionalArg[Path] = Field(description="bundle folder")
    data: str | None = Field(
        None, description=f"images to prove on: {IMAGES_HELP}; without: made-up ones"
    )
    split: str = Field("test", description="split of --data")
    images: int = Field(64, ge=verify.MIN_IMAGES, description="how many of them")

    def cli_cmd(self) -> None:
        bundle = load_bundle(self.bundle)
        for model in bundle.manifest.models:
            stored = checkpoints.load(bundle.root / "models" / model)
            parity = verify.verify_model(bundle, stored, self._pixels(stored), model)
            print(f"{self.bundle}, model {model}: parity holds: {parity}\n")
            print(*parity.format_table(), sep="\n")

    def _pixels(self, stored: Checkpoint) -> Pixels:
        if self.data is None:
            return generate(self.images, stored.preprocess.image_size)
        found = load(self.data, self.split, stored.preprocess, labelled=False)
        return decode(found, shuffled(len(found))[: self.images])


class Export(BaseSettings):
    """Turn checkpoints into bundles that pcae-serve serves."""

    model_config = config("pcae-export")

    bundle: CliSubCommand[Write]
    verify: CliSubCommand[Verify]
    profile: CliSubCommand[Profile]
    tensorrt: CliSubCommand[TensorRt]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


@dataclass(frozen=True)
class TierFlag:
    """What one --tier says."""

    wanted: TierSpec
    path: Path | None = None


def parse_tiers(given: list[str]) -> dict[str, TierFlag]:
    """["fast=0.6", "small=vit-s.pth@0.8:int8", …] by name. Raises ValueError naming the fault."""
    tiers: dict[str, TierFlag] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        if not equals or not re.match(NAME_PATTERN, name):
            raise ValueError(
                f"{text!r} is no NAME=RATIO, such as fast=0.6 (names: a-z, 0-9, '-' and '_')"
            )
        if name in RESERVED_NAMES:
            raise ValueError(f"no tier may be named {name!r}: {RESERVED_NAMES[name]}")
        if name in tiers:
            raise ValueError(f"tier {name!r} is given twice")
        path, at, ratio = rest.rpartition("@")
        ratio, _, precision = ratio.partition(":")
        if precision not in ("", "int8", "float32"):
            raise ValueError(f"{text!r}: precision {precision!r} is neither int8 nor float32")
        if at and not path:
            raise ValueError(f"{text!r} names no checkpoint before '@'")
        parse_keep_ratio(ratio)
        wanted = TierSpec(ratio, "int8" if precision == "int8" else "float32")
        tiers[name] = TierFlag(wanted, Path(path) if at else None)
    if not tiers:
        raise ValueError("at least one tier is needed")
    return tiers


def shuffled(count: int) -> list[int]:
    """Row numbers in an order that is always the same: class folders come class by class."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order


def _with_rule(part: Part, rule: Rule) -> Part:
    """The same weights under another reduction."""
    model = part.checkpoint.model
    model.config = replace(model.config, reduction=rule)
    return part


def _model_id(path: Path, taken: set[str]) -> str:
    """A folder name for a checkpoint's model, after its file, free among those taken."""
    stem = path.stem if path.suffix in (".pth", ".pt", ".bin", ".safetensors") else path.name
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:32] or "vit"
    number = next(
        n for n in range(1, len(taken) + 2) if (f"{name}-{n}" if n > 1 else name) not in taken
    )
    return f"{name}-{number}" if number > 1 else name


def _print_tiers(bundle: Bundle) -> None:
    several = len(bundle.manifest.models) > 1
    print(f"{'tier':<12} {'keep':<5} {'patches kept':<16} {'GMACs':>7}  quality")
    for tier in bundle.tiers:
        counts = ", ".join(map(str, tier.token_counts))
        print(
            f"{tier.name:<12} {tier.keep_ratio:<5g} {counts:<16} {tier.macs / 1e9:>7.3f}"
            f"  {card.format_quality(tier)}"
            + (f"  {tier.precision}" if tier.precision != "float32" else "")
            + (f"  model {tier.model}" if several else "")
            + ("  dominated" if tier.dominated else "")
        )


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _first(labels: list[str]) -> str:
    return ", ".join(labels[:3]) + (", …" if len(labels) > 3 else "")


def main() -> None:
    sys.exit(run(Export))


if __name__ == "__main__":
    main()
