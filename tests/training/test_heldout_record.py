"""Which images a run held out, and what later runs make of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest
from pydantic import ValidationError

from pcae_serve.errors import PcaeError
from pcae_training import heldout_record
from pcae_training.finetune import finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.finetune_start import prepare
from pcae_training.source import DataError

TINY: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "width": 8, "heads": 2, "depth": 11, "batch_size": 8,
    "epochs": 1, "keep": 1.0,
}  # fmt: skip
INIT: dict[str, Any] = {"batch_size": 8, "epochs": 1, "keep": 1.0}


@pytest.fixture
def images(class_folders: Any) -> Path:
    folder: Path = class_folders(10)
    return folder


def settings(images: Path, out: Path, **changes: Any) -> FinetuneSettings:
    sizes = INIT if "init" in changes else TINY
    return FinetuneSettings(data=str(images), out=out, **sizes | changes)


def bodies(images: Any) -> set[bytes]:
    return {images.body(i) for i in range(len(images))}


def test_later_runs_hold_out_the_same_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = settings(images, tmp_path / "first", holdout=6, seed=5)
    held = bodies(prepare(first).holdout)
    finetune(first)
    moved = tmp_path / "elsewhere"
    shutil.move(images, moved)
    (moved / "train" / "bright" / "000.png").rename(moved / "train" / "bright" / "zzz.png")
    capsys.readouterr()
    for init in (first.folder, first.folder / "checkpoint"):
        start = prepare(settings(moved, tmp_path / "second", init=init))
        assert bodies(start.holdout) == held
        assert not bodies(start.images) & held
        printed = capsys.readouterr().err
        assert f"held out: 6 of 20 images (those that {init} held out)" in printed
        assert "warning" not in printed


@pytest.mark.parametrize("changes", [{"holdout": 2}, {"fold": (1, 4)}, {"eval_data": "again"}])
def test_a_warning_if_images_to_train_on_were_held_out(
    changes: dict[str, Any], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = settings(images, tmp_path / "first", holdout=8)
    finetune(first)
    held = bodies(prepare(first).holdout)
    if "eval_data" in changes:
        changes = {"eval_data": str(images), "eval_split": "train"}
    capsys.readouterr()
    start = prepare(settings(images, tmp_path / "second", init=first.out, **changes))
    seen = len(bodies(start.images) & held)
    assert seen > 0
    assert f"warning: {seen} images to train on are among the 8" in capsys.readouterr().err


def test_other_images_are_divided_anew(images: Path, tmp_path: Path) -> None:
    first = settings(images, tmp_path / "first", holdout=6)
    finetune(first)
    record = tmp_path / "first" / heldout_record.FILE
    content = json.loads(record.read_text())
    assert content["n"] == 6
    record.write_text(json.dumps(content | {"files": ["00" * 16]}))
    start = prepare(settings(images, tmp_path / "second", init=first.out))
    assert len(start.holdout) == 4  # a fifth


@pytest.mark.parametrize("content", ["[]", "{}", '{"data": 1, "files": 3, "sizes": []}', "junk"])
def test_a_damaged_record(content: str, tmp_path: Path) -> None:
    (tmp_path / heldout_record.FILE).write_text(content)
    with pytest.raises(PcaeError, match=r"holdout\.json"):
        heldout_record.read(tmp_path)
    assert heldout_record.read(tmp_path / "none") is None


def test_folders_below_a_class_are_groups(images: Path, tmp_path: Path) -> None:
    for label in ("bright", "dark"):
        folder = images / "train" / label
        for i, file in enumerate(sorted(folder.glob("*.png"))):
            group = folder / f"person{i // 2}" / "monday"
            group.mkdir(parents=True, exist_ok=True)
            file.rename(group / file.name)
    start: Any = prepare(settings(images, tmp_path / "run", group="folder", holdout=0.4))
    assert len(start.holdout) == 8
    held, train = (
        {str(each.path(i)).rsplit("/", 2)[0] for i in range(len(each))}
        for each in (start.holdout, start.images)
    )
    assert not held & train


def test_a_column_of_groups(tmp_path: Path, images: Path) -> None:
    files = sorted((images / "train").rglob("*.png"))
    rows = {
        "image": [str(file) for file in files],
        "label": [file.parent.name for file in files],
        "person": [f"p{i // 5}" for i in range(len(files))],
        "gap": [None, *["x"] * (len(files) - 1)],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    folder = tmp_path / "table"
    folder.mkdir()
    table.to_parquet(folder / "train.parquet", storage_options=None)
    start: Any = prepare(settings(folder, tmp_path / "run", group="person", holdout=10))
    groups = {frozenset(part.groups("person")) for part in (start.holdout, start.images)}
    assert groups in (
        {frozenset({"p0", "p2"}), frozenset({"p1", "p3"})},
        {frozenset({"p0", "p3"}), frozenset({"p1", "p2"})},
    )
    for column, message in (
        ("animal", "has no column 'animal' to group by; its columns: label, person, gap"),
        ("gap", "1 of its 20 images have no 'gap'"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(settings(folder, tmp_path / "run", group=column))


def test_groups_that_are_not_there(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folders below its classes to group by"):
        prepare(settings(images, tmp_path / "run", group="folder"))
    with pytest.raises(DataError, match="--group can only be folder, not 'person'"):
        prepare(settings(images, tmp_path / "run", group="person"))


def test_the_only_image_of_a_class_is_not_measured(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in sorted((images / "train" / "dark").glob("*.png"))[1:]:
        file.unlink()
    prepare(settings(images, tmp_path / "run", holdout=2))
    assert "note: the only image of class dark stays in training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": "x"}, "must be a number of images or a share below 1, not 'x'"),
        ({"holdout": "1.5"}, "must be a number of images or a share below 1, not 1.5"),
        ({"holdout": 0}, "must be a number of images or a share below 1, not 0"),
        ({"fold": "6/5"}, "must be I/K with I from 1 to K, and K at least 2, not '6/5'"),
        ({"fold": "1"}, "must be I/K, such as 1/5, not '1'"),
        ({"fold": "1/5", "holdout": 5}, "omit --holdout"),
        ({"eval_data": "x", "fold": "1/5"}, "--eval-data replaces the hold-out; omit --fold"),
    ],
)
def test_flags_that_cannot_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(tmp_path, tmp_path / "run", **changes)
    assert message in str(caught.value)
