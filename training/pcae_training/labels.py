"""Number class labels: words, `datasets`' class labels, and integers that start anywhere.

Classes have names everywhere, and data are matched with a model by these names.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcae_training.columns import Columns, check_classes, check_value
from pcae_training.source import DataError

#: The largest number of classes that are named by their integers; a column of identifiers has more.
MAX_NUMBERS = 100_000

_VALUE = re.compile(r"(-?\d+)=(.+)", re.DOTALL)


class Labels(NamedTuple):
    """Class numbers int64 [rows], and the name of each class."""

    values: Tensor
    classes: list[str]


def encode_names(
    names: Sequence[str], own: Sequence[str], name: str, classes: Sequence[str] | None = None
) -> Labels:
    """Number the class `names` of rows.

    own: the data's classes, of which some may have no rows. classes: all class names in the order
    of their numbers (default: `own`). Raise DataError, naming the data `name`, if a row's class is
    not one of `classes`.
    """
    chosen = list(own) if classes is None else list(classes)
    check_classes(chosen, name)
    number = number_names(chosen, name)
    found = dict.fromkeys(names)
    plain = {text: unicodedata.normalize("NFC", text) for text in found}
    if unknown := [text for text in found if plain[text] not in number]:
        raise DataError(
            f"{name} has images of classes that are not among the {len(chosen)} expected"
            f" ({few(chosen)}): {few(unknown)}"
        )
    return Labels(torch.tensor([number[plain[text]] for text in names], dtype=torch.int64), chosen)


def number_names(classes: Sequence[str], name: str) -> dict[str, int]:
    """Return the number of each class, by its name in Unicode's composed form."""
    number = {unicodedata.normalize("NFC", text): i for i, text in enumerate(classes)}
    if len(number) < len(classes):
        check_classes(classes, name)
        raise DataError(f"{name} has two classes whose names look alike; rename one")
    return number


def align(labels: Labels, wanted: Sequence[str], name: str) -> Labels:
    """Return the labels as numbers of the `wanted` classes, such as a model's, by their names.

    Raise DataError if an image's class is not one of them.
    """
    if labels.classes == list(wanted):
        return labels
    present = _present(labels.values)
    used = [labels.classes[value] for value in present]
    encoded = encode_names(used, used, name, wanted)
    table = torch.zeros(len(labels.classes), dtype=torch.int64)
    table[torch.tensor(present, dtype=torch.int64)] = encoded.values
    return Labels(table[labels.values], list(wanted))


def encode_integers(values: Tensor, name: str, classes: Sequence[str] | None = None) -> Labels:
    """Number integer labels [rows], which need not start at 0 nor be consecutive.

    classes: names, each for its position, or VALUE=NAME; default: the integers that occur. Raise
    DataError if a label has no name, or if it is not clear which name is whose.
    """
    present = _present(values)  # ascending
    if classes is None:
        spread = present[-1] - present[0]
        if len(present) > MAX_NUMBERS or (len(present) == len(values) <= spread // 2):
            raise DataError(
                f"{name} has {len(present):,} different labels in {len(values):,} rows; name the"
                " classes with --classes, or choose another --label-column"
            )
        own = [str(value) for value in present]
        check_classes(own, name)
        return Labels(torch.searchsorted(torch.tensor(present), values), own)
    pairs = [_VALUE.fullmatch(text) for text in classes]
    if all(pairs):
        names = {int(pair[1]): pair[2] for pair in pairs if pair}
        return _look_up(values, names, name)
    if all(map(_is_integer, classes)) and {str(value) for value in present} <= set(classes):
        return _look_up(values, {int(text): text for text in classes}, name)  # of an earlier run
    largest = present[-1]
    if largest >= len(classes) or present[0] > 0:
        if present[0] == 0:
            row = int(values.argmax())
            check_value(largest, classes, f"{name}, row {row}")
        raise DataError(
            f"{name} has labels from {present[0]} to {largest}; state which is which, as in"
            f" --classes {present[0]}={classes[0]},{present[0] + 1}=…"
        )
    return Labels(values, list(classes))


def name_codes(
    columns: Columns, name: str, classes: Sequence[str] | None
) -> tuple[dict[int | str, int], list[str]]:
    """Return the class number of each label that a stream may contain, and the class names.

    classes: as for `encode_names` or `encode_integers`; a stream must be given what it does not
    state itself. Raise DataError if it is missing.
    """
    own, chosen = list(columns.classes), list(classes or columns.classes)
    if not chosen:
        what = "words" if columns.words else "numbers"
        raise DataError(f"{name} has {what} as labels; name the classes with --classes")
    pairs = [_VALUE.fullmatch(text) for text in chosen]
    if not own and not columns.words and all(pairs):
        names = {int(pair[1]): pair[2] for pair in pairs if pair}
        check_classes(list(names.values()), name)
        return {value: i for i, value in enumerate(names)}, list(names.values())
    check_classes(chosen, name)
    if columns.words:
        codes: dict[int | str, int] = {}
        codes.update(number_names(chosen, name))
        return codes, chosen
    if not own:
        return {i: i for i in range(len(chosen))}, chosen
    labels = encode_names(own, own, name, chosen)
    return dict(enumerate(labels.values.tolist())), chosen


def _look_up(values: Tensor, names: dict[int, str], name: str) -> Labels:
    """Number integer labels that have names; the classes have the order of `names`."""
    number = {value: i for i, value in enumerate(names)}
    if unknown := [value for value in _present(values) if value not in number]:
        row = int((values == unknown[0]).nonzero()[0])
        raise DataError(f"{name}, row {row}: --classes has no name for label {unknown[0]}")
    check_classes(list(names.values()), name)
    return Labels(torch.tensor([number[value] for value in values.tolist()]), list(names.values()))


def _present(values: Tensor) -> list[int]:
    """Return the different values, ascending."""
    found: list[int] = torch.unique(values).tolist()
    return found


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


def few(names: Sequence[Any]) -> str:
    """Return the first names, for messages."""
    shown = ", ".join(repr(str(name)) for name in names[:3])
    return shown + (f", … ({len(names)})" if len(names) > 3 else "")
