import json
from pathlib import Path

import pytest
import torch

from pcae_training.inventory import Inventory, count_rows, print_inventory
from pcae_training.tables import open_table
from tests.support.images import image_bytes


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A folder of photos as it comes from phones, cameras and file servers."""
    photos = tmp_path / "photos"
    files = {
        "train/bus/1.jpg": image_bytes(1, "JPEG"), "train/bus/2024/2.JPG": image_bytes(2, "JPEG"),
        "train/bus/.DS_Store": b"", "train/bus/notes.txt": b"none", "train/train/1.png":
        image_bytes(3), "train/train/2.heic": b"\0\0\0\x18ftypheic", "train/tram/1.pgm":
        b"P5\n1 1\n255\n0", "train/stray.png": image_bytes(4), "test/bus/1.jpg":
        image_bytes(1, "JPEG"), "test/train/3.png": image_bytes(5), "test/car/1.png":
        image_bytes(1, "PNG"),
    }  # fmt: skip
    for name, content in files.items():
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(content)
    (photos / "train" / "empty").mkdir()
    return photos


def test_the_table_of_a_messy_folder(messy: Path) -> None:
    inventory = open_table(str(messy), "train").inventory
    assert list(inventory.lines()) == [
        "data photos: 5 images of train, 5 classes (folders SPLIT/CLASS)",
        "  class  train  test",
        "  bus        2     1",
        "  car        0     1",
        "  empty      0     0",
        "  train      2     1",
        "  tram       1     0",
        "  all        5     3",
        "  left out: hidden and system files: 1 (.DS_Store 1)",
        "  left out: not images: 1 (.txt 1)",
        "  left out: images outside class folders: 1 (.png 1)",
        "  cannot be read: HEIC: 1 (.heic 1)",
        "  converted to PNG, not accepted by the server: PNM: 1 (.pgm 1)",
        "  note: no image in train of classes car, empty",
        "  note: images in train only of class tram",
        "  note: images in test only of class car",
        "  note: byte-identical images of train that are also in another split: 1, such as"
        f" {messy}/train/bus/1.jpg and {messy}/test/bus/1.jpg",
    ]
    written = json.loads(json.dumps(inventory.to_json()))
    assert written["images"]["train"] == {"bus": 2, "car": 0, "empty": 0, "train": 2, "tram": 1}
    assert written["left_out"]["not images"] == {".txt": 1}
    assert written["duplicates"]["images_also_in_another_split"] == 1


def test_many_classes_are_abbreviated() -> None:
    names = [f"c{i:03}" for i in range(1000)]
    labels = torch.repeat_interleave(torch.arange(1000))  # i images of class i
    inventory = count_rows("x", "train", names, labels)
    lines = list(inventory.lines())
    assert len(lines) < 40
    assert lines[2].split() == ["c000", "0"]
    assert "  … 970 classes with as many images or more" in lines
    assert lines[-1] == "  note: no image in train of class c000"


def test_without_splits_and_without_labels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(image_bytes())
    lines = list(open_table(str(tmp_path), "test").inventory.lines())
    assert lines[0].endswith("2 images of all, 2 classes (folders CLASS, one split)")
    assert "  note: there are no split folders: every split is all of these images" in lines
    assert any("copies of others in it: 1, such as" in line for line in lines)
    assert any("images that are in several classes: 1, such as" in line for line in lines)
    lines = list(count_rows("x", "train", [], torch.tensor([-1, -1])).lines())
    assert lines[2] == "  (no class)      2"


def test_only_the_first_process_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory = Inventory("x", "train", "rows", {"train": {"a": 1}})
    monkeypatch.setenv("RANK", "1")
    print_inventory(inventory)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    print_inventory(inventory)
    assert capsys.readouterr().err.startswith("data x: 1 images of train")
