"""A checkpoint is a folder that rebuilds its model: two configs, the weights, the state to resume.

    config.json                sizes, labels            (Hugging Face field names)
    preprocessor_config.json   how images become pixels
    model.safetensors          weights under timm's names
    training_state.safetensors / training.json   optimiser and position, to resume

Written whole or not at all: a new one is made as `.NAME.new`; the old one steps aside as
`.NAME.old` until the new one stands in its place, where `load` finds it if the writer was killed.
One writer at a time. It knows nothing of data or schedules.
"""

import json
import math
import shutil
from collections.abc import Mapping
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
from pcae_training.model import VisionTransformer, ViTConfig

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
        "intermediate_size": config.hidden,
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
    """Write the folder beside its place, then put it there: the last good one is never lost.

    Raises CheckpointError where it cannot be written, or would replace what is no checkpoint.
    """
    check_place(folder)
    folder = folder.absolute()
    fresh, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)  # of a writer that was killed
        fresh.mkdir()
        config = to_config(checkpoint.model.config, checkpoint.labels)
        _write_json(fresh / "config.json", config)
        _write_json(fresh / "preprocessor_config.json", checkpoint.preprocess.to_config())
        _write_json(fresh / "training.json", checkpoint.training)
        _write_tensors(fresh / "model.safetensors", checkpoint.model.state_dict())
        if state is not None:
            _write_tensors(fresh / "training_state.safetensors", state)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_place(folder: Path) -> None:
    """Raise CheckpointError unless `folder` is free, empty or a checkpoint: all else is kept."""
    try:
        replaceable = (
            not folder.exists()
            or (folder / "training.json").exists()  # `save` writes it, other tools' folders lack it
            or (folder.is_dir() and not any(folder.iterdir()))
        )
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from None
    if not replaceable:
        raise CheckpointError(f"{folder} exists and is no checkpoint: it is not replaced")


def load(folder: Path, patch_size: int | None = None) -> Checkpoint:
    """Rebuild the model (float32, evaluation mode); `patch_size` resizes patch and positions to it.

    Raises CheckpointError with one line that names the file at fault.
    """
    place = _place(folder)
    content = _read_json(place / "config.json")
    if content.get("model_type") != MODEL_TYPE:
        kind = content.get("model_type")
        raise CheckpointError(
            f"{place / 'config.json'}: model_type is {kind!r}, not {MODEL_TYPE!r}"
        )
    try:
        config, labels = from_config(content)
        preprocess = Preprocess.from_config(_read_json(place / "preprocessor_config.json"))
    except KeyError as error:
        raise CheckpointError(f"{folder}: its configuration lacks {error}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: its configuration is damaged: {error}") from None
    training_file = place / "training.json"
    training = _read_json(training_file) if training_file.exists() else {}
    weights = _read_tensors(place / "model.safetensors")
    try:
        if patch_size is not None and patch_size != config.patch_size:
            config = replace(config, patch_size=patch_size)
            weights = resize_patches(weights, config)
        model = VisionTransformer(config)
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except ValueError as error:  # of ViTConfig
        raise CheckpointError(f"{folder}: {error}") from None
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: weights and config.json disagree: {reason}") from None
    return Checkpoint(model.eval(), preprocess, labels, training)


def load_state(folder: Path) -> dict[str, Tensor] | None:
    """The training state saved with the checkpoint, or None where it was saved without."""
    file = _place(folder) / "training_state.safetensors"
    return _read_tensors(file) if file.exists() else None


def resize_patches(weights: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Weights for another patch size at the same image size.

    Patch kernels by the pseudo-inverse of bilinear resizing, so that a resized patch gives the
    token it gave before, as nearly as it can (FlexiViT, arXiv 2212.08013, section 3.4);
    positions by bicubic interpolation.
    """
    kernel = weights["patch_embed.proj.weight"]  # [D, C, p, p]
    old, new = kernel.shape[-1], config.patch_size
    unit = torch.eye(old * old).view(old * old, 1, old, old)
    smaller = F.interpolate(unit, size=(new, new), mode="bilinear", antialias=False)
    resize = smaller.view(old * old, new * new).T  # [new^2, old^2]: a flat patch to the new size
    resized = kernel.float().flatten(2) @ torch.linalg.pinv(resize)  # [D, C, new^2]
    positions = weights["pos_embed"].float()  # [1, 1 + n, D]
    cls, grid = positions[:, :1], positions[:, 1:]
    side = math.isqrt(grid.shape[1])
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(config.grid, config.grid), mode="bicubic", antialias=False)
    return weights | {
        "patch_embed.proj.weight": resized.view(*kernel.shape[:2], new, new),
        "pos_embed": torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1),
    }


def _place(folder: Path) -> Path:
    """Where the last good checkpoint is: `folder`, or beside it where a writer was killed."""
    old = _beside(folder.absolute(), "old")
    return old if old.exists() and not folder.exists() else folder


def _beside(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"no checkpoint: {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no JSON object")
    return content


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(content, file, metadata={"format": "pt"})


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint: {file} is missing") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
