"""Layouts of folders as people bring them, and what is read of each."""

import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcae_training.class_folders import ClassFolders, list_class_folders, split_name
from pcae_training.source import DataError
from tests.support.images import image_bytes

PNG = image_bytes()


def write(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    return root


def listed(root: Path, layout: Any = "auto") -> ClassFolders:
    found = list_class_folders(root, layout)
    assert found is not None
    return found


def counts(root: Path, split: str, layout: Any = "auto") -> dict[str, int]:
    return dict(Counter(listed(root, layout).find(split).names))


def fails(root: Path, split: str = "train", layout: Any = "auto") -> str:
    with pytest.raises(DataError) as raised:
        listed(root, layout).find(split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        *[(name, "train") for name in ("train", "Train", "TRAINING", "training_set", "train-data")],
        *[(name, "validation") for name in ("val", "Valid", "VALIDATION", "dev", "val_images")],
        *[(name, "test") for name in ("test", "Testing", "EVAL", "test set", "testset")],
        ("holdout", "holdout"),
        *[(name, None) for name in ("trains", "crash-test", "test1", "training shoes", "bus", "")],
    ],
)
def test_names_of_splits(folder: str, split: str | None) -> None:
    assert split_name(folder) == split


@pytest.mark.parametrize("classes", [("bus", "train", "car"), ("exam", "test"), ("dev", "test")])
def test_a_class_may_be_named_as_a_split(classes: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path, *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in classes for i in "ab"))
    for split in ("train", "test"):
        assert counts(tmp_path, split) == dict.fromkeys(classes, 2)
        files = listed(tmp_path).find(split).files
        assert {file.parts[0] for file in files} == {split}


def test_a_class_may_be_named_as_a_split_without_splits(tmp_path: Path) -> None:
    write(tmp_path, "bus/1.png", "train/1.png", "train/2.png", "test/1.png")
    for split in ("train", "test", "whatever"):
        assert counts(tmp_path, split) == {"bus": 1, "test": 1, "train": 2}


def test_folders_that_may_be_no_classes_are_named(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", "cat/1.png", "dog/1.png", "test/1.png")
    assert listed(plain).notes == [
        "folders named as splits count as classes: test; move them elsewhere if they are none"
    ]
    foreign = write(tmp_path / "a", *(f"{s}/{c}/1.png" for s in ("Lernen", "Prüfen") for c in "xy"))
    [note] = listed(foreign).notes
    assert note.startswith("all class folders contain the same folders (x, y); if these are the")
    assert counts(foreign, "Lernen", "splits") == {"x": 1, "y": 1}
    assert not listed(write(tmp_path / "b", "cat/x/1.png", "dog/y/1.png", "dog/2.png")).notes


def test_file_names_and_folders_above_mean_nothing(tmp_path: Path) -> None:
    root = tmp_path / "test" / "train"
    write(root, "cat/train.png", "cat/my_test_3.png", "dog/eval.png", "dog/1/test/2.png")
    assert counts(root, "train") == counts(root, "test") == {"cat": 2, "dog": 2}


@pytest.mark.parametrize("split", ["train/", ""])
def test_what_lies_deeper_belongs_to_the_class(split: str, tmp_path: Path) -> None:
    write(tmp_path, *(f"{split}{c}/{y}/{y}/1.png" for c in ("cat", "dog") for y in ("1", "2")))
    write(tmp_path, f"{split}cat/9.png")
    assert counts(tmp_path, "train") == {"cat": 3, "dog": 2}


@pytest.mark.parametrize(
    ("folder", "asked"),
    [("Train", "train"), ("training_set", "train"), ("val", "validation"), ("valid", "val"),
     ("Testing", "test"), ("test", "eval")],
)  # fmt: skip
def test_splits_answer_to_their_usual_names(folder: str, asked: str, tmp_path: Path) -> None:
    write(tmp_path, f"{folder}/cat/1.png", f"{folder}/dog/1.png")
    assert listed(tmp_path).find(asked).folder == folder
    assert listed(tmp_path).find(folder).folder == folder


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "val/cat/1.png")
    assert "has no split 'test'; its splits are train, val; choose one" in fails(tmp_path, "test")


@pytest.mark.parametrize("split", ["train[:10%]", "train+test"])
@pytest.mark.parametrize("above", ["", "train/"])
def test_slices_are_refused(split: str, above: str, tmp_path: Path) -> None:
    write(tmp_path, f"{above}cat/1.png", f"{above}dog/1.png")
    assert f"no slices or sums of splits, such as '{split}'" in fails(tmp_path, split)


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "Training/cat/1.png", "val/cat/1.png", "dev/cat/1.png")
    assert "2 folders for the split 'train': Training, train; rename" in fails(tmp_path)
    assert "2 folders for the split 'validation': dev, val" in fails(tmp_path, "validation")
    assert listed(tmp_path).find("val").folder == "val"


def test_splits_next_to_other_folders_must_be_stated(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "more/1/1.png")
    assert "folders named as splits (test, train)" in fails(tmp_path)
    assert "next to others (more); state which they are with --layout" in fails(tmp_path)
    assert counts(tmp_path, "train", "splits") == {"cat": 1, "dog": 1}
    assert counts(tmp_path, "more", "splits") == {"1": 1}
    assert counts(tmp_path, "any", "classes") == {"more": 1, "test": 1, "train": 2}


def test_folders_without_images_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "1.xml").write_text("<a/>")
    found = listed(tmp_path)
    assert list(found.splits) == ["train", "test"]
    assert found.left_out == {("not images", ".xml"): 1}


def test_classes_are_those_of_all_splits_and_sorted_as_torchvision_does(tmp_path: Path) -> None:
    write(tmp_path, "train/b/1.png", "train/10/1.png", "train/2/1.png", "test/B/1.png", "test/é/1")
    (tmp_path / "train" / "empty").mkdir()
    found = listed(tmp_path)
    for split in ("train", "test"):
        assert found.classes(found.find(split)) == ["10", "2", "B", "b", "empty", "é"]


def test_links_are_followed_and_cycles_are_not(tmp_path: Path) -> None:
    store = write(tmp_path / "store", "1.png", "2.png")
    root = write(tmp_path / "photos", "cat/1.png", "dog/1.png")
    (root / "owl").symlink_to(store)
    (root / "cat" / "2.png").symlink_to(store / "1.png")
    (root / "cat" / "again").symlink_to(root)
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "dog" / "self").symlink_to(root / "dog" / "self")
    os.mkfifo(root / "dog" / "pipe.png")
    assert counts(root, "train") == {"cat": 2, "dog": 1, "owl": 2}
    assert listed(root).left_out == {
        ("links to a folder above", ""): 1,
        ("broken links", ".png"): 1,
        ("broken links", ""): 1,
        ("not regular files", ".png"): 1,
    }


def test_hidden_and_system_files_are_counted(tmp_path: Path) -> None:
    names = (".DS_Store", "._1.png", "Thumbs.db", "desktop.ini", "@eaDir/1.png", "__MACOSX/x.png")
    write(tmp_path, "cat/1.png", "dog/1.png", *(f"cat/{name}" for name in names))
    write(tmp_path, ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png")
    assert counts(tmp_path, "train") == {"cat": 1, "dog": 1}
    hidden = {k: n for (r, k), n in listed(tmp_path).left_out.items() if "system" in r}
    assert sum(hidden.values()) == 8


def test_images_outside_class_folders_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/1.png", "train/stray.png", "root.png")
    found = listed(tmp_path)
    assert [entry.parts for entry in found.find("train").unclassed] == [("train", "stray.png")]
    assert found.left_out == {("images outside the split folders", ".png"): 1}


ODD = [
    "a b",
    "-x",
    "[1-9]",
    "*",
    "?",
    "a,b",
    "a=b",
    "a\nb",
    "#",
    "%41",
    "'\"",
    "~",
    "$HOME",
    "日本",
]


@pytest.mark.parametrize("name", ODD)
def test_any_characters_are_names(name: str, tmp_path: Path) -> None:
    root = write(tmp_path / name, f"{name}/{name}/{name}.png", "other/1.png")
    assert counts(root, "train") == {name: 1, "other": 1}


def test_bytes_that_are_not_utf_8_are_fine_in_files_and_refused_in_classes(tmp_path: Path) -> None:
    write(tmp_path, "dog/1.png", os.fsdecode(b"cat/\xe9t\xe9/\xff.png"))
    assert counts(tmp_path, "train") == {"cat": 1, "dog": 1}
    write(tmp_path, os.fsdecode(b"\xe9t\xe9/1.png"))
    assert r"\udce9t\udce9 is not valid UTF-8; rename it" in fails(tmp_path)


def test_composed_and_decomposed_names_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path, f"train/{composed}/1.png", f"test/{decomposed}/1.png", "train/tea/1.png")
    assert counts(tmp_path, "test") == {composed: 1}
    assert "composed form: café" in listed(tmp_path).notes[0]


def test_classes_first_and_splits_below_are_noted(tmp_path: Path) -> None:
    write(tmp_path, "cat/train/1.png", "cat/test/1.png", "dog/train/1.png")
    assert counts(tmp_path, "train") == {"cat": 2, "dog": 1}
    assert "folders named as splits lie below the classes (cat/test)" in listed(tmp_path).notes[0]


def test_other_sources_are_left_to_datasets(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    assert list_class_folders(tmp_path) is None
    write(tmp_path, "cat/1.png")
    assert "contains images and parquet files; name the files" in fails(tmp_path)
    assert counts(tmp_path, "train", "classes") == {"cat": 1}


def test_a_folder_without_images(tmp_path: Path) -> None:
    assert fails(tmp_path).endswith("contains no images")
    (tmp_path / "notes.txt").write_text("none yet")
    assert fails(tmp_path).endswith("contains no images (not images: 1)")


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "cat/1.png")

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert fails(tmp_path) == f"cannot read {tmp_path}: Permission denied"


NAMES = st.sampled_from(["train", "test", "val", "cat", "dog", "Train", "eval", "2023"])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(paths=st.sets(st.lists(NAMES, min_size=1, max_size=4).map(tuple), min_size=1, max_size=12))
def test_no_image_vanishes(paths: set[tuple[str, ...]], tmp_path_factory: Any) -> None:
    root = tmp_path_factory.mktemp("tree")
    for number, parts in enumerate(sorted(paths)):
        write(root, "/".join((*parts, f"{number}.png")))
    for layout in ("auto", "splits", "classes"):
        try:
            found = listed(root, layout)
        except DataError:
            assert layout == "auto"
            continue
        kept = [f for s in found.splits.values() for f in s.files + s.unclassed]
        assert len({file.parts for file in kept}) == len(kept)
        assert len(kept) + sum(found.left_out.values()) == len(paths)
        for split in found.splits.values():
            level = 1 if split.folder else 0
            assert all(f.parts[level] == n for f, n in zip(split.files, split.names, strict=True))
            assert split.names == sorted(split.names)
