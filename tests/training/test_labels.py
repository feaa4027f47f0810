import unicodedata
from typing import Any

import pytest
import torch

from pcae_training.columns import Columns
from pcae_training.labels import Labels, align, encode_integers, encode_names, name_codes
from pcae_training.source import DataError


def integers(values: list[int], classes: list[str] | None = None) -> tuple[list[int], list[str]]:
    labels = encode_integers(torch.tensor(values), "x", classes)
    return labels.values.tolist(), labels.classes


@pytest.mark.parametrize(
    ("values", "classes", "expected"),
    [
        ([1, 3, 2, 1], None, ([0, 2, 1, 0], ["1", "2", "3"])),  # from 1
        ([-5, 700, -5], None, ([0, 1, 0], ["-5", "700"])),
        ([10, 9, 10], None, ([1, 0, 1], ["9", "10"])),  # as numbers, not as text
        ([0, 1, 1], ["cat", "dog", "eel"], ([0, 1, 1], ["cat", "dog", "eel"])),
        ([1, 2, 1], ["1=cat", "2=dog"], ([0, 1, 0], ["cat", "dog"])),
        ([2, 2], ["1=cat", "2=a=b"], ([1, 1], ["cat", "a=b"])),
        ([1, 3], ["1", "2", "3"], ([0, 2], ["1", "2", "3"])),  # the names of an earlier run
    ],
)
def test_integers(values: list[int], classes: Any, expected: Any) -> None:
    assert integers(values, classes) == expected


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        ([0, 900_000_000, 1], None, "has 3 different labels in 3 rows; name the classes with"),
        ([0, 0], None, "has only one class, '0'"),
        ([0, 2], ["u", "v"], "row 1: label 2 is not one of the 2 classes, 0 to 1"),
        ([1, 2], ["u", "v", "w"], "labels from 1 to 2; state which is which, as in --classes 1=u"),
        ([1, 2], ["1=u", "3=v"], "row 1: --classes has no name for label 2"),
        ([1, 2], ["1=u", "2=u"], "has two classes named 'u'"),
    ],
)
def test_integers_that_are_not_clear(values: list[int], classes: Any, message: str) -> None:
    with pytest.raises(DataError) as raised:
        integers(values, classes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_names_have_the_order_asked_for() -> None:
    names = ["dog", "cat", "dog"]
    assert encode_names(names, ["cat", "dog"], "x").values.tolist() == [1, 0, 1]
    other = encode_names(names, ["cat", "dog"], "x", ["eel", "dog", "cat"])
    assert (other.values.tolist(), other.classes) == ([1, 2, 1], ["eel", "dog", "cat"])
    with pytest.raises(DataError, match=r"not among the 2 expected \('cat', 'eel'\): 'dog'"):
        encode_names(names, ["cat", "dog"], "x", ["cat", "eel"])


def test_a_model_numbers_the_classes() -> None:
    labels = Labels(torch.tensor([0, 1, 1]), ["ant", "bee", "cow"])
    found = align(labels, ["bee", "ant"], "x")  # no image is a cow
    assert (found.values.tolist(), found.classes) == ([1, 0, 0], ["bee", "ant"])
    decomposed = [unicodedata.normalize("NFD", "été"), "b"]
    composed = Labels(torch.tensor([0, 1]), ["b", "été"])
    assert align(composed, decomposed, "x").values.tolist() == [1, 0]
    twice = ["crane", "crane"]
    assert align(Labels(torch.tensor([1]), twice), twice, "x").values.tolist() == [1]
    with pytest.raises(DataError, match="two classes named 'crane'"):
        align(Labels(torch.tensor([0]), ["crane", "b"]), ["crane", "b", "crane"], "x")


@pytest.mark.parametrize(
    ("columns", "classes", "codes"),
    [
        (Columns("a", ("l",)), ["u", "v"], {0: 0, 1: 1}),
        (Columns("a", ("l",)), ["5=u", "7=v"], {5: 0, 7: 1}),
        (Columns("a", ("l",), words=True), ["v", "u"], {"v": 0, "u": 1}),
        (Columns("a", ("l",), ("u", "v")), None, {0: 0, 1: 1}),
        (Columns("a", ("l",), ("u", "v")), ["v", "u"], {0: 1, 1: 0}),
    ],
)
def test_codes_of_a_stream(columns: Columns, classes: Any, codes: Any) -> None:
    assert name_codes(columns, "x", classes)[0] == codes


@pytest.mark.parametrize("words", [True, False])
def test_a_stream_must_be_given_its_classes(words: bool) -> None:
    with pytest.raises(DataError, match="as labels; name the classes with --classes"):
        name_codes(Columns("a", ("l",), words=words), "x", None)
