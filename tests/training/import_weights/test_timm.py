"""config.json of timm: obeyed, or refused by field and value."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights import LoadedCheckpoint, load_checkpoint
from pcae_training.model import VisionTransformer, ViTConfig
from tests.support.foreign_checkpoints import TINY, randomised, rebuilt, renamed, vit

CONFIG: dict[str, Any] = {
    "architecture": "vit_small_patch16_224.augreg_in21k",
    "num_classes": 5,
    "global_pool": "token",
    "model_args": {"num_heads": 2},
    "pretrained_cfg": {"input_size": [3, 24, 24], "hf_hub_id": "timm/x", "license": "mit"},
}


def read(folder: Path, weights: Any = None, **changes: Any) -> LoadedCheckpoint:
    save_file(vit().state_dict() if weights is None else weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return load_checkpoint(folder)


def test_labels_heads_and_defaults(tmp_path: Path) -> None:
    found = read(tmp_path, label_names=["crane", "b", "c", "crane", "e"])
    assert found.labels == ["crane", "b", "c", "crane", "e"]
    assert found.config == TINY
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert found.preprocess == Preprocess(24, 27, mean, std, crop_offset="half-even")


def test_another_number_of_heads_is_obeyed(tmp_path: Path) -> None:
    assert read(tmp_path, model_args={"num_heads": 4}).config.heads == 4


@pytest.mark.parametrize(
    ("width", "args", "heads"), [(384, {}, 6), (192, {"embed_dim": 192}, 6), (128, {}, 2)]
)
def test_heads_by_architecture(
    width: int, args: dict[str, Any], heads: int, tmp_path: Path
) -> None:
    model = VisionTransformer(replace(TINY, width=width, heads=1, depth=1, mlp_ratio=0.1))
    assert read(tmp_path, model.state_dict(), model_args=args).config.heads == heads


@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_the_mlps_of_dinov2s_giant_are_gated(name: str, tmp_path: Path) -> None:
    registers = 4 if "reg4" in name else 0
    sizes: dict[str, Any] = {"layer_scale": True, "registers": registers, "mlp_ratio": 1.5}
    config = replace(TINY, gated_mlp=True, activation="silu", **sizes)
    args = {"num_heads": 2, "mlp_ratio": 3.0}
    found = read(tmp_path, vit(config).state_dict(), architecture=name, model_args=args)
    assert found.config == config
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(rebuilt(found)(images), vit(config)(images))
    args["mlp_ratio"] = 1.5
    with pytest.raises(CheckpointError, match=r"mlp_ratio is 1\.5, but the weights have 3"):
        read(tmp_path, vit(config).state_dict(), architecture=name, model_args=args)
    with pytest.raises(CheckpointError, match=r"fc1.weight has shape \[48, 16\], expected \[24"):
        read(tmp_path, vit(config).state_dict())


def pooled(config: ViTConfig, images: torch.Tensor, mean: bool, norm: Any) -> torch.Tensor:
    """timm's forward_head, by hand."""
    model: Any = randomised(VisionTransformer(config))
    *_, last = model.walk(model.embed(images))
    x = last.x
    if norm == "before":
        x = model.norm(x)
    x = x[:, 1:].mean(dim=1) if mean else x[:, 0]
    head: torch.Tensor = model.head(x)
    return head


@torch.inference_mode()
def test_average_pooling_with_the_norm_before_it(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    args = {"num_heads": 2, "global_pool": "avg", "fc_norm": False}
    found = read(tmp_path, global_pool="avg", model_args=args)
    assert found.config.pooling == "normed-mean"
    torch.testing.assert_close(
        rebuilt(found)(images), pooled(TINY, images, mean=True, norm="before")
    )
    # fc_norm on the CLS token is the usual norm under another name
    weights = renamed(vit().state_dict(), ("^norm", "fc_norm"))
    found = read(tmp_path, weights, model_args={"num_heads": 2, "fc_norm": True})
    assert torch.equal(rebuilt(found)(images), vit()(images))
    mean = replace(TINY, pooling="mean")
    found = read(tmp_path, vit(mean).state_dict(), global_pool="avg")
    assert torch.equal(rebuilt(found)(images), vit(mean)(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "architecture is"),
        ({"architecture": "swin_tiny"}, "architecture is"),
        ({"global_pool": "map"}, 'config.json: global_pool is "map"; supported: "token" or "avg"'),
        ({"global_pool": "avg"}, "global_pool 'avg' with fc_norm true needs fc_norm.weight"),
        ({"model_args": {"global_pool": "avg"}}, "model_args.global_pool is 'avg', global_pool is"),
        ({"model_args": {"act_layer": "quick_gelu"}}, 'act_layer is "quick_gelu"; supported'),
        ({"model_args": {"pool_include_prefix": True}}, "pool_include_prefix is true"),
        ({"model_args": {"block_fn": "parallel"}}, 'model_args: field "block_fn"'),
        ({"model_args": {"depth": 3}}, "depth is 3, but the weights have 2"),
        ({"model_args": {"img_size": [24, 48]}}, r"img_size is \[24, 48\]; supported"),
        ({"model_args": {"init_values": 1e-5}}, "init_values is true, but the weights have False"),
        ({"label_names": ["a"]}, "label_names has 1 names for 5 classes"),
        ({"num_classes": 1000}, "num_classes is 1000, but the weights have 5"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, 'crop_mode is "border"; supported'),
        ({"pretrained_cfg": {"crop_pct": 1.1}}, "crop_pct is 1.1; supported"),
        ({"pretrained_cfg": {"interpolation": "random"}}, 'interpolation is "random"'),
        ({"pretrained_cfg": {"interpolation": "box"}}, 'interpolation is "box"'),
        ({"pretrained_cfg": {"input_size": [3, 24, 48]}}, "input_size is"),
        ({"pretrained_cfg": {"mystery": 1}}, 'pretrained_cfg: field "mystery"'),
        ({"mystery": 1}, r'config.json: field "mystery" \(1\) is not known'),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "model_args" in changes:
        changes = {"model_args": {"num_heads": 2} | changes["model_args"]}
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_squashed_images_are_cropped_after(tmp_path: Path) -> None:
    cfg = {"input_size": [3, 24, 24], "crop_mode": "squash", "crop_pct": 0.8}
    found = read(tmp_path, pretrained_cfg=cfg).preprocess
    assert found is not None
    assert (found.squash, found.resize, found.image_size) == (True, 30, 24)


def test_a_flat_configuration_of_early_versions(tmp_path: Path) -> None:
    save_file(vit().state_dict(), tmp_path / "model.safetensors")
    flat = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "crop_pct": 0.9}
    flat |= {"input_size": [3, 24, 24], "first_conv": "patch_embed.proj"}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    found = load_checkpoint(tmp_path, heads=2).preprocess
    assert found is not None
    assert found.resize == 26
