"""Read a checkpoint of any supported project for export: weights, sizes, labels, preprocessing.

Overrides replace what the file contains. A value that neither contains is an error,
except class names: classes are then numbered.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pcae_serve.bounded_file import read_bounded
from pcae_serve.bounded_json import CONFIG_BYTES, parse_json
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import Rule
from pcae_serve.errors import PcaeError
from pcae_serve.sources.locate import locate_checkpoint
from pcae_serve.sources.needed_files import checkpoint_files, text_model_files
from pcae_training.checkpoint import Checkpoint, CheckpointError
from pcae_training.import_weights import (
    LoadedCheckpoint,
    WeightsChoice,
    initialise,
    load_checkpoint,
)
from pcae_training.model import VisionTransformer

#: Mean and std of the pixel values that published ViTs were trained on.
NORMALISE = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # DeiT, MAE, DINO, DINOv2
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # Google's ViTs (AugReg, ImageNet-21k)
}
#: Default share of the shorter side that a centre crop keeps (timm's default).
CROP = 0.875


class SourceError(PcaeError):
    """A checkpoint lacks what export needs, or contradicts an override."""


@dataclass(frozen=True)
class SourceOverrides:
    """Replacements for what a checkpoint contains; None keeps its own."""

    heads: int | None = None
    image_size: int | None = None
    resize: int | None = None
    normalise: Literal["imagenet", "half"] | None = None
    labels: Path | None = None
    reduction_points: Sequence[int] | None = None
    reduction: Rule | None = None
    features: bool = False  # drop the head
    new_head: bool = False  # the same; another one follows
    weights: WeightsChoice | None = None
    answers: Literal["classes", "labels"] | None = None
    pooling: Literal["cls", "mean"] | None = None  # of the features, without a head


@dataclass(frozen=True)
class Source:
    """A checkpoint ready for export."""

    checkpoint: Checkpoint
    reduced: bool  # its reduction rule is known: from its training, or from an override
    notes: tuple[str, ...] = ()  # messages for the user


def locate_source(name: str, *, text: bool = False) -> tuple[Path, str]:
    """Return where a checkpoint is, and its name and commit if it was fetched, else "".

    text: also fetch the tokenizer's files. Raises FetchError if it is on a hub and cannot be
    fetched.
    """
    lines: list[str] = []
    choose = text_model_files if text else checkpoint_files
    path = locate_checkpoint(name, lines.append, choose)
    for line in lines:
        print(line, file=sys.stderr)
    return path, lines[-1] if lines else ""


def read_source(path: Path, overrides: SourceOverrides) -> Source:
    """Open a checkpoint of any format. Raises PcaeError with one line on what is missing."""
    found = load_checkpoint(path, heads=overrides.heads, weights=overrides.weights)
    ignored = [name for name in found.ignored if not name.endswith("mask_token")]
    notes = [*found.notes, *([f"ignored in {path}: {', '.join(ignored)}"] if ignored else [])]
    if overrides.new_head and found.config.classes:
        notes.append(f"the head of {path} ({found.config.classes} classes) is replaced")
    if overrides.features or overrides.new_head:
        found = found.drop_head()
    if overrides.pooling is not None:
        found = _pool(path, found, overrides.pooling)
    multi_label = _multi_label(path, found, overrides)
    preprocess = _preprocess(path, found, overrides)
    if (size := preprocess.image_size) != found.config.image_size:
        notes.append(
            f"{path} was trained at {found.config.image_size} pixels, not {size}:"
            " positions are interpolated"
        )
    changes: dict[str, object] = {"image_size": size}
    if overrides.reduction_points is not None:
        changes["reduction_points"] = tuple(overrides.reduction_points)
    if overrides.reduction is not None:
        changes["reduction"] = overrides.reduction
    try:
        config = replace(found.config, **changes)  # type: ignore[arg-type]
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None
    if config.channels != 3:
        raise SourceError(f"{path} takes {config.channels} channels; only RGB is supported")
    labels = _labels(path, found, overrides, notes)
    model = VisionTransformer(config)
    adapted = initialise(model, found)
    if adapted.missing:
        raise SourceError(f"{path} lacks weights: {', '.join(adapted.missing)}")
    checkpoint = Checkpoint(model.eval(), preprocess, labels, found.training, multi_label)
    return Source(
        checkpoint, found.reduction_known or overrides.reduction is not None, tuple(notes)
    )


def _pool(path: Path, found: LoadedCheckpoint, pooling: Literal["cls", "mean"]) -> LoadedCheckpoint:
    """Return the checkpoint with another pooling. Raises SourceError."""
    if found.config.classes:
        raise SourceError(
            f"the head of {path} reads its own pooling ({found.config.pooling}); drop it with"
            " --features, or omit --pooling"
        )
    try:
        return found.pool_features(pooling)
    except CheckpointError as error:
        raise SourceError(f"{path} has no {pooling} features: {error}") from None


def _multi_label(path: Path, found: LoadedCheckpoint, overrides: SourceOverrides) -> bool:
    """Return whether the labels are independent. Raises PcaeError if that is not known."""
    if overrides.answers is None:
        found.check_classes(path)
        return bool(found.multi_label)
    if found.head_problem is not None or not found.config.classes:
        found.check_classes(path)
        raise SourceError(f"{path} has no head, so --answers does not apply")
    if overrides.answers == "classes" and found.config.classes == 1:
        raise SourceError(
            f"{path} has a single output: as the only class it would always have probability 1;"
            " give --answers labels if its sigmoid is the probability of a label"
        )
    return overrides.answers == "labels"


def _preprocess(path: Path, found: LoadedCheckpoint, overrides: SourceOverrides) -> Preprocess:
    """Return the file's preprocessing with the overrides applied."""
    known = found.preprocess
    if known is None and overrides.normalise is None:
        raise SourceError(
            f"{path} does not contain mean and std of its images; give --normalise"
            f" {' or --normalise '.join(NORMALISE)}"
        )
    size = overrides.image_size or (known.image_size if known else found.config.image_size)
    fields: dict[str, Any] = {"image_size": size}
    if overrides.normalise:
        fields["mean"], fields["std"] = NORMALISE[overrides.normalise]
    try:
        if known is None:
            resize = overrides.resize or max(size, round(size / CROP))
            return Preprocess(**fields, resize=resize, crop_offset="half-even")  # torchvision's
        resize = overrides.resize or round(known.resize * size / known.image_size)
        squash = known.squash and overrides.resize is None
        return replace(known, **fields, resize=resize, squash=squash)
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None


def _labels(
    path: Path, found: LoadedCheckpoint, overrides: SourceOverrides, notes: list[str]
) -> list[str]:
    """Return the class names, [] without a head. Appends to `notes` if they are numbers."""
    classes = found.config.classes
    if overrides.labels is not None:
        if not classes:
            raise SourceError(f"{path} has no head, so --labels does not apply")
        labels = read_labels(overrides.labels)
        if len(labels) != classes:
            raise SourceError(
                f"{overrides.labels} has {len(labels)} names, but {path} has {classes} classes"
            )
        return labels
    if classes and not found.labels:
        notes.append(
            f"{path} has no names for its {classes} classes: they are numbered (see --labels)"
        )
        return [str(number) for number in range(classes)]
    return found.labels or []


def read_labels(file: Path) -> list[str]:
    """Read class names from a text file, one per line, or a JSON list. Raises SourceError.

    A byte order mark at the start is not part of a name. Two classes may have the same name, as
    ImageNet's "crane" and "maillot" do.
    """
    try:
        raw = read_bounded(file, CONFIG_BYTES)
        text = raw.decode("utf-8-sig")
        labels = parse_json(text.encode()) if file.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {file}: {error}") from None
    if not isinstance(labels, list) or not all(isinstance(x, str) and x.strip() for x in labels):
        raise SourceError(f"{file} must contain one class name per line, or a JSON list of names")
    return [label.strip() for label in labels]
