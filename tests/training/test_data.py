import io
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training import data
from pcae_training.data import DataError, LabelledImages, load
from pcae_training.tables import row_table

PREPROCESS = Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3)
LARGER = Preprocess(10, 12, (0.5,) * 3, (0.5,) * 3)
CPU = torch.device("cpu")
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


def of(
    rows: datasets.Dataset, name: str = "x", max_unreadable: float = 0.01, **choice: Any
) -> LabelledImages:
    return LabelledImages(row_table(rows, name, **choice), PREPROCESS, max_unreadable)


def run(
    images: LabelledImages, slices: list[slice], *, seed: int = 0, epoch: int = 0, workers: int = 0
) -> list[tuple[Tensor, Tensor]]:
    return list(images.epoch(seed, epoch, slices, CPU, workers))


def drawn(images: LabelledImages, slices: list[slice], **key: int) -> list[int]:
    """Which images an epoch gives: `png` paints the row's number."""
    return [
        level for pixels, _ in run(images, slices, **key) for level in pixels[:, 0, 0, 0].tolist()
    ]


def damaged(bad: set[int], count: int = 6) -> datasets.Dataset:
    rows = table(count).cast_column("image", datasets.Image(decode=False))
    cut = [{"bytes": png(i)[: 50 if i in bad else None], "path": None} for i in range(count)]
    rows = rows.remove_columns("image").add_column("image", cut)
    return rows.cast_column("image", datasets.Image())


def levels(images: LabelledImages) -> list[int]:
    return [int(images[i][0][0, 0, 0]) for i in range(len(images))]


def test_class_folders(class_folders: Any) -> None:
    images = load(str(class_folders(4)), "train", PREPROCESS)
    assert images.classes == ["bright", "dark"]
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    pixels, label = images[0]
    assert (pixels.shape, pixels.dtype, int(label)) == ((3, 8, 8), torch.uint8, 0)


def test_one_parquet_file(tmp_path: Path) -> None:
    file = tmp_path / "some.parquet"
    table().to_parquet(file)
    images = load(str(file), "test", PREPROCESS)
    assert levels(images) == [0, 1, 2, 3, 4, 5]
    assert images.classes == ["even", "odd"]
    assert images.name == "some.parquet/test"


def test_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^cannot read split 'train' of data set .*nowhere'"):
        load(str(tmp_path / "nowhere"), "train", PREPROCESS)


def test_unlabelled(tmp_path: Path) -> None:
    table().remove_columns("label").to_parquet(tmp_path / "a.parquet")
    images = load(str(tmp_path / "a.parquet"), "train", PREPROCESS, labelled=False)
    assert images.classes == []
    assert images.labels.tolist() == [-1] * 6
    assert [labels.tolist() for _, labels in run(images, [slice(0, 2)])] == [[-1, -1]]
    with pytest.raises(DataError, match="has no label column"):
        load(str(tmp_path / "a.parquet"), "train", PREPROCESS)


def numbered(labels: list[int | None]) -> datasets.Dataset:
    """Labels that are integers without names."""
    rows = table(len(labels)).remove_columns("label")
    return rows.add_column("label", pa.array(labels, pa.int64()))


def test_numbers_name_themselves() -> None:
    images = of(numbered([2, 0, 3, 0]))
    assert images.labels.tolist() == [1, 0, 2, 0]
    assert images.classes == ["0", "2", "3"]


def test_numbers_with_names() -> None:
    rows = numbered([2, 0, 1])
    assert of(rows, classes=["u", "v", "w"]).classes == ["u", "v", "w"]
    with pytest.raises(DataError) as raised:
        of(rows, classes=["u", "v"])
    assert str(raised.value) == "x, row 0: label 2 is not one of the 2 classes, 0 to 1"


def test_one_class_teaches_nothing() -> None:
    with pytest.raises(DataError, match="x has only one class, '0': at least two are needed"):
        of(numbered([0, 0, 0]))


def test_labels_in_json_shards(tmp_path: Path) -> None:
    rows = table(4).remove_columns("label").rename_column("image", "png")
    rows = rows.add_column("json", [{"label": i % 3, "id": i} for i in range(4)])
    assert of(rows).labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("nothing", [-1, None])
def test_images_without_a_label(nothing: int | None) -> None:
    with pytest.raises(DataError, match="x/test: 2 of its 3 images have no label"):
        of(numbered([nothing, 1, nothing]), name="x/test")


def test_no_rows() -> None:
    with pytest.raises(DataError, match="x has no rows"):
        of(table(1).select([]))


@FORKS
@pytest.mark.parametrize("damage", [b"", b"no image", png(0)[:50]], ids=["empty", "text", "cut"])
@pytest.mark.parametrize("workers", [None, 0, 1])
def test_a_damaged_image_is_named(damage: bytes, workers: int | None, class_folders: Any) -> None:
    root = class_folders(3)
    victim = root / "train" / "dark" / "001.png"
    victim.write_bytes(damage)
    images = load(str(root), "train", PREPROCESS)
    if workers is None:
        images.in_memory()
    with pytest.raises(DataError, match=rf"^images/train, row 4 \(.*{victim.name}\): ") as raised:
        list(images.batches(range(len(images)), 2, workers or 0))
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="row 4"):
        images[4]


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
    images = of(table()).in_memory()
    assert images._pixels is None
    assert levels(images) == [0, 1, 2, 3, 4, 5]


@pytest.fixture(params=["memory", "lazy"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to hold map-style data."""
    if request.param == "lazy":
        monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", 0)
    return str(request.param)


WHOLE = [slice(0, 4), slice(4, 8), slice(8, 10)]


def test_an_epoch_is_a_permutation(mode: str) -> None:
    images = of(table(10))
    batches = run(images, WHOLE)
    assert [(pixels.shape, pixels.dtype) for pixels, _ in batches] == [
        ((size, 3, 8, 8), torch.uint8) for size in (4, 4, 2)
    ]
    order = [level for pixels, _ in batches for level in pixels[:, 0, 0, 0].tolist()]
    assert sorted(order) == list(range(10))
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [level % 2 for level in order]
    assert (images._pixels is None) == (mode == "lazy")


@pytest.mark.usefixtures("mode")
def test_the_order_is_of_seed_and_epoch_alone() -> None:
    one, other = (of(table(10)) for _ in range(2))
    first = drawn(one, WHOLE, seed=3, epoch=1)
    torch.manual_seed(123)
    assert drawn(other, WHOLE, seed=3, epoch=1) == first
    assert drawn(one, WHOLE, seed=3, epoch=2) != first
    assert drawn(one, WHOLE, seed=4, epoch=1) != first
    assert drawn(one, WHOLE, seed=3, epoch=1) == first


@FORKS
@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_resumed_runs_take_slices_of_one_order(workers: int) -> None:
    images = of(table(10))
    order = drawn(images, [slice(0, 10)], epoch=1)
    halves = [drawn(images, part, epoch=1) for part in ([slice(0, 2), slice(4, 6)], [slice(2, 4)])]
    assert halves == [order[0:2] + order[4:6], order[2:4]]
    assert drawn(images, [slice(6, 9), slice(9, 10)], epoch=1, workers=workers) == order[6:]
    assert [len(labels) for _, labels in run(images, [slice(10, 10)])] == [0]


@FORKS
@pytest.mark.usefixtures("mode")
def test_an_epoch_draws_nothing_from_torch() -> None:
    images = of(table(10))
    state = torch.get_rng_state()
    run(images, WHOLE, workers=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("mode")
def test_pixels_of_an_epoch_are_the_images(class_folders: Any) -> None:
    images = load(str(class_folders(4, size=11)), "train", LARGER)
    expected = sorted(images[i][0].numpy().tobytes() for i in range(8))
    ((pixels, _),) = run(images, [slice(0, 8)])
    assert sorted(image.numpy().tobytes() for image in pixels) == expected


@pytest.mark.usefixtures("mode")
def test_a_subset_is_all_there_is() -> None:
    images = of(table(10))
    for whole in (images, images.in_memory()):
        fewer = whole.subset([7, 2, 4])
        assert (len(fewer), fewer.labels.tolist(), levels(fewer)) == (3, [1, 0, 0], [7, 2, 4])
        assert sorted(drawn(fewer, [slice(0, 3)])) == [2, 4, 7]
        assert levels(fewer.subset([2, 0])) == [4, 7]
    with pytest.raises(DataError, match="x: none of its 10 images remain"):
        images.subset([])


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("mode")
def test_the_next_readable_image_stands_in(workers: int) -> None:
    sound = drawn(of(table(10)), [slice(0, 10)])
    bad = {sound[place] for place in (0, 4, 5, 9)}  # after the last comes the first
    after = sound + sound
    expected = [next(i for i in after[place:] if i not in bad) for place in range(10)]
    images = of(damaged(bad, 10))
    slices = [slice(0, 3), slice(3, 6), slice(6, 10)]
    for _ in range(2):  # images that were skipped before are not counted again
        batches = run(images, slices, workers=workers)
        order = torch.cat([pixels[:, 0, 0, 0] for pixels, _ in batches])
        assert order.tolist() == expected
        assert torch.equal(torch.cat([labels for _, labels in batches]), order.long() % 2)
        assert images.unreadable == 4


@pytest.mark.usefixtures("mode")
def test_too_many_unreadable_images_end_the_run() -> None:
    images = of(damaged(set(range(11)), 40))
    message = (
        r"^x: 11 of 40 images cannot be read \(27.5%; --max-unreadable allows 1.0%\);"
        r" the first one: x, row \d+ \(bytes in the table\): "
    )
    with pytest.raises(DataError, match=message):
        run(images, [slice(0, 40)])
    patient = of(damaged(set(range(11)), 40), max_unreadable=0.3)
    run(patient, [slice(0, 40)])
    assert patient.unreadable == 11


@pytest.mark.usefixtures("mode")
def test_nothing_readable() -> None:
    images = of(damaged({0, 1, 2}, 3))
    with pytest.raises(
        DataError, match="x: 3 images in a row cannot be read; the first one: x, row "
    ):
        run(images, [slice(0, 3)])


@pytest.mark.usefixtures("mode")
def test_readable_leaves_the_others_out() -> None:
    images = of(damaged({1, 4}))
    fewer = images.readable()
    assert (images.unreadable, fewer.unreadable) == (2, 0)
    assert levels(fewer) == [0, 2, 3, 5]
    assert fewer.labels.tolist() == [0, 0, 1, 1]
    ((pixels, _),) = fewer.batches(range(4), 4)
    assert pixels[:, 0, 0, 0].tolist() == [0, 2, 3, 5]


def test_what_is_known_to_be_unreadable_stays_known_and_weighs_no_more() -> None:
    images = of(damaged(set(range(11)), 40), max_unreadable=0.3)
    fewer = images.in_memory().subset(range(38))
    run(fewer, [slice(0, 4)])  # 11 of these 38, not of the 4 that are seen
    assert fewer.unreadable == 11


def test_a_gpu_lends_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    assert data._room_bytes(torch.device("cuda")) == 500
    assert data._room_bytes(CPU) == data.MEMORY_LIMIT_BYTES


def test_classes_without_a_readable_image_are_named_and_suffixes_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "owl/1.JPG", "owl/2.jpg", "cat/3.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(9) if name.endswith("png") else b"damaged")
    images = load(str(tmp_path), "train", PREPROCESS, max_unreadable=0.9).in_memory()
    assert images.unreadable == 3
    printed = capsys.readouterr().err
    assert "3 of 6 images cannot be read and are skipped (.jpg 2, .gif 1); the first" in printed
    assert "/train: note: no image can be read of class owl\n" in printed
