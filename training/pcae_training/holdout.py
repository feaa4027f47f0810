"""Hold images out of the training data, as many of each class as its share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcae_training.source import DataError


@dataclass(frozen=True)
class Split:
    """Rows to train on, and rows held out for all choices."""

    train: list[int]
    holdout: list[int]


def hold_out(labels: Tensor, count: int, name: str, seed: int = 0) -> Split:
    """Draw `count` rows to hold out, from each class by its share; the same seed, the same rows.

    labels: int64 [rows]. At least one image of each class stays in training. Raise DataError if
    `count` is too large for that.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    sizes = torch.bincount(labels - labels.min())
    most = int((sizes - 1).clamp(min=0).sum())
    if not 0 < count <= most:
        raise DataError(
            f"cannot hold out {count} of the {len(labels)} images of {name}, one of each class"
            f" stays in training; --holdout can be at most {most}"
            if most
            else f"cannot hold out images of {name}: each of its classes has one only; give"
            " --eval-data"
        )
    quota = _share(sizes, count)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for row in order.tolist():
        place = int(labels[row] - labels.min())
        if quota[place] > 0:
            quota[place] -= 1
            held[row] = True
    rows = torch.arange(len(labels))
    return Split(train=rows[~held].tolist(), holdout=rows[held].tolist())


def _share(sizes: Tensor, count: int) -> Tensor:
    """Return how many of `count` rows to draw from classes of `sizes` [classes].

    Proportional, by largest remainder, and at most one fewer than a class has.
    """
    exact = sizes * count / sizes.sum()
    room = (sizes - 1).clamp(min=0)
    quota = torch.minimum(exact.floor().long(), room)
    while (missing := count - int(quota.sum())) > 0:
        rank = torch.where(quota < room, exact - quota, -torch.inf)
        best = rank.argsort(descending=True, stable=True)[: min(missing, int((quota < room).sum()))]
        quota[best] += 1
    return quota


def default_holdout(labels: Tensor, largest: int) -> int:
    """Return how many images to hold out by default: `largest`, or a fifth of fewer images.

    If possible, one of each class.
    """
    sizes = torch.bincount(labels - labels.min())
    classes, most = int((sizes > 1).sum()), int((sizes - 1).clamp(min=0).sum())
    return max(1, min(largest, max(round(len(labels) / 5), classes), most))
