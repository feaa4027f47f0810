from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest

from pcae_training.source import DataError, open_source, title


def table(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"number": list(range(count))})


def numbers(source: Any, split: str, stream: bool = False) -> list[int]:
    rows = open_source(str(source), split, True) if stream else open_source(str(source), split)
    return [row["number"] for row in rows]


def fails(source: Any, split: str = "train", stream: bool = False) -> str:
    with pytest.raises(DataError) as raised:
        numbers(source, split, stream)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_of_parquet_has_its_splits(stream: bool, tmp_path: Path) -> None:
    folder = tmp_path / "data"  # beside the cache
    folder.mkdir()
    table(6).to_parquet(folder / "train-00000-of-00001.parquet")
    table(4).to_parquet(folder / "test-00000-of-00001.parquet")
    assert numbers(str(folder), "train", stream) == [0, 1, 2, 3, 4, 5]
    assert numbers(str(folder), "test", stream) == [0, 1, 2, 3]


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_by_name_or_pattern_are_whatever_split_is_asked_for(
    split: str, tmp_path: Path
) -> None:
    table(3).to_parquet(tmp_path / "a.parquet")
    table(2).to_parquet(tmp_path / "b.parquet")
    assert numbers(str(tmp_path / "a.parquet"), split) == [0, 1, 2]
    assert numbers(str(tmp_path / "*.parquet"), split) == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("stream", "options"), [(False, {}), (True, {"streaming": True})], ids=["map", "stream"]
)
def test_hub_names_go_to_datasets(
    stream: bool, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def hub(name: str, **given: Any) -> datasets.Dataset:
        asked.append((name, given))
        return table(3)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr("pcae_training.source.check_data_set", lambda name: None)
    assert numbers("zalando-datasets/fashion_mnist", "test", stream) == [0, 1, 2]
    assert asked == [("zalando-datasets/fashion_mnist", {"split": "test", **options})]


def test_offline_hub_name_is_one_line() -> None:
    message = fails("nobody/nothing")
    assert message.startswith("cannot read split 'train' of data set 'nobody/nothing': there is no")


@pytest.mark.parametrize("name", ["nobody/nothing", "photos"])
def test_no_network_is_one_line_without_retries(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`datasets` alone writes a line for each of its retries, for half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it retries"))
    message = fails(name)
    assert "there is no such folder, and as a name on the hub: cannot reach the hub at" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert not caplog.records


@pytest.mark.parametrize("name", ["./photos", "/photos", "photos/", "a/b/c", "../photos"])
def test_a_path_is_not_asked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked"))
    assert fails(name).endswith("there is no such folder or file")


@pytest.mark.parametrize("stream", [False, True])
def test_wrong_paths(stream: bool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no parquet at all")
    (tmp_path / "text.tar").write_text("no tar file at all")
    (tmp_path / "empty.tar").write_bytes(bytes(10240))  # what tar writes for no files
    for name in (
        "nowhere",
        "nowhere.parquet",
        "nowhere/*.tar",
        "empty",
        "text.parquet",
        "text.tar",
        "empty.tar",
    ):
        assert fails(tmp_path / name, stream=stream).startswith("cannot read split 'train' of")


def test_missing_split(class_folders: Any) -> None:
    assert "validation" in fails(class_folders(2), "validation")


def test_an_error_without_words_still_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(datasets, "load_dataset", silent)
    assert fails("x").endswith("OSError")


def test_titles() -> None:
    assert title("/some/where/flowers", "train") == "flowers/train"
    assert title("uoft-cs/cifar100", "test") == "cifar100/test"
    assert title("/data/wds/*.tar", "train") == "wds/*.tar/train"
