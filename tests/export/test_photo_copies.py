"""Copies among the photographs of --classes-from: by their pixels, in one class and in several."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from pcae_export.photo_copies import drop_copies
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_training.data import LabelledImages, load
from tests.export.test_photo_classes import write_photos

TWO = {"blue": (30, 60, 220), "red": (220, 50, 40)}
PREPROCESS = Preprocess(16, 16, (0.5,) * 3, (0.5,) * 3)


def opened(root: Path) -> LabelledImages:
    return load(str(root), "train", PREPROCESS, labelled=True)


def test_different_photographs_stay_as_they_are(tmp_path: Path) -> None:
    photos = opened(write_photos(tmp_path / "photos", 4, TWO))
    kept, notes = drop_copies(photos)
    assert (kept, notes) == (photos, [])


def test_a_photograph_is_used_once_in_its_class(tmp_path: Path) -> None:
    """Also one that was saved in another format, or in the other's reading order."""
    root = write_photos(tmp_path / "photos", 4, TWO)
    shutil.copy(root / "red" / "0.png", root / "red" / "again.png")
    Image.open(root / "red" / "1.png").save(root / "red" / "other.bmp")
    kept, [note] = drop_copies(opened(root))
    assert kept.labels.bincount().tolist() == [4, 4]
    assert note.startswith("2 of 10 photographs of photos/train are left out: each is a copy of")
    assert f"{root}/red/0.png and {root}/red/again.png" in note


def test_a_photograph_in_two_classes_is_left_out(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", 4, TWO)
    for place in ("blue/lost.png", "blue/twice.png"):
        shutil.copy(root / "red" / "0.png", root / place)
    kept, [note] = drop_copies(opened(root))
    assert kept.labels.bincount().tolist() == [4, 3]
    assert note == (
        "3 of 10 photographs of photos/train are left out: they are copies of each other in"
        f" different classes, such as {root}/blue/lost.png and {root}/red/0.png; correct their"
        " classes"
    )


def test_classes_that_are_copies_of_each_other_are_refused(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", 4, TWO)
    shutil.rmtree(root / "blue")
    shutil.copytree(root / "red", root / "blue")
    with pytest.raises(PcaeError, match="has no photograph that is in one class only"):
        drop_copies(opened(root))
