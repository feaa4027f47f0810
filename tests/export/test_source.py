"""Checkpoints read for export: their content, overrides, and what is missing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pcae_export.source import (
    NORMALISE,
    Source,
    SourceError,
    SourceOverrides,
    read_labels,
    read_source,
)
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.model import ViTConfig
from tests.support.foreign_checkpoints import TINY, dino_teacher, mae_pretrained, saved, vit

HALF = SourceOverrides(heads=2, normalise="half")
SQUASHED = {
    "size": {"height": 24, "width": 24}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3,
    "resample": 2,
}  # fmt: skip
CROPPED = SQUASHED | {
    "size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(vit().state_dict(), tmp_path)


def write_preprocessor(file: Path, preprocessor: Any) -> Path:
    (file.parent / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return file


def text(folder: Path, content: str, name: str = "labels.txt") -> Path:
    (folder / name).write_text(content)
    return folder / name


def ours(folder: Path, config: ViTConfig = TINY) -> Path:
    preprocess = Preprocess(24, 24, (0.1,) * 3, (0.2,) * 3)
    found = Checkpoint(vit(config), preprocess, list("abcde")[: config.classes], {"epochs_done": 3})
    checkpoints.save(found, folder / "run")
    return folder / "run"


def refused(path: Path, overrides: SourceOverrides, message: str) -> None:
    with pytest.raises(PcaeError, match=message) as caught:
        read_source(path, overrides)
    assert "\n" not in str(caught.value)


# Weights


def test_weights_come_as_they_are(file: Path) -> None:
    model = read_source(file, HALF).checkpoint.model
    assert not model.training
    assert model.config == TINY
    for name, tensor in vit().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_checkpoint_of_our_own_needs_no_telling(tmp_path: Path) -> None:
    reduced = replace(TINY, reduction_points=(1,), reduction="weighted")
    found = read_source(ours(tmp_path, reduced), SourceOverrides())
    assert found.checkpoint.model.config == reduced
    assert found.checkpoint.labels == list("abcde")
    assert found.checkpoint.preprocess.mean == (0.1,) * 3
    assert found.checkpoint.training == {"epochs_done": 3}
    assert (found.reduced, found.notes) == (True, ())


def test_heads_that_no_tensor_tells_must_be_told(file: Path) -> None:
    refused(file, replace(HALF, heads=None), "cannot derive the number of heads from width 16")
    assert read_source(file, replace(HALF, heads=4)).checkpoint.model.config.heads == 4


def test_only_rgb_is_served(tmp_path: Path) -> None:
    grey = saved(vit(replace(TINY, channels=1)).state_dict(), tmp_path)
    refused(grey, HALF, r"x\.pth takes 1 channels; only RGB is supported")


# Reduction


def test_which_reduction_suits_foreign_weights_is_open_unless_told(file: Path) -> None:
    assert not read_source(file, HALF).reduced
    found = read_source(file, replace(HALF, reduction="weighted", reduction_points=[0, 1]))
    assert found.reduced
    config = found.checkpoint.model.config
    assert (config.reduction, config.reduction_points) == ("weighted", (0, 1))


def test_none_is_told_by_naming_no_points(tmp_path: Path) -> None:
    path = ours(tmp_path, replace(TINY, reduction_points=(1,)))
    assert (
        read_source(
            path, SourceOverrides(reduction_points=())
        ).checkpoint.model.config.reduction_points
        == ()
    )


@pytest.mark.parametrize(
    ("points", "message"),
    [((0, 2), r"points \(0, 2\) are outside"), ((1, 0), r"points \(1, 0\) must be in")],
)
def test_points_that_cannot_be(file: Path, points: tuple[int, ...], message: str) -> None:
    refused(file, replace(HALF, reduction_points=points), rf"x\.pth: reduction {message}")


# Preprocessing


def test_normalisation_that_nobody_tells_is_asked_for(file: Path) -> None:
    refused(
        file,
        SourceOverrides(heads=2),
        r"x\.pth does not contain mean and std of its images; give --normalise"
        r" imagenet or --normalise half$",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["imagenet", "half"])
def test_what_is_told_goes_before_what_lies_beside(file: Path, name: Any) -> None:
    mean, std = NORMALISE[name]
    assert read_source(file, replace(HALF, normalise=name)).checkpoint.preprocess == Preprocess(
        24, 27, mean, std, crop_offset="half-even"  # 24 / 0.875, rounded
    )  # fmt: skip
    write_preprocessor(file, CROPPED)
    found = read_source(file, SourceOverrides(heads=2)).checkpoint.preprocess
    assert found == Preprocess(24, 32, (0.1,) * 3, (0.2,) * 3, Image.Resampling.BILINEAR)
    changed = read_source(file, replace(HALF, normalise=name)).checkpoint.preprocess
    assert changed == replace(found, mean=mean, std=std)


def test_another_size_scales_the_crop_and_interpolates_positions(file: Path) -> None:
    write_preprocessor(file, CROPPED)
    source = read_source(file, SourceOverrides(heads=2, image_size=48))
    assert f"{file} was trained at 24 pixels, not 48: positions are interpolated" in source.notes
    found = source.checkpoint
    assert (found.preprocess.image_size, found.preprocess.resize) == (48, 64)
    assert found.model.config == replace(TINY, image_size=48)
    assert found.model.pos_embed.shape == (1, 1 + 144, 16)
    changed = read_source(
        file, SourceOverrides(heads=2, image_size=48, resize=50)
    ).checkpoint.preprocess
    assert (changed.image_size, changed.resize) == (48, 50)


def test_the_preprocessor_goes_before_the_positions(file: Path) -> None:
    """As with DINOv2: trained at 518, used at 224."""
    write_preprocessor(file, CROPPED | {"crop_size": {"height": 16, "width": 16}})
    found = read_source(file, SourceOverrides(heads=2)).checkpoint
    assert (found.model.config.image_size, found.preprocess.image_size) == (16, 16)


def test_squashed_images_stay_so_unless_told_to_be_cropped(file: Path) -> None:
    write_preprocessor(file, SQUASHED)
    small = read_source(file, SourceOverrides(heads=2, image_size=16)).checkpoint.preprocess
    assert (small.image_size, small.resize, small.squash) == (16, 16, True)
    changed = read_source(file, SourceOverrides(heads=2, resize=30)).checkpoint.preprocess
    assert (changed.image_size, changed.resize, changed.squash) == (24, 30, False)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 25}, r"patch size 4 does not divide 25"),
        ({"resize": 20}, r"cannot crop 24 pixels out of 20"),
    ],
)
def test_sizes_that_cannot_be(
    file: Path, known: bool, change: dict[str, int], message: str
) -> None:
    if known:
        write_preprocessor(file, SQUASHED)
    refused(file, replace(HALF, **change), rf"x\.pth: {message}")  # type: ignore[arg-type]


# Labels


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "kiwi\n fig \nlime\nplum\npear\n"),
        ("names.json", '["kiwi", "fig", "lime", "plum", "pear"]'),
    ],
)
def test_labels_are_read_from_text_and_json(
    file: Path, tmp_path: Path, name: str, content: str
) -> None:
    found = read_source(file, replace(HALF, labels=text(tmp_path, content, name)))
    assert found.checkpoint.labels == ["kiwi", "fig", "lime", "plum", "pear"]
    assert found.notes == ()


def test_classes_without_names_are_numbered_and_it_is_said(file: Path) -> None:
    found = read_source(file, HALF)
    assert found.checkpoint.labels == list("01234")
    assert found.notes == (
        f"{file} has no names for its 5 classes: they are numbered (see --labels)",
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "a\nb\n", r"x\.txt has 2 names, but .*x\.pth has 5 classes"),
        ("x.txt", "a\n\nb\nc\nd\n", "one class name per line, or a JSON list"),
        ("x.json", '{"0": "a"}', "one class name per line, or a JSON list"),
        ("x.json", "[1, 2, 3, 4, 5]", "one class name per line, or a JSON list"),
        ("x.json", "a\nb", r"cannot read .*x\.json"),
    ],
)
def test_labels_that_name_nothing(
    file: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    refused(file, replace(HALF, labels=text(tmp_path, content, name)), message)


def test_labels_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("Küche".encode("latin-1"))
    for name in ("latin1.txt", "none.txt", "."):
        with pytest.raises(SourceError, match="cannot read"):
            read_labels(tmp_path / name)


# Heads and what is left out


def headless(found: Source) -> bool:
    config = found.checkpoint.model.config
    return not config.classes and not found.checkpoint.labels


def test_a_checkpoint_without_a_head_gives_features(tmp_path: Path) -> None:
    file = saved(dino_teacher(vit(replace(TINY, classes=0)).state_dict()), tmp_path)
    found = read_source(file, HALF)
    assert headless(found)
    assert found.notes == (f"ignored in {file}: head.mlp.0.weight",)
    labels = text(tmp_path, "a\n")
    refused(file, replace(HALF, labels=labels), r"x\.pth has no head, so --labels does not apply")


def test_a_mask_token_is_no_loss_worth_a_note(tmp_path: Path) -> None:
    file = saved(mae_pretrained(vit(replace(TINY, classes=0)).state_dict()), tmp_path)
    assert read_source(file, HALF).notes == (f"ignored in {file}: decoder_embed.weight",)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_head_may_be_left_out(tmp_path: Path, distilled: bool) -> None:
    config = replace(TINY, distilled=distilled)
    found = read_source(saved(vit(config).state_dict(), tmp_path), replace(HALF, features=True))
    assert headless(found)
    assert found.notes == ()
    model = found.checkpoint.model
    assert not any(name.startswith("head") for name in model.state_dict())
    assert torch.equal(model.norm.weight, vit(config).norm.weight)


def test_features_of_a_checkpoint_of_our_own_keep_its_reduction(tmp_path: Path) -> None:
    path = ours(tmp_path, replace(TINY, reduction_points=(0,), reduction="merged"))
    found = read_source(path, SourceOverrides(features=True))
    assert headless(found)
    assert found.reduced
    assert found.checkpoint.model.config.reduction == "merged"


def test_a_safetensors_file_is_read_as_a_pickle_is(tmp_path: Path) -> None:
    save_file(vit().state_dict(), tmp_path / "x.safetensors")
    model = read_source(tmp_path / "x.safetensors", HALF).checkpoint.model
    assert torch.equal(model.state_dict()["head.weight"], vit().state_dict()["head.weight"])


# Pooling


def test_features_may_be_pooled_in_another_way(tmp_path: Path) -> None:
    normed = replace(TINY, classes=0, pooling="cls")
    path = saved(vit(normed).state_dict(), tmp_path)
    for changes, expected in (
        (replace(HALF, pooling="cls"), normed),
        (replace(HALF, pooling="mean"), replace(normed, pooling="normed-mean")),
    ):
        found = read_source(path, changes).checkpoint.model
        assert found.config == expected
        assert torch.equal(found.norm.weight, vit(normed).norm.weight)


def test_a_mean_before_the_final_norm_is_the_mean(tmp_path: Path) -> None:
    config = replace(TINY, classes=0, pooling="mean")
    path = saved(vit(config).state_dict(), tmp_path)
    assert read_source(path, replace(HALF, pooling="mean")).checkpoint.model.config == config
    refused(path, replace(HALF, pooling="cls"), "its final norm was trained on the mean over")


@pytest.mark.parametrize(
    ("changes", "pooling", "message"),
    [
        ({}, "mean", "the head of .* reads its own pooling"),
        ({"pooling": "cls", "distilled": True, "classes": 0}, "mean", "a distilled model must"),
    ],
)
def test_other_features_need_weights_for_them(
    tmp_path: Path, changes: dict[str, Any], pooling: Any, message: str
) -> None:
    path = saved(vit(replace(TINY, **changes)).state_dict(), tmp_path)
    refused(path, replace(HALF, pooling=pooling), message)
