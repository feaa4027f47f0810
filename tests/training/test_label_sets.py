"""Images with any number of labels: lists in a column."""

from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest
import torch

from pcae_training.columns import choose_columns
from pcae_training.data import DataError
from pcae_training.label_sets import align_sets, encode_sets, strata
from pcae_training.labels import Labels

WORDS = datasets.List(datasets.Value("string"))
NUMBERS = datasets.List(datasets.Value("int64"))
NAMED = datasets.List(datasets.ClassLabel(names=["sea", "sun"]))


def encode(kind: Any, rows: list[Any], classes: list[str] | None = None) -> Labels:
    columns = choose_columns(datasets.Features({"image": datasets.Image(), "labels": kind}), "x")
    return encode_sets([columns.values({"labels": row}) for row in rows], columns, "x", classes)


def test_words_numbers_and_named_classes() -> None:
    labels = encode(WORDS, [["sun", "sea"], [], ["sun", "sun"]])
    assert labels.classes == ["sea", "sun"]
    assert labels.values.tolist() == [[True, True], [False, False], [False, True]]
    labels = encode(NUMBERS, [[7], [3, 7]])
    assert (labels.classes, labels.values.int().tolist()) == (["3", "7"], [[0, 1], [1, 1]])
    labels = encode(NAMED, [[1], []])
    assert (labels.classes, labels.values.int().tolist()) == (["sea", "sun"], [[0, 1], [0, 0]])
    labels = encode(WORDS, [["sun"]], ["sea", "sun", "snow"])
    assert labels.values.tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (WORDS, [["a"], None], "1 of its 2 images have no list of labels; an image without labels"),
        (WORDS, [["a", None]], "a list of labels contains an empty one"),
        (WORDS, [[], []], "none of its 2 images has a label"),
        (NAMED, [[2]], "label 2 is not one of its 2 classes"),
        (WORDS, [["a"]], "has only one class, 'a': at least two are needed"),
    ],
)
def test_what_cannot_be_read(kind: Any, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(kind, rows)


def test_an_unknown_label() -> None:
    with pytest.raises(DataError, match="classes that are not among the 2 expected"):
        encode(WORDS, [["fog"]], ["sea", "sun"])


def test_a_label_comes_before_a_list_of_labels() -> None:
    features = {"image": datasets.Image(), "label": datasets.Value("string"), "labels": WORDS}
    assert choose_columns(datasets.Features(features), "x").label == ("label",)
    chosen = choose_columns(datasets.Features(features), "x", label_column="labels")
    assert (chosen.label, chosen.several) == (("labels",), True)


def test_labels_are_matched_by_name() -> None:
    values = torch.tensor([[True, False, True], [False, False, True]])
    found = align_sets(Labels(values, ["a", "b", "c"]), ["c", "a", "d"], "x")
    assert found.values.int().tolist() == [[1, 1, 0], [1, 0, 0]]
    with pytest.raises(DataError, match="'c'"):
        align_sets(Labels(values, ["a", "b", "c"]), ["a", "b"], "x")


def test_a_hold_out_goes_by_the_rarest_label() -> None:
    rows = [[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    values = torch.tensor(rows, dtype=torch.bool)
    assert strata(values).tolist() == [1, 0, 0, 3, 1]
    groups = ["p", "p", "q", "q", "r"]
    assert strata(values, groups).tolist() == [1, 1, 0, 0, 1]
