"""config.json of DINOv3: understood, or refused by field; layers with and without biases."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights import LoadedCheckpoint, load_checkpoint
from tests.support.families import build, write
from tests.support.foreign_checkpoints import SIZES, randomised, rebuilt, saved

#: Content of preprocessor_config.json as it is published.
PROCESSOR: dict[str, Any] = {
    "crop_size": None, "data_format": "channels_first", "default_to_square": True, "device": None,
    "disable_grouping": None, "do_center_crop": None, "do_convert_rgb": None, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DINOv3ViTImageProcessorFast", "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None, "resample": 2, "rescale_factor": 0.00392156862745098,
    "return_tensors": None, "size": {"height": 24, "width": 24},
}  # fmt: skip


@pytest.fixture
def folder(hugging_face: Any, tmp_path: Path) -> Path:
    """Write a DINOv3 with registers."""
    return write(build(hugging_face, "dinov3"), tmp_path / "theirs")


def edited(folder: Path, **changes: Any) -> LoadedCheckpoint:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))
    return load_checkpoint(folder)


def images() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize(
    "changes",
    [
        {"key_bias": True, "num_register_tokens": 0},
        {"query_bias": False, "value_bias": False, "proj_bias": False},
        {"mlp_bias": False, "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10.0},
        {"mlp_bias": False, "use_gated_mlp": True},  # gated by GELU
    ],
)
@pytest.mark.parametrize("as_on_disk", [True, False])
def test_layers_have_the_biases_that_they_have(
    hugging_face: Any, changes: dict[str, Any], as_on_disk: bool, tmp_path: Path
) -> None:
    config = hugging_face.DINOv3ViTConfig(**SIZES, intermediate_size=40, **changes)
    theirs = randomised(hugging_face.DINOv3ViTModel(config))
    theirs.save_pretrained(tmp_path, save_original_format=as_on_disk)
    names = " ".join(load_file(tmp_path / "model.safetensors"))
    assert ("model.layer.0." in names) != as_on_disk
    found = load_checkpoint(tmp_path)
    assert found.ignored == ["embeddings.mask_token"]
    expected = theirs(images()).pooler_output
    torch.testing.assert_close(rebuilt(found)(images()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, 'hidden_act is "relu"; supported: "quick_gelu" or'),
        ({"key_bias": True}, r"key_bias is true, but the weights have none \(attn.k\)"),
        ({"value_bias": False}, r"value_bias is false, but the weights have some \(attn.v\)"),
        ({"mlp_bias": False}, r"mlp_bias is false, but the weights have some \(mlp.fc1\)"),
        ({"use_gated_mlp": True}, "use_gated_mlp is true, but the weights have False"),
        ({"num_register_tokens": 4}, "num_register_tokens is 4, but the weights have 3"),
        ({"num_register_tokens": "absent"}, "num_register_tokens is 0, but the weights have 3"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, but the weights have 2"),
        ({"intermediate_size": 80}, "intermediate_size is 80, but the weights have 40"),
        ({"rope_theta": 0}, "rope_theta is 0; supported: a positive number"),
        ({"image_size": 26}, "patch size 4 does not divide 26"),
        ({"mystery": 3}, r'config.json: field "mystery" \(3\) is not known; remove it'),
        ({"architectures": ["DINOv3ViTBackbone"]}, "supported: one of DINOv3ViTModel"),
    ],
)
def test_what_changes_an_answer_is_refused_by_name(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        edited(folder, **changes)
    assert "\n" not in str(caught.value)


def test_absent_fields_have_the_defaults_of_transformers(folder: Path) -> None:
    names = ("image_size", "rope_theta", "hidden_act", "key_bias", "layer_norm_eps")
    found = edited(folder, **dict.fromkeys(names, "absent")).config
    assert (found.image_size, found.rope_theta, found.norm_eps) == (224, 100, 1e-5)
    assert (found.activation, found.pooling, found.registers) == ("gelu", "cls", 3)


def test_the_published_preprocessing_is_understood(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    found = load_checkpoint(folder).preprocess
    assert found is not None
    assert (found.image_size, found.resize, found.squash) == (24, 24, True)
    assert found.mean == (0.485, 0.456, 0.406)


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if name not in changes}
    save_file(tensors | {name: t for name, t in changes.items() if t is not None}, file)


def test_a_bias_that_only_some_blocks_have_is_refused(folder: Path) -> None:
    change_tensors(folder, **{"layer.1.attention.q_proj.bias": None})
    with pytest.raises(CheckpointError, match=r"some blocks have a bias of attn\.q, and others do"):
        load_checkpoint(folder)


def test_a_tensor_that_is_missing_is_named(folder: Path) -> None:
    change_tensors(folder, **{"layer.1.mlp.up_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.weight .* is missing"):
        load_checkpoint(folder)


def test_tensors_alone_do_not_show_how_the_model_computes(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Hugging Face's DINOv3, but not its config\.json"):
        load_checkpoint(saved(tensors, tmp_path))


@pytest.mark.parametrize(
    "extra", [{"rope_embed.periods": torch.ones(4)}, {"storage_tokens": torch.ones(1, 4, 16)}, {}]
)
def test_the_names_of_other_projects_are_refused(
    extra: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    kernel = load_file(folder / "model.safetensors")["embeddings.patch_embeddings.weight"]
    blocks = {"blocks.0.norm1.weight": torch.ones(16), "cls_token": torch.ones(1, 1, 16)}
    with pytest.raises(CheckpointError, match=r"rotary positions \(DINOv3\).* Hugging Face's for"):
        load_checkpoint(saved({"patch_embed.proj.weight": kernel} | blocks | extra, tmp_path))
