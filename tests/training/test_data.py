import io
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pcae_serve.preprocess import Preprocess
from pcae_training import data
from pcae_training.data import DataError, LabelledImages, hold_out, load

PREPROCESS = Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3)
LARGER = Preprocess(10, 12, (0.5,) * 3, (0.5,) * 3)
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and torch


def png(level: int, size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (level, 0, 255 - level)).save(stream, "PNG")
    return stream.getvalue()


def table(count: int = 6) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
    )
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def levels(images: LabelledImages) -> list[int]:
    return [int(images[i][0][0, 0, 0]) for i in range(len(images))]


def test_class_folders(class_folders: Any) -> None:
    images = load(str(class_folders(4)), "train", PREPROCESS)
    assert images.classes == ["bright", "dark"]
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    pixels, label = images[0]
    assert (pixels.shape, pixels.dtype, label) == ((3, 8, 8), torch.uint8, 0)


def test_folder_of_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "data"  # beside the cache
    folder.mkdir()
    table(6).to_parquet(folder / "train-00000-of-00001.parquet")
    table(4).to_parquet(folder / "test-00000-of-00001.parquet")
    assert levels(load(str(folder), "train", PREPROCESS)) == [0, 1, 2, 3, 4, 5]
    assert load(str(folder), "test", PREPROCESS).labels.tolist() == [0, 1, 0, 1]


def test_one_parquet_file_is_whatever_split_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "some.parquet"
    table().to_parquet(file)
    for split in ("train", "test"):
        images = load(str(file), split, PREPROCESS)
        assert levels(images) == [0, 1, 2, 3, 4, 5]
        assert images.classes == ["even", "odd"]


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return table()

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert len(load("zalando-datasets/fashion_mnist", "test", PREPROCESS)) == 6
    assert asked == [("zalando-datasets/fashion_mnist", "test")]


def fails(source: Any, split: str = "train") -> str:
    with pytest.raises(DataError) as raised:
        load(str(source), split, PREPROCESS)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_offline_hub_name_is_one_line() -> None:
    assert fails("nobody/nothing").startswith("cannot read split 'train' of data set 'nobody/noth")


def test_wrong_paths(tmp_path: Path) -> None:
    assert "cannot read" in fails(tmp_path / "nowhere")
    assert "cannot read" in fails(tmp_path / "nowhere.parquet")
    (tmp_path / "empty").mkdir()
    assert "cannot read" in fails(tmp_path / "empty")
    (tmp_path / "text.parquet").write_text("no parquet at all")
    assert "cannot read" in fails(tmp_path / "text.parquet")


def test_missing_split(class_folders: Any) -> None:
    assert "validation" in fails(class_folders(2), "validation")


def test_an_error_without_words_still_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(datasets, "load_dataset", silent)
    assert fails("x").endswith("OSError")


def test_no_label_column(tmp_path: Path) -> None:
    table().remove_columns("label").to_parquet(tmp_path / "a.parquet")
    message = fails(tmp_path / "a.parquet")
    assert (
        "needs one image and one class-label column, but its columns are image (Image)" in message
    )


def test_images_without_a_label() -> None:
    rows = table().map(lambda row: row | {"label": -1})
    with pytest.raises(DataError, match="x/test: 6 of its 6 images have no label"):
        LabelledImages(rows, PREPROCESS, "x/test")


def test_no_rows() -> None:
    with pytest.raises(DataError, match="x has no rows"):
        LabelledImages(table(1).select([]), PREPROCESS, "x")


def _all(images: LabelledImages, workers: int) -> None:
    list(images.batches(range(len(images)), 2, workers))


@FORKS
@pytest.mark.parametrize("damage", [b"", b"no image", png(0)[:50]], ids=["empty", "text", "cut"])
@pytest.mark.parametrize("workers", [None, 0, 1])
def test_a_damaged_image_is_named(damage: bytes, workers: int | None, class_folders: Any) -> None:
    root = class_folders(3)
    victim = root / "train" / "dark" / "001.png"
    victim.write_bytes(damage)
    images = load(str(root), "train", PREPROCESS)
    message = rf"^images/train, row 4 \(.*{victim.name}\): "
    read = images.in_memory if workers is None else partial(_all, images, workers)
    with pytest.raises(DataError, match=message) as raised:
        read()
    assert "\n" not in str(raised.value)


def test_a_vanished_image_is_named(class_folders: Any) -> None:
    root = class_folders(3)
    images = load(str(root), "train", PREPROCESS)
    (root / "train" / "bright" / "002.png").unlink()
    with pytest.raises(DataError, match=r"row 2: .*No such file"):
        images[2]


@pytest.mark.parametrize("preprocess", [PREPROCESS, LARGER])
def test_pixels_are_the_servers(preprocess: Preprocess, class_folders: Any) -> None:
    images = load(str(class_folders(3, size=11)), "train", preprocess)
    for i in range(len(images)):
        served = preprocess(images.body(i))
        np.testing.assert_array_equal(images[i][0].permute(1, 2, 0).numpy(), served)


@FORKS
@pytest.mark.parametrize("workers", [0, 1])
def test_lazy_and_in_memory_agree(workers: int, class_folders: Any) -> None:
    root = str(class_folders(4, size=11))
    lazy, held = load(root, "train", LARGER), load(root, "train", LARGER).in_memory()
    order = [5, 0, 7, 3, 2]
    for one, other in zip(lazy.batches(order, 2, workers), held.batches(order, 2), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert one[1].dtype == torch.int64
    assert torch.equal(lazy[6][0], held[6][0])


def test_what_is_too_large_stays_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", 6 * 3 * 8 * 8 - 1)
    images = LabelledImages(table(), PREPROCESS, "x").in_memory()
    assert images._pixels is None
    assert levels(images) == [0, 1, 2, 3, 4, 5]


def test_hold_out_is_disjoint_whole_and_reproducible() -> None:
    images = LabelledImages(table(40), PREPROCESS, "x")
    split = hold_out(images, 15, seed=3)
    assert len(split.holdout) == 15
    assert sorted(split.train + split.holdout) == list(range(40))
    assert hold_out(images, 15, seed=3) == split
    assert hold_out(images, 15, seed=4) != split


@pytest.mark.parametrize("count", [0, 6, 7])
def test_hold_out_leaves_something(count: int) -> None:
    with pytest.raises(DataError, match=f"cannot hold out {count} of the 6 images of x"):
        hold_out(LabelledImages(table(), PREPROCESS, "x"), count)
