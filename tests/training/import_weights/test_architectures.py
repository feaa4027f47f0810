"""Architectures that are not supported are refused in one line that names them and what is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights import load_checkpoint
from tests.support.foreign_checkpoints import saved, vit

STAGES = {"hidden_sizes": [8, 8], "depths": [1, 1]}
#: Class in `transformers`, its sizes, and what its tensors alone show.
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "beit": ("BeitModel", {"use_relative_position_bias": True}, "BEiT, Data2Vec, SAM"),
    "data2vec-vision": ("Data2VecVisionModel", {}, "BEiT, Data2Vec, SAM"),
    "swin": ("SwinModel", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}, "Swin, whose"),
    "convnext": ("ConvNextModel", STAGES | {"num_stages": 2}, "ConvNeXt"),
    "dinov3_convnext": ("DINOv3ConvNextModel", STAGES, "ConvNeXt"),
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "supported: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", OTHERS)
def test_models_of_transformers(hugging_face: Any, kind: str, tmp_path: Path) -> None:
    name, sizes, shown = OTHERS[kind]
    found = getattr(hugging_face, name)
    given = sizes if "depths" in sizes else SIZES | sizes
    model = found(found.config_class(**given))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    refused(tmp_path, f'model_type is "{kind}"; supported: vit, deit, ')
    refused(saved(model.state_dict(), tmp_path), f"not supported: {shown}.* DINOv2 name their ten")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("siglip2", r"\(NaFlex, .* SigLIP 2 of a fixed resolution is of siglip\); supported: vit"),
        ("timm_wrapper", r"\(give the folder of timm that it was made from\); supported: vit, "),
        ("vit_of_tomorrow", '"vit_of_tomorrow"; supported: vit, deit, .*, dinov3_vit, .*, siglip'),
    ],
)
def test_a_model_type_is_named(kind: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    saved({}, tmp_path, "pytorch_model.bin")
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "architecture",
    [
        "eva02_base_patch14_224.mim_in22k", "beit_base_patch16_224", "swin_tiny_patch4_window7_224",
        "convnext_tiny", "vit_base_patch16_clip_224.openai", "vit_base_patch16_siglip_224",
        "vit_small_patch16_dinov3.lvd1689m",
    ],
)  # fmt: skip
def test_an_architecture_of_timm_is_named(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
    saved({}, tmp_path, "pytorch_model.bin")
    refused(tmp_path, f'architecture is "{architecture}"; supported: vit_, deit_ or deit3_')


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.0.attn.q_proj.weight"], "EVA or EVA-02"),  # timm's base
        (["blocks.0.attn.q_bias", "blocks.0.mlp.fc1.weight"], "EVA or EVA-02"),  # its small
        (["blocks.0.mlp.fc1_g.weight"], "EVA or EVA-02"),
        (["blocks.0.attn.q_bias", "blocks.0.attn.relative_position_bias_table"], "BEiT, Data2Vec"),
        (["blocks.0.attn.rel_pos_h"], "BEiT, Data2Vec, SAM"),
        (["layers.1.downsample.norm.weight"], "Swin"),
        (["stages.0.blocks.0.conv_dw.weight"], "ConvNeXt"),
        (["visual.transformer.resblocks.0.ln_1.weight"], "OpenCLIP, except in Hugging Face's for"),
        (["visual.trunk.blocks.0.norm1.weight", "text.x"], "OpenCLIP, except in Hugging Face's"),
        (["encoder.layers.encoder_layer_0.ln_1.weight"], "ViTs of torchvision"),
    ],
)
def test_names_of_other_projects(names: list[str], message: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = dict(vit().state_dict())  # the rest is no reason to refuse it
    tensors |= {name: torch.zeros(2) for name in names}
    refused(saved(tensors, tmp_path), rf"not supported: {message}.*\(tensor ")


def test_a_folder_of_openclip(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "open_clip_model.safetensors").touch()
    refused(tmp_path, "is a model of OpenCLIP; supported: CLIP and SigLIP in the format of")
