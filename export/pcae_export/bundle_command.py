"""`pcae-export bundle`: checkpoints to a verified, measured bundle."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliPositionalArg, NoDecode

from pcae_export import card, feature_fidelity, pack
from pcae_export.calibrate import calibrate, collect_answers
from pcae_export.calibration_flags import CalibrationFlags
from pcae_export.choice import DEFAULT_REDUCTION, choose_reduction
from pcae_export.feature_fidelity import FeatureFidelity
from pcae_export.front_report import FRONT_IMAGE, draw_front, format_front
from pcae_export.half_precision import Half, choose_half
from pcae_export.images import IMAGES_HELP, decode, parity_pixels, shuffle_rows
from pcae_export.measure import measure_quality
from pcae_export.pack import Evaluation, Part, TierSpec
from pcae_export.photo_classes import fit_classes
from pcae_export.photo_copies import drop_copies
from pcae_export.ranking import warn_of_few_images
from pcae_export.source import Source, SourceOverrides, locate_source, read_source
from pcae_export.text_classes import TEMPLATES, embed_prompts, read_prompts, text_model_type
from pcae_export.tier_flags import TierFlag, parse_tiers
from pcae_export.tier_search import TierSearch, assign_tiers
from pcae_export.verify import MIN_IMAGES, verify_model
from pcae_serve.bundle.manifest import NAME_PATTERN
from pcae_serve.bundle.reader import Bundle
from pcae_serve.bundle.tokens import Rule, parse_keep_ratio
from pcae_serve.engines.base import Pixels
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_serve.errors import PcaeError
from pcae_serve.flags import Metavar
from pcae_serve.loadtest import plot_style
from pcae_serve.sources.names import ModelName, is_remote, local_name
from pcae_training import heldout_record
from pcae_training.checkpoint import Checkpoint
from pcae_training.class_folders import Layout
from pcae_training.data import DataError, LabelledImages, load
from pcae_training.data_settings import (
    CLASSES_HELP,
    IMAGE_COLUMN_HELP,
    LABEL_COLUMN_HELP,
    LAYOUT_HELP,
    MAX_UNREADABLE_HELP,
    ClassNames,
)
from pcae_training.heldout_record import HeldOut
from pcae_training.inventory import print_inventory
from pcae_training.skipped import MAX_UNREADABLE

#: Images that --tiers auto compares tiers on, unless half of them are fewer.
TIER_IMAGES = 500


class WriteBundle(CalibrationFlags):
    """Export checkpoints to a bundle that pcae-serve serves.

    SOURCE is a checkpoint of pcae-train, a state dict of timm, MAE, DeiT, DINO or DINOv2, a Hugging
    Face folder, or a name on the hub such as facebook/dinov2-small; OUT is the bundle to write.
    Give OUT alone if every --tier names its checkpoint; --tiers auto takes several SOURCEs. Every
    graph is compared with torch and every tier is measured before the bundle is put in place.
    """

    flag_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "tiers": ("tier", "tiers", "int8", "max_loss", "reduction", "reduction_points", "half"),
        "images to verify and measure on": (
            "eval_data", "eval_split", "eval_layout", "eval_image_column", "eval_label_column",
            "eval_classes", "max_unreadable", "agreement", "limit", "parity_images",
            "choice_images", "tier_images",
        ),
        "images to calibrate second looks on": (
            "calibration_data", "calibration_split", "calibration_images",
        ),
        "a classifier from photographs or words": (
            "classes_from", "classes_split", "classes", "template",
        ),
        "overrides of SOURCE": (
            "weights", "answers", "labels", "heads", "image_size", "resize", "normalise",
            "features", "pooling",
        ),
        "bundle": ("dense", "name", "model_id", "card_note", "force"),
    }  # fmt: skip

    paths: CliPositionalArg[Annotated[list[ModelName], Metavar("[SOURCE] OUT")]] = Field(
        min_length=1, description="SOURCE (a checkpoint) and OUT (the new bundle)"
    )
    tier: list[str] = Field(
        [f"{name}={ratio}" for name, ratio in pack.DEFAULT_TIERS.items()],
        description="NAME=RATIO or NAME=CHECKPOINT@RATIO, either with :int8 appended; repeatable",
    )
    tiers: Literal["auto"] | None = Field(
        None,
        description="auto: measure keep ratios, precisions and SOURCEs on --eval-data and this"
        " machine's CPU, and take the few tiers that are worth serving, instead of --tier",
    )
    int8: bool = Field(
        True, description="let --tiers auto choose tiers with int8 products, which run on CPUs only"
    )
    max_loss: float = Field(
        0.1,
        gt=0,
        le=1,
        description="--tiers auto leaves out tiers whose quality is more than this below the best"
        " one's (a share of images, or a cosine)",
    )
    reduction: Literal[Rule, "auto"] | None = Field(
        None,
        description="how redundant patches are reduced; auto: the best rule on --eval-data"
        " (default: the rule that SOURCE was trained with, else auto, else merged)",
    )
    reduction_points: Annotated[tuple[int, ...] | None, NoDecode] = Field(
        None,
        description="blocks after which patches are reduced, such as 0,7,10 (default: SOURCE's,"
        " else 0,7,10 of 12 blocks, at the same relative depths of others)",
    )
    eval_data: str | None = Field(
        None, description=f"images: {IMAGES_HELP} (default: generated images)"
    )
    eval_split: str = Field("test", description="split of --eval-data")
    eval_layout: Layout = Field("auto", description=LAYOUT_HELP)
    eval_image_column: str | None = Field(None, description=IMAGE_COLUMN_HELP)
    eval_label_column: str | None = Field(None, description=LABEL_COLUMN_HELP)
    eval_classes: ClassNames = Field(None, description=CLASSES_HELP)
    max_unreadable: float = Field(MAX_UNREADABLE, ge=0, le=1, description=MAX_UNREADABLE_HELP)
    agreement: bool = Field(
        False, description="ignore labels: measure each tier's agreement with keep ratio 1"
    )
    limit: int | None = Field(
        None, ge=1, description="number of images to measure quality on (default: all)"
    )
    parity_images: int = Field(
        64,
        ge=MIN_IMAGES,
        description="number of images to compare graphs with torch on; by default, at most as many"
        " as there are",
    )
    choice_images: int = Field(
        32, ge=2, description="number of images that --reduction auto compares rules on"
    )
    tier_images: int | None = Field(
        None,
        ge=2,
        description="number of images that --tiers auto compares tiers on; quality is then measured"
        f" on the others (default: half of them, at most {TIER_IMAGES})",
    )
    classes_from: str | None = Field(
        None,
        description="photographs in class folders (or parquet files, a hub name): SOURCE becomes"
        " their classifier, by a linear head on its features; no network is trained",
    )
    classes: Path | None = Field(
        None,
        description="text file of class names, one per line, or NAME, a tab and a prompt: SOURCE (a"
        " CLIP or SigLIP model with its text tower) becomes their classifier",
    )
    template: str | None = Field(
        None,
        description="prompt for --classes with {} in place of the name (default: 'a photo of a {}.'"
        " for CLIP, 'This is a photo of {}.' for SigLIP)",
    )
    classes_split: str = Field("train", description="split of --classes-from")
    half: Literal["auto", Half, "none"] = Field(
        "auto",
        description="precision of the graphs for GPUs; auto: float16, or bfloat16 if the model"
        " overflows float16; none: write no such graphs",
    )
    weights: Literal["raw", "ema"] | None = Field(
        None,
        description="which weights to take from a file that has raw and averaged ones (default:"
        " the averaged ones, ema)",
    )
    answers: Literal["classes", "labels"] | None = Field(
        None,
        description="what the head gives: one of several classes (softmax), or independent labels"
        " (a sigmoid each) (default: as SOURCE states, else classes)",
    )
    labels: Path | None = Field(
        None, description="text file of class names, one per line, or JSON list"
    )
    heads: int | None = Field(None, ge=1, description="attention heads, for a state dict")
    image_size: int | None = Field(
        None, ge=1, description="image size in pixels; positions are interpolated"
    )
    resize: int | None = Field(
        None, ge=1, description="length of the shorter side before the centre crop, in pixels"
    )
    normalise: Literal["imagenet", "half"] | None = Field(
        None, description="mean and std of the pixels that SOURCE was trained on"
    )
    features: bool = Field(False, description="drop the head, so that the bundle serves /embed")
    pooling: Literal["cls", "mean", "model"] = Field(
        "model",
        description="features of a model without a head: its CLS token, the mean over its patches,"
        " or as the model itself pools",
    )
    dense: bool = Field(
        False, description="let graphs for CPUs also return the state of every patch (for /embed)"
    )
    name: str | None = Field(
        None, min_length=1, description="the bundle's name (default: OUT's file name)"
    )
    model_id: str = Field("vit", pattern=NAME_PATTERN, description="id of SOURCE's model")
    card_note: str = Field("", description="paragraph to add to the model card, such as licences")
    force: bool = Field(False, description="replace an existing bundle at OUT")

    @field_validator("tier")
    @classmethod
    def _check_tiers(cls, given: list[str]) -> list[str]:
        parse_tiers(given)
        return given

    @field_validator("reduction_points", mode="before")
    @classmethod
    def _split_points(cls, given: object) -> object:
        return tuple(part for part in given.split(",") if part) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        tiers = parse_tiers(self.tier)
        if self.tiers == "auto":
            if "tier" in self.model_fields_set:
                raise ValueError("--tiers auto chooses all tiers; give either it or --tier")
            if self.eval_data is None:
                raise ValueError("--tiers auto needs images to compare tiers on; give --eval-data")
            if self.source is None:
                raise ValueError("--tiers auto needs a model; give SOURCE before OUT")
            if self.agreement and len(self.sources) > 1:
                raise ValueError(
                    "--tiers auto compares several models by top-1; omit --agreement, or give one"
                    " SOURCE"
                )
        elif len(self.paths) > 2:
            raise ValueError(
                "at most SOURCE and OUT are given without a flag; several SOURCEs need --tiers auto"
            )
        if self.classes_from is not None:
            self._check_classes_from(tiers)
        if self.classes is not None:
            self._check_new_classes("--classes", tiers, ("labels", "features", "classes_from"))
        elif self.template is not None:
            raise ValueError("--template makes prompts of the names in --classes; give both")
        if self.source is None and not all(tier.checkpoint for tier in tiers.values()):
            missing = next(name for name, tier in tiers.items() if not tier.checkpoint)
            raise ValueError(f"tier {missing!r} has no checkpoint; give SOURCE before OUT")
        if self.reduction == "auto" and self.eval_data is None and self.classes_from is None:
            raise ValueError("--reduction auto needs images to compare rules on; give --eval-data")
        if is_remote(self.paths[-1]):
            raise ValueError(f"OUT is a local folder, not {self.paths[-1]}")
        return self

    def _check_classes_from(self, tiers: Mapping[str, TierFlag]) -> None:
        """Raise ValueError for flags that contradict --classes-from."""
        self._check_new_classes("--classes-from", tiers, ("labels", "features", "answers"))
        if self.agreement:
            raise ValueError("--classes-from measures top-1; omit --agreement")
        int8 = any(tier.spec.precision == "int8" for tier in tiers.values())
        if int8 and self.eval_data is None:
            raise ValueError(
                "the quality of int8 tiers is not known from --classes-from; give --eval-data"
            )

    def _check_new_classes(
        self, by: str, tiers: Mapping[str, TierFlag], others: Sequence[str]
    ) -> None:
        """Raise ValueError if there are several models, or one of the flags `others` is given."""
        if len(self.sources) != 1 or any(tier.checkpoint for tier in tiers.values()):
            raise ValueError(f"{by} makes a classifier of one model; give one SOURCE")
        if self.dense:
            raise ValueError(
                f"{by} makes a classifier, and only POST /embed returns patches; omit --dense"
            )
        for flag in others:
            if flag in self.model_fields_set:
                raise ValueError(f"{by} names the classes; omit --{flag.replace('_', '-')}")

    @property
    def source(self) -> str | None:
        return self.paths[0] if len(self.paths) > 1 else None

    @property
    def sources(self) -> list[ModelName]:
        return self.paths[:-1]

    @property
    def out(self) -> Path:
        return Path(self.paths[-1])

    def cli_cmd(self) -> None:
        pack.check_output(self.out, self.force)  # before the slow part
        parts: dict[str, Part] = {}
        notes, origins = list[str](), list[str]()
        undecided: set[str] = set()  # models whose reduction rule is not known yet
        for model_id, (source, tiers) in self._models().items():
            path, fetched = locate_source(source, text=self.classes is not None)
            origins += [f"Made from {fetched}."] if fetched else []
            read = read_source(path, self._overrides())
            notes += read.notes
            undecided |= set() if read.reduced else {model_id}
            checkpoint = self._with_words(read.checkpoint, path)
            parts[model_id] = self._with_default_rule(read, Part(checkpoint, tiers))
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        pack.plan_tiers(parts)
        if self.dense:
            pack.check_dense(parts)
        photos, copies = self._photos(next(iter(parts.values())).checkpoint)
        for note in copies:
            print(f"warning: {note}", file=sys.stderr)
        tables, fitted = list[str](), None
        if photos is not None:
            [(model_id, part)] = parts.items()
            tables += self._choose_reductions(parts, undecided, photos, range(len(photos)))
            fitted = fit_classes(part.checkpoint, list(part.tiers.values()), photos)
            parts[model_id] = replace(part, checkpoint=fitted.checkpoint)
            tables.append("\n".join([*fitted.lines(), *(f"\n{note}." for note in copies)]))
        first = next(iter(parts.values())).checkpoint
        images = self._images(first)
        order = range(len(images)) if images else range(0)
        if photos is None:  # else the head was fitted to the features of the chosen rule
            tables += self._choose_reductions(parts, undecided, images, order)

        size, count = first.preprocess.image_size, self.parity_images
        pixels = parity_pixels(photos if images is None else images, count, size, MIN_IMAGES)
        pictures: dict[str, bytes] = {}
        if self.tiers == "auto":
            assert images is not None  # ensured by `_check_sources`
            count = self._tier_images(images)
            search = TierSearch(images, order[:count], pixels, self.max_loss)
            order = order[count:]  # the chosen tiers are measured on the others
            front = search.run(parts, int8=self.int8)
            parts = assign_tiers(parts, front)
            tables.append("\n".join(format_front(front)))
            pictures[FRONT_IMAGE] = draw_front(
                front,
                plot_style.dated(
                    f"{self.name or self.out.name}: {front.machine}; n = {count:,} images"
                ),
            )
        others, rows = self._calibration(first, images, order)
        order = order[len(rows) :]
        self._choose_half(parts, pixels)

        def evaluate(draft: Bundle, stored: Mapping[str, Checkpoint]) -> Evaluation:
            parity = {m: verify_model(draft, c, pixels, m) for m, c in stored.items()}
            engine, calibration = OnnxRuntimeEngine(draft), None
            if others is not None:
                known = rows or range(len(others))
                answers = collect_answers(draft, engine, others, known, bool(others.classes))
                calibration = calibrate(answers, draft.tiers)
            if images is None:
                by_tier = {} if fitted is None else fitted.measured(parts[self.model_id].tiers)
                return Evaluation(by_tier, parity, calibration=calibration)
            used = order[: self.limit]
            temperatures = {} if calibration is None else calibration.temperatures
            measured = measure_quality(
                draft, engine, images, used, bool(images.classes), temperatures
            )
            if warning := warn_of_few_images(list(draft.tiers), measured):
                print(f"warning: {warning}", file=sys.stderr)
            features = self._features(draft, stored, images, used)
            return Evaluation(measured, parity, features, calibration)

        bundle = pack.write_bundle(
            parts,
            self.out,
            name=self.name,
            evaluate=evaluate,
            note="\n\n".join(filter(None, [*origins, self.card_note, *tables])),
            pictures=pictures,
            dense=self.dense,
            force=self.force,
        )
        print(f"wrote {self.out} ({_megabytes(bundle.root):.1f} MB)")
        for table in tables:
            print(f"\n{table}\n")
        _print_tiers(bundle)
        print(f"serve it with: pcae-serve --bundle {self.out}")

    def _features(
        self,
        draft: Bundle,
        stored: Mapping[str, Checkpoint],
        images: LabelledImages,
        rows: Sequence[int],
    ) -> dict[str, FeatureFidelity]:
        """Measure each tier's kinds of features on the first rows; {} for models with a head."""
        if draft.answers != "features":
            return {}
        pixels = decode(images, rows[: feature_fidelity.MAX_IMAGES])
        found: dict[str, FeatureFidelity] = {}
        for model_id, checkpoint in stored.items():
            tiers = [tier for tier in draft.tiers if tier.model == model_id]
            found |= feature_fidelity.measure_tiers(checkpoint, pixels, tiers)
        return found

    def _models(self) -> dict[str, tuple[str, dict[str, TierSpec]]]:
        """Return each model's checkpoint and tiers, by model id."""
        models: dict[str, tuple[str, dict[str, TierSpec]]] = {}
        ids: dict[str, str] = {} if self.source is None else {self.source: self.model_id}
        if self.tiers == "auto":
            for path in self.sources:
                ids.setdefault(path, _model_id(Path(local_name(path)), set(ids.values())))
            return {id_: (path, dict(pack.DEFAULT)) for path, id_ in ids.items()}
        for name, tier in parse_tiers(self.tier).items():
            source = tier.checkpoint or self.source
            assert source is not None  # ensured by `_check_sources`
            if source not in ids:
                ids[source] = _model_id(Path(local_name(source)), set(ids.values()))
            models.setdefault(ids[source], (source, {}))[1][name] = tier.spec
        return models

    def _overrides(self) -> SourceOverrides:
        return SourceOverrides(
            heads=self.heads,
            image_size=self.image_size,
            resize=self.resize,
            normalise=self.normalise,
            labels=self.labels,
            reduction_points=self.reduction_points,
            reduction=None if self.reduction == "auto" else self.reduction,
            features=self.features,
            new_head=bool(self.classes_from or self.classes),
            weights=self.weights,
            answers=None if self.classes else self.answers,
            pooling=None if self.pooling == "model" else self.pooling,
        )

    def _with_words(self, checkpoint: Checkpoint, path: Path) -> Checkpoint:
        """Return the checkpoint at `path` as a classifier into --classes, if they are given."""
        if self.classes is None:
            return checkpoint
        kind = text_model_type(path)
        prompts = read_prompts(self.classes, self.template or TEMPLATES[kind])
        classifier = embed_prompts(path, prompts).attach(checkpoint, list(prompts))
        answers = self.answers or ("labels" if kind == "siglip" else "classes")
        return replace(classifier, multi_label=answers == "labels")

    def _with_default_rule(self, read: Source, part: Part) -> Part:
        """Return the part with DEFAULT_REDUCTION if its rule is unknown and cannot be measured."""
        if read.reduced or self.eval_data is not None or self.classes_from is not None:
            return part
        return _with_rule(part, DEFAULT_REDUCTION)

    def _choose_reductions(
        self,
        parts: dict[str, Part],
        undecided: set[str],
        images: LabelledImages | None,
        order: Sequence[int],
    ) -> list[str]:
        """Choose the rule of each undecided model, in `parts`. Returns the tables for the card."""
        tables = []
        for model_id, part in parts.items():
            if images is None or not (model_id in undecided or self.reduction == "auto"):
                continue
            if not any(parse_keep_ratio(spec.keep_ratio) < 1 for spec in part.tiers.values()):
                continue
            ratios = list(dict.fromkeys(spec.keep_ratio for spec in part.tiers.values()))
            pixels = decode(images, order[: self.choice_images])
            choice = choose_reduction(part.checkpoint, pixels, ratios)
            parts[model_id] = _with_rule(part, choice.rule)
            title = f"Reductions compared on these weights ({model_id}):"
            tables.append("\n\n".join([title, "\n".join(choice.lines())]))
        return tables

    def _choose_half(self, parts: dict[str, Part], pixels: Pixels) -> None:
        """Set the precision of the graphs for GPUs, in `parts`."""
        for model_id, part in parts.items():
            exact = [spec for spec in part.tiers.values() if spec.precision == "float32"]
            if self.half == "none" or not exact:
                continue
            geometry = part.checkpoint.model.config.geometry
            counts = [geometry.counts(spec.keep_ratio) for spec in exact]
            choice = choose_half(part.checkpoint, pixels, counts, self.half)
            if choice.note:
                print(f"note: {model_id}: {choice.note}", file=sys.stderr)
            parts[model_id] = replace(part, half=choice.half, half_range=choice.range)

    def _load(
        self, data: str, split: str, checkpoint: Checkpoint, *, labelled: bool
    ) -> LabelledImages:
        """Open images in the checkpoint's pixels, and print how many of each class there are."""
        images = load(
            data,
            split,
            checkpoint.preprocess,
            labelled=labelled,
            layout=self.eval_layout,
            image_column=self.eval_image_column,
            label_column=self.eval_label_column,
            classes=self.eval_classes,
            max_unreadable=self.max_unreadable,
        )
        print_inventory(images.inventory)
        return images

    def _aligned(
        self, data: str, split: str, checkpoint: Checkpoint, *, labelled: bool
    ) -> LabelledImages:
        """Open images whose labels are the checkpoint's. Raises PcaeError if they differ."""
        images = self._load(data, split, checkpoint, labelled=labelled)
        try:
            images.align(checkpoint.labels)
        except DataError as error:
            raise PcaeError(
                f"{error}; provide images with the checkpoint's labels, or measure without labels"
                " (--agreement)"
            ) from None
        return images

    def _calibration(
        self, checkpoint: Checkpoint, images: LabelledImages | None, order: Sequence[int]
    ) -> tuple[LabelledImages | None, Sequence[int]]:
        """Return images to calibrate on and their rows; None without.

        images, order: those of --eval-data that are left. Raises PcaeError.
        """
        if checkpoint.answers != "classes" or len(checkpoint.labels) < 2:
            if self.calibration_data is not None or self.calibration_images:
                raise PcaeError(
                    "only models that give one of several classes are calibrated; omit"
                    " --calibration-data and --calibration-images"
                )
            return None, ()
        if self.calibration_images == 0:
            return None, ()
        if self.calibration_data is None:
            count = self.calibration_count(len(order)) if images is not None else 0
            return (images, order[:count]) if count else (None, ())
        labelled = bool(checkpoint.labels) and not self.agreement
        others = self._aligned(
            self.calibration_data, self.calibration_split, checkpoint, labelled=labelled
        )
        held_out = None if self.source is None else _held_out(self.source)
        return others.subset(self.calibration_rows(others, held_out)).readable(), ()

    def _photos(self, backbone: Checkpoint) -> tuple[LabelledImages | None, list[str]]:
        """Return the readable photographs of --classes-from, in random order and each once.

        Also returns notes on what was left out.
        """
        if self.classes_from is None:
            return None, []
        photos = self._load(self.classes_from, self.classes_split, backbone, labelled=True)
        return drop_copies(photos.subset(shuffle_rows(len(photos))).readable())

    def _images(self, checkpoint: Checkpoint) -> LabelledImages | None:
        """Return the readable images of --eval-data in random order, as many as are needed.

        Raises PcaeError if their labels are read and differ from the model's.
        """
        if self.eval_data is None:
            return None
        labelled = bool(checkpoint.labels) and not self.agreement
        if labelled and checkpoint.answers == "labels":
            raise PcaeError(
                "images in class folders have one class each, but the model gives independent"
                " labels; measure without classes (--agreement)"
            )
        images = self._aligned(self.eval_data, self.eval_split, checkpoint, labelled=labelled)
        if len(images) < self.parity_images and "parity_images" in self.model_fields_set:
            raise PcaeError(
                f"{images.name} has only {len(images)} images of the {self.parity_images} to"
                f" verify on; provide more, or lower --parity-images to {len(images)}"
                if len(images) >= MIN_IMAGES
                else f"{images.name} has only {len(images)} images, fewer than the {MIN_IMAGES} to"
                " verify on; omit --parity-images to add generated images"
            )
        rows = shuffle_rows(len(images))
        if self.limit is not None:
            compared = self._tier_images(images) if self.tiers == "auto" else 0
            wanted = compared + self.limit_with_calibration(self.limit)
            rows = rows[: max(wanted, self.parity_images, self.choice_images)]
        return images.subset(rows).readable()

    def _tier_images(self, images: LabelledImages) -> int:
        """Return how many images tiers are compared on. Raise PcaeError if none are left."""
        if self.tier_images is None:
            return min(TIER_IMAGES, len(images) // 2)
        if self.tier_images >= len(images):
            raise PcaeError(
                f"--tier-images {self.tier_images} leaves none of {len(images)} images to measure"
                " the chosen tiers on; lower it"
            )
        return self.tier_images


def _held_out(source: str) -> HeldOut | None:
    """Return what SOURCE's training held out, if it is a run of pcae-train."""
    return None if is_remote(source) else heldout_record.read(Path(source))


def _with_rule(part: Part, rule: Rule) -> Part:
    """Set the reduction rule of a part's model, and return the part."""
    model = part.checkpoint.model
    model.config = replace(model.config, reduction=rule)
    return part


def _model_id(path: Path, taken: set[str]) -> str:
    """Return a model id made from a checkpoint's file name, unlike those taken."""
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
    if any(tier.quality is not None for tier in bundle.tiers):
        print(f"quality: {card.PRECISION}")
    else:
        print("quality: not measured; images for it are given as --eval-data")


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
