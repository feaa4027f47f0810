"""Checkpoints as other projects write them: tiny, and random by a seed.

State dicts are those of our own model, renamed; folders are `transformers`' own.
"""

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcae_training.import_weights import LoadedCheckpoint
from pcae_training.model import VisionTransformer, ViTConfig

TINY = ViTConfig(
    image_size=24,
    patch_size=4,
    width=16,
    depth=2,
    heads=2,
    classes=5,
    pooling="cls",
    reduction_points=(),
)
SCALED = replace(TINY, layer_scale=True)
#: The same sizes for the configs of `transformers`.
SIZES = {
    "image_size": 24,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layer_norm_eps": 0.05,  # far from every default: it must be read
}

Weights = dict[str, Tensor]


def vit(config: ViTConfig = TINY, seed: int = 0) -> VisionTransformer:
    model: VisionTransformer = randomised(VisionTransformer(config), seed)
    return model


def randomised(model: Any, seed: int = 0) -> Any:
    """Every parameter random: none that is zero or one at first may be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def rebuilt(found: LoadedCheckpoint) -> VisionTransformer:
    model = VisionTransformer(found.config)
    model.load_state_dict(found.weights)
    return model.eval()


def saved(content: Any, folder: Path, name: str = "x.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def renamed(weights: Weights, *renames: tuple[str, str]) -> Weights:
    for pattern, replacement in renames:
        weights = {re.sub(pattern, replacement, name): t for name, t in weights.items()}
    return weights


def mae_pretrained(weights: Weights) -> Any:
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 16)}
    encoder = {n: t for n, t in weights.items() if not n.startswith("head.")}
    options = argparse.Namespace(lr=1e-3, model="mae_vit_base")
    return {"model": encoder | decoder, "epoch": 799, "args": options}


def mae_finetuned(weights: Weights) -> Any:
    return {"model": weights, "epoch": 99}


def dino_teacher(weights: Weights) -> Any:
    backbone = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    return {"teacher": backbone | {"head.mlp.0.weight": torch.zeros(8, 16)}, "epoch": 1}


def in_chunks(weights: Weights) -> Any:
    """As DINOv2's own training keeps them."""
    renames = (r"^blocks\.(\d)", r"blocks.\1.\1"), ("^reg_token", "register_tokens")
    return renamed(weights, *renames) | {"mask_token": torch.zeros(1, 16)}


def giant(weights: Weights) -> Any:
    """As DINOv2's own training names gated MLPs."""
    return renamed(weights, (r"\.fc1\.", ".w12."), (r"\.fc2\.", ".w3."))


def deit_3(weights: Weights) -> Any:
    """Its CLS token has no position: the one it has here goes into the token."""
    patches = weights["pos_embed"][:, 1:]
    cls = weights["cls_token"] + weights["pos_embed"][:, :1]
    weights = weights | {"pos_embed": patches, "cls_token": cls}
    return {"model": renamed(weights, (r"\.ls(\d)\.gamma", r".gamma_\1"))}


class Malicious:
    """Whoever unpickles it runs code, which makes `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)
