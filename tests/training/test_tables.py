from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest
import torch

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.data import load
from pcae_training.source import DataError
from pcae_training.stream import load_stream
from pcae_training.tables import open_table
from tests.support.images import image_bytes


def fails(source: Path | str, **choice: Any) -> str:
    with pytest.raises(DataError) as raised:
        open_table(str(source), "train", **choice)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(3):
            (tmp_path / split / f"{i}.png").write_bytes(image_bytes(i))
    return tmp_path


def test_images_without_class_folders(flat: Path) -> None:
    assert "contains 3 images, but no class folders" in fails(flat)
    assert "(if train, test are classes: --layout classes)" in fails(flat)
    assert len(open_table(str(flat), "train", labelled=False)) == 3
    labelled = open_table(str(flat), "train", layout="classes")
    assert labelled.classes == ["test", "train"]
    (flat / "train" / "metadata.csv").write_text("file_name,label\n0.png,cat\n")
    assert fails(flat).endswith("; labels in metadata.csv are not read")


def test_images_in_the_folder_itself(flat: Path) -> None:
    assert "contains 3 images, but no class folders" in fails(flat / "train")
    assert len(open_table(str(flat / "train"), "any", labelled=False)) == 3


def test_one_class(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(image_bytes())
    assert "has only one class, 'photos'" in fails(tmp_path)


@pytest.mark.parametrize("labels", [["dog", "cat", "dog"], [2, 1, 2], [2.0, 1.0, 2.0]])
def test_rows_of_parquet(labels: list[Any], tmp_path: Path) -> None:
    rows = {"image": [image_bytes(i) for i in range(3)], "label": labels}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    table = open_table(str(tmp_path / "a.parquet"), "train")
    assert table.labels.tolist() == [1, 0, 1]
    assert table.classes == (["cat", "dog"] if isinstance(labels[0], str) else ["1", "2"])
    assert table.body(1) == image_bytes(1)
    assert table.place(1) == "bytes in the table"


def test_class_folders_can_be_streamed(tmp_path: Path) -> None:
    for name, level in (("a", 0), ("b", 9)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "train" / name / f"{i}.png").write_bytes(image_bytes(level + i))
    stream = load_stream(
        str(tmp_path), "train", Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3), epoch_size=6
    )
    assert stream.classes == ["a", "b"]
    ((pixels, labels),) = stream.epoch(0, 0, [slice(0, 6)], torch.device("cpu"))
    levels = pixels[:, 0, 0, 0]
    assert sorted(levels.tolist()) == [0, 1, 2, 9, 10, 11]
    assert labels.tolist() == [int(level >= 9) for level in levels]


@pytest.mark.parametrize("name", ["./photos", "a/b/c", "/none", "~/x", "photos/", "..", "[a]"])
def test_a_path_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)  # would raise a TypeError
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert fails(name).endswith("there is no such folder or file")


def test_paths_with_any_characters_are_read(tmp_path: Path) -> None:
    for name in ("[a]", "b\nc"):
        folder = tmp_path / "*" / "train" / name
        folder.mkdir(parents=True)
        (folder / "?.png").write_bytes(image_bytes(7))
    images = load(str(tmp_path / "*"), "train", Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3))
    assert [int(images[i][0][0, 0, 0]) for i in range(2)] == [7, 7]
    assert images.classes == ["[a]", "b\nc"]
