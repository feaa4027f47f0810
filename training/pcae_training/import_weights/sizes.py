"""Derive a model's sizes from its tensors' shapes, and check tensors against a model's shapes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pcae_serve.bundle.tokens import Pooling, reduction_points
from pcae_training.model import VisionTransformer, ViTConfig

#: Heads of published models that do not have 64 channels per head: SO400M, ViT-H, -g and -G.
HEADS_BY_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


def require_tensor(weights: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    """Return a tensor by name. Raise ValueError if it is missing or has another dimension count."""
    if name not in weights:
        raise ValueError(f"{name} is missing")
    tensor = weights[name]
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} {list(tensor.shape)} must have {dimensions} dimensions")
    return tensor


def infer_config(
    weights: Mapping[str, Tensor],
    heads: int | None,
    norm_eps: float,
    pooling: Pooling | None = None,
    stated: Mapping[str, Any] | None = None,
) -> ViTConfig:
    """Return the sizes that the shapes of `weights` imply; they do not imply heads and norm_eps.

    heads: None for the published models' number at that width. pooling: None for the one that the
    names and shapes of norm and head imply. stated: other fields of ViTConfig that no tensor shows.
    Raise ValueError if a tensor is missing or its shape does not fit a ViT.
    """
    width, channels, patch_size, _ = require_tensor(weights, "patch_embed.proj.weight", 4).shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    class_token, distilled = "cls_token" in weights, "dist_token" in weights
    stated = dict(stated or {})
    if "image_size" not in stated:
        stated["image_size"] = patch_size * _count_side(weights, class_token + distilled)
    hidden = require_tensor(weights, "blocks.0.mlp.fc2.weight", 2).shape[1]
    has_head, has_registers = "head.weight" in weights, "reg_token" in weights
    projects = "projection.weight" in weights
    return ViTConfig(
        patch_size=patch_size,
        channels=channels,
        width=width,
        depth=depth,
        heads=heads or _published_heads(width),
        mlp_ratio=hidden / width,
        classes=require_tensor(weights, "head.weight", 2).shape[0] if has_head else 0,
        pooling=pooling or _implied_pooling(weights, width),
        norm_eps=norm_eps,
        reduction_points=reduction_points(depth),
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        layer_scale="blocks.0.ls1.gamma" in weights,
        distilled=distilled,
        class_token=class_token,
        registers=require_tensor(weights, "reg_token", 3).shape[1] if has_registers else 0,
        pre_norm="norm_pre.weight" in weights,
        projection=require_tensor(weights, "projection.weight", 2).shape[0] if projects else 0,
        **stated,
    )


def _count_side(weights: Mapping[str, Tensor], prefix: int) -> int:
    """Return the number of patches along a side, of which there is a position for each."""
    if "pos_embed" not in weights:
        raise ValueError(
            "pos_embed is missing; rotary positions (DINOv3) are supported in Hugging Face's format"
        )
    patches = require_tensor(weights, "pos_embed", 3).shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    if side**2 != patches:
        raise ValueError(f"{patches} patches do not form a square grid; only those are supported")
    return side


def _implied_pooling(weights: Mapping[str, Tensor], width: int) -> Pooling:
    if "fc_norm.weight" in weights:
        return "mean"
    if "attn_pool.latent" in weights:
        return "attention"
    head = weights.get("head.weight")
    return "cls-mean" if head is not None and head.shape[1:] == (2 * width,) else "cls"


def _published_heads(width: int) -> int:
    heads, rest = divmod(width, 64)
    if width in HEADS_BY_WIDTH:
        return HEADS_BY_WIDTH[width]
    if rest:
        raise ValueError(f"cannot derive the number of heads from width {width}; give --heads")
    return heads


def list_shapes(config: ViTConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a model of `config`, without allocating one."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_shapes(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError for the first tensor that is missing, misshapen or unexpected."""
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"{name} {list(shape)} is missing")
        if weights[name].shape != shape:
            actual = list(weights[name].shape)
            raise ValueError(f"{name} has shape {actual}, expected {list(shape)}")
    for name in weights:
        if name not in shapes:
            raise ValueError(f"unexpected tensor {name} {list(weights[name].shape)}")
