"""A checkpoint of whatever project, made ready for export: sizes, labels and preprocessing known.

What the file says is taken from it; what it does not say must be given, or is made up where nothing
can go wrong by it (names of classes). It knows checkpoints, nothing of tiers or graphs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import Rule
from pcae_serve.errors import PcaeError
from pcae_training.checkpoint import Checkpoint
from pcae_training.import_weights import LoadedCheckpoint, initialise, load_checkpoint
from pcae_training.model import VisionTransformer

#: Mean and std of the pixel values that published ViTs were trained on.
NORMALISE = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # DeiT, MAE, DINO, DINOv2
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # Google's ViTs (AugReg, ImageNet-21k)
}
#: The share of the shorter side that a centre crop leaves, where nobody says (timm's default).
CROP = 0.875


class SourceError(PcaeError):
    """A checkpoint lacks what export must know, or contradicts what it was told."""


@dataclass(frozen=True)
class SourceOverrides:
    """What a person says about a checkpoint; None: what the file says."""

    heads: int | None = None
    image_size: int | None = None
    resize: int | None = None
    normalise: Literal["imagenet", "half"] | None = None
    labels: Path | None = None
    reduction_points: Sequence[int] | None = None
    reduction: Rule | None = None
    features: bool = False  # leave the head out


@dataclass(frozen=True)
class Source:
    """A checkpoint ready for export."""

    checkpoint: Checkpoint
    reduced: bool  # it is known which reduction suits it: it was trained with that one, or told
    notes: tuple[str, ...] = ()  # what a person should know of how it was read


def read_source(path: Path, told: SourceOverrides) -> Source:
    """Open a checkpoint of any format. Raise PcaeError with one line on what is missing."""
    found = load_checkpoint(path, heads=told.heads)
    ignored = [name for name in found.ignored if not name.endswith("mask_token")]
    notes = [f"left out of {path}: {', '.join(ignored)}"] if ignored else []
    if told.features:
        found = found.drop_head()
    preprocess = _preprocess(path, found, told)
    if (size := preprocess.image_size) != found.config.image_size:
        notes.append(
            f"{path} was trained at {found.config.image_size} pixels, not {size}:"
            " positions are interpolated"
        )
    changes: dict[str, object] = {"image_size": size}
    if told.reduction_points is not None:
        changes["reduction_points"] = tuple(told.reduction_points)
    if told.reduction is not None:
        changes["reduction"] = told.reduction
    try:
        config = replace(found.config, **changes)  # type: ignore[arg-type]
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None
    if config.channels != 3:
        raise SourceError(f"{path} takes {config.channels} channels: only RGB is served")
    labels = _labels(path, found, told, notes)
    model = VisionTransformer(config)
    adapted = initialise(model, found)
    if adapted.missing:
        raise SourceError(f"{path} lacks {', '.join(adapted.missing)}: nothing could be answered")
    checkpoint = Checkpoint(model.eval(), preprocess, labels, found.training)
    return Source(checkpoint, found.reduction_known or told.reduction is not None, tuple(notes))


def _preprocess(path: Path, found: LoadedCheckpoint, told: SourceOverrides) -> Preprocess:
    """What the file says of preprocessing, with what was told in its place."""
    known = found.preprocess
    if known is None and told.normalise is None:
        raise SourceError(
            f"{path} does not say how its images were normalised: give --normalise"
            f" {' or --normalise '.join(NORMALISE)}"
        )
    size = told.image_size or (known.image_size if known else found.config.image_size)
    fields: dict[str, Any] = {"image_size": size}
    if told.normalise:
        fields["mean"], fields["std"] = NORMALISE[told.normalise]
    try:
        if known is None:
            resize = told.resize or max(size, round(size / CROP))
            return Preprocess(**fields, resize=resize)
        resize = told.resize or round(known.resize * size / known.image_size)
        squash = known.squash and told.resize is None
        return replace(known, **fields, resize=resize, squash=squash)
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None


def _labels(
    path: Path, found: LoadedCheckpoint, told: SourceOverrides, notes: list[str]
) -> list[str]:
    """Names of the classes, [] without a head."""
    classes = found.config.classes
    if told.labels is not None:
        if not classes:
            raise SourceError(f"{path} has no head: --labels would name nothing")
        labels = read_labels(told.labels)
        if len(labels) != classes:
            raise SourceError(f"{told.labels} names {len(labels)} classes, {path} has {classes}")
        return labels
    if classes and not found.labels:
        notes.append(f"{path} does not name its {classes} classes: they are numbered (--labels)")
        return [str(number) for number in range(classes)]
    return found.labels or []


def read_labels(file: Path) -> list[str]:
    """Class names from a text file, one a line, or a JSON list of strings."""
    try:
        text = file.read_text(encoding="utf-8")
        labels = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read: {error}") from None
    if not isinstance(labels, list) or not all(isinstance(x, str) and x.strip() for x in labels):
        raise SourceError(f"{file} must name one class a line, or be a JSON list of names")
    labels = [label.strip() for label in labels]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise SourceError(f"{file} names {twice!r} twice")
    return labels
