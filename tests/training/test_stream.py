import io
import tarfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.columns import choose_columns
from pcae_training.data import DataError, load
from pcae_training.stream import ImageStream, Sample, load_stream

PREPROCESS = Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3)
CPU = torch.device("cpu")
PARITY = ["even", "odd"]


def png(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 255 - level)).save(stream, "PNG")
    return stream.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Any:
    """Write images 0, 1, 2, … to WebDataset shards of four; returns their pattern."""

    def make(count: int = 12, bad: Container[int] = (), json: bool = False) -> str:
        folder = tmp_path / "shards"
        folder.mkdir()
        for first in range(0, count, 4):
            with tarfile.open(folder / f"{first // 4:03}.tar", "w") as archive:
                for i in range(first, min(first + 4, count)):
                    add(archive, f"{i:03}.png", png(i)[: 50 if i in bad else None])
                    label = b'{"label": %d}' % (i % 2) if json else b"%d" % (i % 2)
                    add(archive, f"{i:03}.{'json' if json else 'cls'}", label)
        return str(folder / "*.tar")

    return make


def open_shards(pattern: str, **options: Any) -> ImageStream:
    given: dict[str, Any] = {"epoch_size": 12, "buffer_size": 5, "classes": PARITY} | options
    return load_stream(pattern, "train", PREPROCESS, **given)


def run(stream: ImageStream, slices: list[slice], **key: int) -> list[tuple[Tensor, Tensor]]:
    given = {"seed": 0, "epoch": 0, "workers": 0} | key
    return list(stream.epoch(given["seed"], given["epoch"], slices, CPU, given["workers"]))


def drawn(stream: ImageStream, slices: list[slice], **key: int) -> list[int]:
    """Which images an epoch gives: `png` paints the image's number."""
    batches = run(stream, slices, **key)
    return [level for pixels, _ in batches for level in pixels[:, 0, 0, 0].tolist()]


WHOLE = [slice(0, 5), slice(5, 10), slice(10, 12)]


@pytest.mark.parametrize("json", [False, True])
def test_an_epoch_of_tar_shards(json: bool, shards: Any) -> None:
    stream = open_shards(shards(json=json))
    assert (len(stream), stream.classes, stream.name) == (12, PARITY, "shards/*.tar/train")
    batches = run(stream, WHOLE)
    assert [(pixels.shape, pixels.dtype) for pixels, _ in batches] == [
        ((size, 3, 8, 8), torch.uint8) for size in (5, 5, 2)
    ]
    order = torch.cat([pixels[:, 0, 0, 0] for pixels, _ in batches]).long()
    assert sorted(order.tolist()) == list(range(12))
    assert torch.equal(torch.cat([labels for _, labels in batches]), order % 2)


def test_the_order_is_of_seed_and_epoch_alone(shards: Any) -> None:
    pattern = shards()
    one, other = open_shards(pattern), open_shards(pattern)
    first = drawn(one, WHOLE, seed=3, epoch=1)
    torch.manual_seed(123)
    assert drawn(other, WHOLE, seed=3, epoch=1) == first
    assert drawn(one, WHOLE, seed=3, epoch=2) != first
    assert drawn(one, WHOLE, seed=4, epoch=1) != first
    assert drawn(one, WHOLE, seed=3, epoch=1) == first


@pytest.mark.parametrize("workers", [0, 3])
def test_processes_and_resumed_runs_take_slices_of_one_order(workers: int, shards: Any) -> None:
    pattern = shards()
    order = drawn(open_shards(pattern), [slice(0, 12)])
    parts: tuple[list[slice], ...] = (
        [slice(start, start + 1) for start in range(0, 12, 2)],
        [slice(start, start + 1) for start in range(1, 12, 2)],
        [slice(7, 9), slice(9, 12)],
        [slice(12, 12)],
    )
    for part in parts:
        expected = [image for piece in part for image in order[piece]]
        assert drawn(open_shards(pattern), part, workers=workers) == expected


def test_a_process_decodes_its_own_share_alone(
    shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Sample] = []
    stream = open_shards(shards())
    decode = stream._decode

    def counted(sample: Sample) -> Tensor | str:
        decoded.append(sample)
        return decode(sample)

    monkeypatch.setattr(stream, "_decode", counted)
    run(stream, [slice(6, 8), slice(10, 11)])
    assert len(decoded) == 3


def test_a_short_stream_starts_again_in_another_order(shards: Any) -> None:
    order = drawn(open_shards(shards(8), epoch_size=24), [slice(0, 24)])
    turns = [order[:8], order[8:16], order[16:]]
    assert [sorted(turn) for turn in turns] == [list(range(8))] * 3
    assert turns[0] != turns[1] != turns[2]


def test_the_epochs_of_a_long_stream_end_early(shards: Any) -> None:
    stream = open_shards(shards(), epoch_size=5)
    assert len(set(drawn(stream, [slice(0, 5)]))) == 5


@pytest.mark.filterwarnings("error")
def test_a_stream_can_be_left(shards: Any) -> None:
    batches: Any = open_shards(shards()).epoch(0, 0, WHOLE, CPU, 2)
    next(batches)
    batches.close()


def test_folders_and_parquet_stream_the_pixels_that_are_opened_at_random(
    class_folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # datasets gives parquet's threads so many seconds to end (apache/arrow#45214)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    larger = Preprocess(10, 12, (0.5,) * 3, (0.5,) * 3)
    root = str(class_folders(4, size=11))
    file = str(tmp_path / "a.parquet")
    datasets.load_dataset(root, split="train").to_parquet(file)
    opened = load(root, "train", larger)
    expected = sorted((opened[i][0].numpy().tobytes(), int(opened.labels[i])) for i in range(8))
    for source in (root, file):
        stream = load_stream(source, "train", larger, epoch_size=8)
        assert stream.classes == ["bright", "dark"]
        ((pixels, labels),) = run(stream, [slice(0, 8)])
        found = [
            (image.numpy().tobytes(), int(label))
            for image, label in zip(pixels, labels, strict=True)
        ]
        assert sorted(found) == expected


def test_tar_shards_open_at_random_too(shards: Any) -> None:
    images = load(shards(), "train", PREPROCESS)
    assert [int(images[i][0][0, 0, 0]) for i in range(12)] == list(range(12))
    assert images.labels.tolist() == [0, 1] * 6
    assert images.classes == ["0", "1"]


def test_unlabelled(shards: Any) -> None:
    stream = open_shards(shards(), labelled=False, classes=None)
    assert stream.classes == []
    assert [labels.tolist() for _, labels in run(stream, WHOLE)] == [[-1] * 5, [-1] * 5, [-1] * 2]


@pytest.mark.parametrize("workers", [0, 3])
def test_the_next_readable_image_stands_in(workers: int, shards: Any, tmp_path: Path) -> None:
    pattern = shards()
    sound = drawn(open_shards(pattern, epoch_size=24), [slice(0, 24)])
    bad = {sound[0], sound[4], sound[5], sound[11]}  # 4 and 5 lie on both sides of a slice's end
    (tmp_path / "shards").rename(tmp_path / "sound")
    damaged = open_shards(shards(bad=bad))
    expected = [next(i for i in sound[place:] if i not in bad) for place in range(12)]
    for _ in range(2):  # images that were skipped before are not counted again
        batches = run(damaged, WHOLE, workers=workers)
        order = torch.cat([pixels[:, 0, 0, 0] for pixels, _ in batches])
        assert order.tolist() == expected
        assert torch.equal(torch.cat([labels for _, labels in batches]), order.long() % 2)
        assert damaged.unreadable == 4
    part = [slice(5, 6)]
    assert drawn(open_shards(pattern), part, workers=workers) == expected[5:6]


def test_too_many_unreadable_images_end_the_run(shards: Any) -> None:
    pattern = shards(24, bad=set(range(0, 22, 2)))
    message = (
        r"^shards/\*.tar/train: 11 of 24 images cannot be read \(45.8%; --max-unreadable allows"
        r" 1.0%\); the first one: shards/\*.tar/train, .*/00\d.tar 0\d\d.png: "
    )
    with pytest.raises(DataError, match=message) as raised:
        run(open_shards(pattern, epoch_size=24), [slice(0, 24)])
    assert "\n" not in str(raised.value)
    run(open_shards(pattern, epoch_size=24, max_unreadable=0.5), [slice(0, 24)])


def test_nothing_readable(shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcae_training.stream.PATIENCE", 20)
    with pytest.raises(DataError, match="train: 4 images in a row cannot be read; the first one: "):
        run(open_shards(shards(4, bad={0, 1, 2, 3})), WHOLE)


def test_a_cut_shard_is_one_line(shards: Any) -> None:
    pattern = shards()
    last = Path(pattern).parent / "002.tar"
    last.write_bytes(last.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"^shards/.*/train: reading failed: ") as raised:
        run(open_shards(pattern), WHOLE)
    assert "\n" not in str(raised.value)


def rows(labels: list[int | None]) -> datasets.IterableDataset:
    images = [{"bytes": png(i), "path": None} for i in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    content = {"image": images, "label": labels}
    return datasets.Dataset.from_dict(content, features).to_iterable_dataset()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([5, 5], r"^x, image 0 of epoch 3: label 5 is not one of the 2 classes, .0., .1.$"),
        ([None, None], r"^x, image 0 of epoch 3: the image has no label$"),
        ([], "^x has no rows$"),
    ],
)
def test_labels_that_are_none(labels: list[int | None], message: str) -> None:
    source = rows(labels or [0]).take(len(labels))
    columns = choose_columns(source.features, "x")
    stream = ImageStream(source, PREPROCESS, "x", columns, epoch_size=2, classes=PARITY)
    with pytest.raises(DataError, match=message):
        run(stream, [slice(0, 2)], epoch=3)


def test_what_cannot_be_a_stream(shards: Any, tmp_path: Path) -> None:
    pattern = shards(4)
    with pytest.raises(DataError, match="has numbers as labels; name the classes with --classes"):
        open_shards(pattern, classes=None)
    with pytest.raises(DataError, match="an epoch must have at least one image, not 0"):
        open_shards(pattern, epoch_size=0)
    with pytest.raises(DataError, match=r"^cannot read split 'train' of data set"):
        open_shards(str(tmp_path / "nowhere" / "*.tar"))
