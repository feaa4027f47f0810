"""A checkpoint is a folder that rebuilds its model: two configs, the weights, the state to resume.

    config.json                sizes, labels            (Hugging Face field names)
    preprocessor_config.json   how images become pixels
    model.safetensors          weights under timm's names
    training_state.safetensors / training.json   optimiser and position, to resume

Written whole or not at all. It knows nothing of data or schedules.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pcae_serve.errors import PcaeError
from pcae_serve.preprocess import Preprocess
from pcae_training.model import ViTConfig, VisionTransformer

MODEL_TYPE = "pcae_vit"


class CheckpointError(PcaeError):
    """The checkpoint is missing, damaged or of another kind."""


@dataclass
class Checkpoint:
    """A model in memory with what it needs to be used."""

    model: VisionTransformer
    preprocess: Preprocess
    labels: list[str]
    training: dict[str, Any] = field(default_factory=dict)  # how it came about: goes on the card


def to_config(config: ViTConfig, labels: list[str]) -> dict[str, Any]:
    """config.json, with the field names of Hugging Face's ViTConfig where it has one."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["VisionTransformer"],
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "layer_norm_eps": config.norm_eps,
        "pooling": config.pooling,
        "reduction_points": list(config.reduction_points),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def from_config(config: dict[str, Any]) -> tuple[ViTConfig, list[str]]:
    """The inverse of `to_config`. Raises KeyError where a field is missing."""
    labels = [config["id2label"][str(i)] for i in range(len(config["id2label"]))]
    return ViTConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        channels=config["num_channels"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
        classes=len(labels),
        pooling=config["pooling"],
        norm_eps=config["layer_norm_eps"],
        reduction_points=tuple(config["reduction_points"]),
    ), labels


def save(checkpoint: Checkpoint, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the folder beside its place, then put it there: a reader sees the old one or the new."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        config = to_config(checkpoint.model.config, checkpoint.labels)
        _write_json(fresh / "config.json", config)
        _write_json(fresh / "preprocessor_config.json", checkpoint.preprocess.to_config())
        _write_json(fresh / "training.json", checkpoint.training)
        weights = {k: v.contiguous() for k, v in checkpoint.model.state_dict().items()}
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        if state is not None:
            save_file(state, fresh / "training_state.safetensors")
        fresh.chmod(0o755)
        if folder.exists():
            old = fresh.with_name(f"{fresh.name}.old")
            os.rename(folder, old)
            os.rename(fresh, folder)
            shutil.rmtree(old)
        else:
            os.rename(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(folder: Path, patch_size: int | None = None) -> Checkpoint:
    """Rebuild the model (float32, evaluation mode); `patch_size` resizes patch and positions to it.

    Raises CheckpointError with one line that names the file at fault.
    """
    try:
        config, labels = from_config(json.loads((folder / "config.json").read_text()))
        preprocess = Preprocess.from_config(
            json.loads((folder / "preprocessor_config.json").read_text())
        )
        training_file = folder / "training.json"
        training = json.loads(training_file.read_text()) if training_file.exists() else {}
        weights = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error.filename} is missing") from None
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no checkpoint of pcae-train: {error}") from None
    if patch_size is not None and patch_size != config.patch_size:
        config = replace(config, patch_size=patch_size)
        weights = resize_patches(weights, config)
    model = VisionTransformer(config)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: weights and config.json disagree: {reason}") from None
    return Checkpoint(model.eval(), preprocess, labels, training)


def load_state(folder: Path) -> dict[str, Tensor] | None:
    """The training state saved with the checkpoint, or None where it was saved without."""
    file = folder / "training_state.safetensors"
    return load_file(file) if file.exists() else None


def resize_patches(weights: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Weights for another patch size at the same image size.

    Patch kernels by the pseudo-inverse of bilinear resizing, so that a resized patch gives the
    token it gave before, as nearly as it can (FlexiViT, arXiv 2212.08013, section 3.4); positions by bicubic interpolation.
    """
    kernel = weights["patch_embed.proj.weight"]  # [D, C, p, p]
    old, new = kernel.shape[-1], config.patch_size
    unit = torch.eye(old * old).view(old * old, 1, old, old)
    smaller = F.interpolate(unit, size=(new, new), mode="bilinear", antialias=False)
    resize = smaller.view(old * old, new * new).T  # [new^2, old^2]: a flat patch to the new size
    resized = kernel.float().flatten(2) @ torch.linalg.pinv(resize)  # [D, C, new^2]
    positions = weights["pos_embed"].float()  # [1, 1 + n, D]
    cls, grid = positions[:, :1], positions[:, 1:]
    side = int(grid.shape[1] ** 0.5)
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(config.grid, config.grid), mode="bicubic", antialias=False)
    return weights | {
        "patch_embed.proj.weight": resized.view(*kernel.shape[:2], new, new),
        "pos_embed": torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1),
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
