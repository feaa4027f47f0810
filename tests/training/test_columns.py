from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Features, Image, Value  # type: ignore[import-untyped]

from pcae_training.columns import Columns, check_classes, choose_columns
from pcae_training.source import DataError

PETS = ClassLabel(names=["cat", "dog"])
INT = Value("int64")


def fails(columns: dict[str, Any], **wanted: Any) -> str:
    with pytest.raises(DataError) as raised:
        choose_columns(Features(columns), "x", **wanted)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("columns", "asked", "found"),
    [
        ({"photo": Image(), "kind": PETS, "label": INT}, None, ("kind",)),
        ({"png": Image(), "cls": INT, "__key__": Value("string")}, None, ("cls",)),
        ({"jpg": Image(), "json": {"label": INT, "width": INT}}, None, ("json", "label")),
        ({"a": Image(), "json": {"label": INT, "id": INT}}, "json.id", ("json", "id")),
        ({"a": Image(), "b.c": INT}, "b.c", ("b.c",)),  # a column's own name, and no field
        ({"a": Image(), "fine": PETS, "coarse": PETS}, "coarse", ("coarse",)),
    ],
)
def test_the_label_column(columns: dict[str, Any], asked: str | None, found: Any) -> None:
    assert choose_columns(Features(columns), "x", label_column=asked).label == found


def test_nothing_need_be_said_of_one_image_and_one_label() -> None:
    found = choose_columns(Features({"image": Image(), "label": PETS}), "x")
    assert found == Columns("image", ("label",), ("cat", "dog"))


def test_the_image_column_that_is_asked_for() -> None:
    features = Features({"photo": Image(), "mask": Image(), "label": PETS})
    assert choose_columns(features, "x", image_column="mask").image == "mask"


def test_words_are_labels() -> None:
    features = Features({"a": Image(), "label": Value("string")})
    assert choose_columns(features, "x") == Columns("a", ("label",), (), words=True)
    named = Features({"a": Image(), "species": Value("large_string")})
    assert choose_columns(named, "x", label_column="species").words


@pytest.mark.parametrize("kind", [Value("binary"), {"bytes": Value("binary"), "path": INT}])
def test_bytes_are_images_if_nothing_else_is(kind: Any) -> None:
    assert choose_columns(Features({"jpg": kind, "label": INT}), "x").image == "jpg"
    both = Features({"thumbnail": kind, "photo": Image(), "label": INT})
    assert choose_columns(both, "x").image == "photo"
    assert choose_columns(both, "x", image_column="thumbnail").image == "thumbnail"


def test_unlabelled_needs_an_image_alone() -> None:
    assert choose_columns(Features({"a": Image()}), "x", labelled=False) == Columns("a")
    labelled = Features({"a": Image(), "one": PETS, "two": PETS})
    assert choose_columns(labelled, "x", labelled=False) == Columns("a")


def test_what_cannot_be_chosen() -> None:
    assert fails({"label": PETS}) == "x has no image column: its columns are label (ClassLabel)"
    assert fails({"a": Image(), "b": Image(), "label": PETS}) == (
        "x has 2 image columns, a, b; choose one with --image-column"
    )
    assert fails({"a": Image(), "label": PETS}, image_column="b") == (
        "x has no image column 'b': its columns are a (Image), label (ClassLabel)"
    )
    assert fails({"a": Image(), "name": Value("string")}) == (
        "x has no label column; name one with --label-column: its columns are a (Image),"
        " name (string)"
    )
    assert fails({"a": Image(), "width": INT}).startswith("x has no label column")
    assert fails({"a": Image(), "fine": PETS, "coarse": PETS}) == (
        "x has 2 label columns, fine, coarse; choose one with --label-column"
    )
    for asked in ("nothing", "json.label.deeper", "json"):
        assert fails(
            {"a": Image(), "name": Value("string"), "json": {"name": Value("string")}},
            label_column=asked,
        ).startswith(
            f"x has no column {asked!r} of class labels, words or integers: its columns are"
        )
    with pytest.raises(DataError, match="x has no image column: its columns are not known"):
        choose_columns(None, "x")


def test_classes_that_teach_nothing() -> None:
    with pytest.raises(DataError, match="x has only one class, 'cat': at least two are needed"):
        check_classes(["cat"], "x")
    with pytest.raises(DataError, match="x has two classes named 'u'; give each a unique name"):
        check_classes(["u", "v", "u"], "x")


def test_values() -> None:
    assert Columns("a", ("cls",)).value({"cls": 3}) == 3
    assert Columns("a", ("json", "label")).value({"json": {"label": 4}}) == 4
    assert Columns("a", ("json", "label")).value({"json": {"label": None}}) == -1
    assert Columns("a", ("json", "label")).value({"json": None}) == -1
    assert Columns("a").value({"cls": 3}) == -1
    assert Columns("a", ("label",)).value({"label": 2.0}) == 2
    assert Columns("a", ("label",)).value({"label": float("nan")}) == -1
    words = Columns("a", ("label",), words=True)
    assert [words.value({"label": cell}) for cell in ("cat", "", None)] == ["cat", -1, -1]
    for cell in (0.5, float("inf"), 1e30, 2**63):
        with pytest.raises(DataError, match=r"label .* in column label is not an integer of 64"):
            Columns("a", ("label",)).value({"label": cell})


@pytest.mark.parametrize("prefix", ["", "file://"])  # as datasets names what is not local
def test_bodies(prefix: str, tmp_path: Path) -> None:
    columns = Columns("a")
    file = tmp_path / "some"
    file.write_bytes(b"abc")
    assert columns.body({"a": {"bytes": b"de", "path": "nowhere"}}) == b"de"
    assert columns.body({"a": {"bytes": None, "path": f"{prefix}{file}"}}) == b"abc"
    for cell in (None, {"bytes": None, "path": None}):
        with pytest.raises(OSError, match="the row has no image"):
            columns.body({"a": cell})
    with pytest.raises(FileNotFoundError):
        columns.body({"a": {"bytes": None, "path": f"{prefix}{tmp_path}/nowhere"}})
