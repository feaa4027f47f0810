"""config.json of the vision towers of CLIP and SigLIP: understood, or refused by field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pcae_export.source import SourceOverrides, read_source
from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights import LoadedCheckpoint, load_checkpoint
from tests.support.families import build, write
from tests.support.foreign_checkpoints import SIZES


@pytest.fixture
def folder(hugging_face: Any, tmp_path: Path) -> Path:
    """Write a CLIP of two towers."""
    return write(build(hugging_face, "clip"), tmp_path / "theirs")


def edited(folder: Path, tower: dict[str, Any] | None = None, **changes: Any) -> LoadedCheckpoint:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["vision_config"] |= tower or {}
    file.write_text(json.dumps(content | changes))
    return load_checkpoint(folder)


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in changes}
    tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        (
            {"hidden_act": "relu"},
            {},
            r'config.json: vision_config: hidden_act is "relu"; supported',
        ),
        ({"mystery": 3}, {}, r'vision_config: field "mystery" \(3\) is not known; remove it'),
        ({"num_hidden_layers": 4}, {}, "num_hidden_layers is 4, but the weights have 2"),
        ({"image_size": 48}, {}, "image_size is 48, but the weights have 24"),
        ({}, {"projection_dim": 5}, "projection_dim is 5, but the weights have 12"),
        (
            {},
            {"architectures": ["CLIPForImageClassification"]},
            r'architectures is \["CLIPForImageClassification"\]; supported: one of CLIPModel',
        ),
        ({}, {"mystery": 3}, r'config.json: field "mystery" \(3\) is not known; remove it'),
        ({}, {"vision_config": 3}, "vision_config is 3; supported: an object"),
        (
            {},
            {"vision_config_dict": {"num_attention_heads": 2, "num_hidden_layers": 4}},
            "but the weights have 2",
        ),
    ],
)
def test_what_changes_an_answer_is_refused_by_name(
    folder: Path, tower: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        edited(folder, tower, **changes)
    assert "\n" not in str(caught.value)


def test_the_text_tower_is_left_out_and_named_once(folder: Path) -> None:
    source = read_source(folder, SourceOverrides(normalise="half"))
    [note] = source.notes
    assert note == f"ignored in {folder}: logit_scale, text_model, text_projection"
    assert source.checkpoint.answers == "features"
    assert source.checkpoint.model.config.features == 12


def test_old_files_have_the_tower_in_another_field(folder: Path) -> None:
    tower = json.loads((folder / "config.json").read_text())["vision_config"]
    found = edited(folder, {"hidden_act": "gelu"}, vision_config_dict=tower)
    assert found.config.activation == "quick-gelu"


def test_old_files_hold_the_numbers_of_positions(folder: Path) -> None:
    name = "vision_model.embeddings.position_ids"
    change_tensors(folder, **{name: torch.arange(37)[None]})
    assert load_checkpoint(folder).config.classes == 0


def test_a_projection_that_is_missing_is_not_passed_over(folder: Path) -> None:
    change_tensors(folder, **{"visual_projection.weight": None})
    with pytest.raises(CheckpointError, match="visual_projection is missing, which config"):
        load_checkpoint(folder)


def test_a_projection_is_left_out_if_the_class_has_none(hugging_face: Any, tmp_path: Path) -> None:
    write(build(hugging_face, "clip-projected"), tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    for architectures, width in ((None, 12), (["CLIPVisionModel"], 16)):
        file.write_text(json.dumps(content | {"architectures": architectures}))
        assert load_checkpoint(tmp_path).config.features == width


def test_tensors_without_their_configuration_are_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"CLIP, but not its config\.json"):
        load_checkpoint(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        ({"vision_use_head": False}, {}, "vision_use_head is false; supported: true"),
        ({"model_type": "clip_vision_model"}, {}, "is not a tower of 'siglip'"),
        (
            {},
            {"architectures": ["CLIPModel"]},
            "\"CLIPModel\", which is not of model_type 'siglip'",
        ),
        ({"image_size": 26}, {}, "image_size is 26, which patches of 4 pixels do not fill"),
    ],
)
def test_what_changes_an_answer_of_siglip_is_refused_by_name(
    hugging_face: Any, tmp_path: Path, tower: Any, changes: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        edited(write(build(hugging_face, "siglip"), tmp_path), tower, **changes)


def test_a_classifier_of_siglip_reads_the_mean_of_its_patches(
    hugging_face: Any, tmp_path: Path
) -> None:
    found = load_checkpoint(write(build(hugging_face, "siglip-classifier"), tmp_path))
    assert found.config.pooling == "normed-mean"
    assert found.labels == [f"class {i}" for i in range(5)]
    assert found.ignored == ["vision_model.head"]
    features = found.drop_head().config
    assert (features.classes, features.pooling) == (0, "normed-mean")


def test_a_pool_that_is_missing_is_not_passed_over(hugging_face: Any, tmp_path: Path) -> None:
    folder = write(build(hugging_face, "siglip"), tmp_path)
    names = [name for name in load_file(folder / "model.safetensors") if ".head." in name]
    change_tensors(folder, **dict.fromkeys(names))
    with pytest.raises(CheckpointError, match=r"vision_model\.head is missing, which config"):
        load_checkpoint(folder)


@torch.inference_mode()
def test_siglip_2_of_a_fixed_resolution_as_it_is_published(
    hugging_face: Any, tmp_path: Path
) -> None:
    theirs = build(hugging_face, "siglip")
    folder = write(theirs, tmp_path)
    sizes = json.loads((folder / "config.json").read_text())["vision_config"]
    published = {  # states neither the model's class nor a field that has its default
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", "vocab_size": 256000},
        "transformers_version": "4.49.0.dev0",
        "vision_config": {"model_type": "siglip_vision_model"}
        | {name: sizes[name] for name in (*SIZES, "intermediate_size")},
    }
    (folder / "config.json").write_text(json.dumps(published))
    processor = {
        "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5] * 3, "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5] * 3, "processor_class": "SiglipProcessor", "resample": 2,
        "rescale_factor": 0.00392156862745098, "size": {"height": 24, "width": 24},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    checkpoint = read_source(folder, SourceOverrides()).checkpoint
    assert checkpoint.preprocess.resample == Image.Resampling.BILINEAR
    assert (checkpoint.preprocess.resize, checkpoint.preprocess.squash) == (24, True)
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = theirs.get_image_features(images).pooler_output
    torch.testing.assert_close(checkpoint.model(images), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["clip_text_model", "eva"])
def test_another_model_is_refused_by_its_type(folder: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f'model_type is "{kind}"; supported: vit, deit,'):
        edited(folder, model_type=kind)
