"""Hold images out of the training data, as many of each class as its share, whole groups at once.

What is drawn together is a unit: an image, or all images of a group, such as those of a person.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pcae_training.source import DataError


@dataclass(frozen=True)
class Split:
    """Rows to train on, and rows held out for all choices, both ascending."""

    train: list[int]
    holdout: list[int]
    #: Classes with a single unit, by their label: it stays in training, so they are not measured.
    unmeasured: list[int] = field(default_factory=list)


def hold_out(
    labels: Tensor, count: int, name: str, seed: int = 0, groups: Sequence[str] | None = None
) -> Split:
    """Draw about `count` rows to hold out, from each class by its share; exactly without groups.

    labels: int64 [rows]. groups: the group of each row. The same seed draws the same rows. At least
    one unit of each class stays in training. Raise DataError if `count` is too large for that, or a
    group has images of several classes.
    """
    units = _units(labels, name, seed, groups)
    sizes = {label: sum(map(len, own)) for label, own in units.items()}
    room = {label: sizes[label] - min(map(len, own)) for label, own in units.items()}
    most = sum(room.values())
    if not 0 < count <= most:
        what, only = ("image", "one") if groups is None else ("group", "one group")
        raise DataError(
            f"cannot hold out {count} of the {len(labels)} images of {name}, one {what} of each"
            f" class stays in training; --holdout can be at most {most}"
            if most
            else f"cannot hold out images of {name}: each of its classes has {only} only; give"
            " --eval-data"
        )
    labels_used = sorted(units)
    quotas = _share(
        torch.tensor([sizes[label] for label in labels_used]),
        torch.tensor([room[label] for label in labels_used]),
        count,
    )
    held: list[int] = []
    for label, quota in zip(labels_used, quotas.tolist(), strict=True):
        held += _draw(units[label], quota)
    return _split(held, len(labels), units)


def hold_out_fold(
    labels: Tensor,
    fold: int,
    folds: int,
    name: str,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Split:
    """Hold out one of `folds` parts, counted from 1; each row is in one, by the same seed.

    The parts have about equal numbers of each class. The only unit of a class stays in training.
    """
    held: list[int] = []
    start = 0  # the parts that get one more take turns
    for own in _units(labels, name, seed, groups).values():
        if len(own) == 1:
            continue
        filled = [0] * folds
        for unit in sorted(own, key=len, reverse=True):
            place = min(range(folds), key=lambda i: (filled[i], (i - start) % folds))
            filled[place] += len(unit)
            if place == fold - 1:
                held += unit
        start = (start + sum(map(len, own))) % folds
    if not held:
        raise DataError(f"{name}: fold {fold} of {folds} has no images; use fewer folds")
    return _split(held, len(labels), _units(labels, name, seed, groups))


def default_holdout(labels: Tensor, largest: int) -> int:
    """Return how many images to hold out by default: `largest`, or a fifth of fewer images.

    If possible, one of each class.
    """
    sizes = torch.bincount(labels - labels.min())
    classes, most = int((sizes > 1).sum()), int((sizes - 1).clamp(min=0).sum())
    return max(1, min(largest, max(round(len(labels) / 5), classes), most))


def _units(
    labels: Tensor, name: str, seed: int, groups: Sequence[str] | None
) -> dict[int, list[list[int]]]:
    """Return the units of each class in random order, as their rows."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    values = labels.tolist()
    if groups is None:
        units: dict[int, list[list[int]]] = defaultdict(list)
        for row in order:
            units[values[row]].append([row])
        return units
    members: dict[str, list[int]] = {}
    for row in order:
        members.setdefault(groups[row], []).append(row)
    units = defaultdict(list)
    for group, rows in members.items():
        found = sorted({values[row] for row in rows})
        if len(found) > 1:
            raise DataError(
                f"{name}: the group {group!r} has images of {len(found)} classes, and groups are"
                " held out class by class; choose the images to evaluate on yourself (--eval-data)"
            )
        units[found[0]].append(rows)
    return units


def _draw(units: list[list[int]], quota: int) -> list[int]:
    """Return the rows of whole units, in their order, as close to `quota` rows as they allow."""
    held: list[int] = []
    taken = 0
    for unit in units:
        if taken == len(units) - 1:
            break  # one stays in training
        if len(held) + len(unit) / 2 <= quota:
            held += unit
            taken += 1
    return held


def _split(held: Sequence[int], rows: int, units: dict[int, list[list[int]]]) -> Split:
    inside = torch.zeros(rows, dtype=torch.bool)
    inside[list(held)] = True
    every = torch.arange(rows)
    single = sorted(label for label, own in units.items() if len(own) == 1)
    return Split(every[~inside].tolist(), every[inside].tolist(), single)


def _share(sizes: Tensor, room: Tensor, count: int) -> Tensor:
    """Return how many of `count` rows to draw from classes of `sizes` [classes].

    Proportional, by largest remainder, and at most `room` [classes].
    """
    exact = sizes * count / sizes.sum()
    quota = torch.minimum(exact.floor().long(), room)
    while (missing := count - int(quota.sum())) > 0:
        rank = torch.where(quota < room, exact - quota, -torch.inf)
        best = rank.argsort(descending=True, stable=True)[: min(missing, int((quota < room).sum()))]
        quota[best] += 1
    return quota
