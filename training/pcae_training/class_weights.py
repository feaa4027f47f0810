"""Weights of classes in the loss, for data with many images of some classes and few of others."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pcae_serve.bounded_json import read_json
from pcae_serve.errors import PcaeError
from pcae_training.labels import few

#: Weights by the inverse of the number of images.
AUTO = "auto"
#: A larger weight is a slip.
MAX_WEIGHT = 1e6

#: AUTO, or classes by name with their weights.
ClassWeights = Literal["auto"] | tuple[tuple[str, float], ...]


def read_weights(value: object) -> object:
    """Parse AUTO, NAME=WEIGHT pairs separated by commas, or the name of a JSON file of an object.

    Return AUTO or pairs of names and weights. Raise ValueError with one line.
    """
    if value is None or value == AUTO:
        return value
    pairs: list[tuple[Any, Any]]
    if not isinstance(value, str):  # pairs, as from run.json
        pairs = [(name, weight) for name, weight in value]  # type: ignore[attr-defined]
    elif value.endswith(".json"):
        pairs = _read_file(Path(value))
    else:
        parts = [part.rpartition("=") for part in value.split(",")]
        pairs = [(name.strip(), weight) for name, _, weight in parts]
        if not all(name for name, _ in pairs):
            raise ValueError(
                f"must be {AUTO}, NAME=WEIGHT separated by commas, or a .json file, not {value!r}"
            )
    if twice := [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]:
        raise ValueError(f"{few(twice)} is given more than once")
    return tuple((str(name), _read_number(name, weight)) for name, weight in pairs)


def weigh_classes(
    chosen: ClassWeights, labels: Tensor, classes: Sequence[str], data: str
) -> Tensor:
    """Return the weight of each class, float32 [classes]; their mean over the images is 1.

    Classes that are not named have 1 before all are scaled. labels: int64 [images]. data: the name
    of the images. Raise PcaeError if a class is not known, or no image would count.
    """
    counts = torch.bincount(labels, minlength=len(classes)).double()
    if chosen == AUTO:
        weights = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)
    else:
        assert not isinstance(chosen, str)
        named = dict(chosen)
        if unknown := [name for name in named if name not in classes]:
            raise PcaeError(
                f"--class-weights: {few(unknown)} is not a class of {data}, which has"
                f" {few(classes)}"
            )
        weights = torch.tensor([named.get(name, 1.0) for name in classes]).double()
    total = float((weights * counts).sum())
    if not total:
        raise PcaeError(
            "--class-weights: all classes with training images have a weight of 0; give one of them"
            " a larger weight"
        )
    return (weights * len(labels) / total).float()


def weigh_images(targets: Tensor, smoothing: float, weights: Tensor) -> Tensor:
    """Return the weight of each image, float32 [B]: the mean weight of its label or labels.

    targets: float32 [B, classes], mixed and smoothed. Smoothing does not change an image's weight.
    """
    label = (targets - smoothing / targets.shape[1]) / (1 - smoothing)
    return label @ weights


def describe(weights: Tensor, classes: Sequence[str], limit: int) -> str:
    """Return a line with the weights from the largest, at most `limit` of them."""
    pairs = sorted(zip(weights.tolist(), classes, strict=True), reverse=True)
    shown = [f"{name} {weight:.3g}" for weight, name in pairs]
    if len(shown) > limit:
        shown = [*shown[: limit // 2], "…", *shown[-(limit // 2) :]]
    return f"class weights: {', '.join(shown)}"


def _read_file(path: Path) -> list[tuple[Any, Any]]:
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be an object of class names and weights")
    return list(content.items())


def _read_number(name: str, value: object) -> float:
    """Return a weight as a number. Raise ValueError unless it is one from 0 to MAX_WEIGHT."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= MAX_WEIGHT:
        raise ValueError(
            f"the weight of {name!r} must be a number from 0 to {MAX_WEIGHT:g}, not {value!r}"
        )
    return number
