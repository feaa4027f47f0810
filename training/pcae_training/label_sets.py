"""Sets of labels: images that have any number of independent labels, as bool [rows, classes]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcae_training.columns import UNLABELLED, Columns
from pcae_training.labels import Labels, encode_integers, encode_names
from pcae_training.source import DataError


def encode_sets(
    rows: Sequence[Sequence[int | str] | None],
    columns: Columns,
    name: str,
    classes: Sequence[str] | None = None,
) -> Labels:
    """Number the labels of rows, each a list that may be empty, as bool [rows, classes].

    classes: all class names in the order of their numbers (default: those of the column, else
    those that occur). Raise DataError, naming the data `name`, if a row has no list, or a label is
    missing or not one of `classes`.
    """
    if missing := sum(labels is None for labels in rows):
        raise DataError(
            f"{name}: {missing} of its {len(rows)} images have no list of labels; an image without"
            " labels has an empty one"
        )
    flat = [label for labels in rows for label in labels or ()]
    if any(label == UNLABELLED or label == "" for label in flat):
        raise DataError(f"{name}: a list of labels contains an empty one")
    if not flat:
        raise DataError(f"{name}: none of its {len(rows)} images has a label")
    encoded = _encode(flat, columns, name, classes)
    sizes = torch.tensor([len(labels or ()) for labels in rows])
    places = torch.repeat_interleave(torch.arange(len(rows)), sizes)
    values = torch.zeros(len(rows), len(encoded.classes), dtype=torch.bool)
    values[places, encoded.values] = True
    return Labels(values, encoded.classes)


def align_sets(labels: Labels, wanted: Sequence[str], name: str) -> Labels:
    """Return the labels with the columns of the `wanted` classes, such as a model's, by name.

    Raise DataError if an image has a label that is not one of them.
    """
    if labels.classes == list(wanted):
        return labels
    used = labels.values.any(dim=0).nonzero().flatten().tolist()
    encoded = encode_names([labels.classes[i] for i in used], labels.classes, name, wanted)
    values = torch.zeros(len(labels.values), len(wanted), dtype=torch.bool)
    values[:, encoded.values] = labels.values[:, used]
    return Labels(values, list(wanted))


def strata(values: Tensor, groups: Sequence[str] | None = None) -> Tensor:
    """Return the rarest label of each image, int64 [rows], by which a hold-out is stratified.

    values: bool [rows, classes]; an image without labels has the number after the last class.
    groups: the group of each row; all images of a group then have that group's rarest label.
    """
    rarity = torch.where(values.any(dim=0), values.sum(dim=0), len(values) + 1)
    if groups is not None:
        number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        index = torch.tensor([number[group] for group in groups])
        joined = torch.zeros(len(number), values.shape[1], dtype=torch.int64)
        joined.index_add_(0, index, values.long())
        values = joined.bool()[index]
    ranks = torch.where(values, rarity, int(rarity.max()) + 1)
    return torch.where(values.any(dim=1), ranks.argmin(dim=1), values.shape[1])


def _encode(
    flat: Sequence[int | str], columns: Columns, name: str, classes: Sequence[str] | None
) -> Labels:
    """Number the labels of all rows, as those of rows with one label each."""
    if columns.words:
        words = [str(label) for label in flat]
        return encode_names(words, sorted(set(words)), name, classes)
    numbers = torch.tensor([int(label) for label in flat])
    if not columns.classes:
        return encode_integers(numbers, name, classes)
    own = columns.classes
    if unknown := [label for label in flat if not 0 <= int(label) < len(own)]:
        raise DataError(f"{name}: label {unknown[0]} is not one of its {len(own)} classes")
    return encode_names([own[int(label)] for label in flat], own, name, classes)
