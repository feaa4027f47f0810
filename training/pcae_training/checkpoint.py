"""A checkpoint is a folder that rebuilds its model: two configs, the weights, the state to resume.

    config.json                sizes, labels            (Hugging Face field names)
    preprocessor_config.json   how images become pixels
    model.safetensors          weights under timm's names
    training_state.safetensors / training.json   optimiser and position, to resume

Written whole or not at all, also when the power goes: a new one is made and synced as `.NAME.new`;
the old one steps aside as `.NAME.old` until the new one stands in its place, where `load` finds it
if the writer was killed. One writer at a time. A training run's folder may stand for the checkpoint
inside it. It knows nothing of data or schedules.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pcae_serve import atomic
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_training.model import VisionTransformer, ViTConfig

MODEL_TYPE = "pcae_vit"
#: Where a training run keeps its checkpoint, inside its folder.
LAST = "checkpoint"


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
        "reduction": config.reduction,
        "qkv_bias": config.qkv_bias,
        "layer_scale": config.layer_scale,
        "distilled": config.distilled,
        "num_register_tokens": config.registers,
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
        # checkpoints of version 0.1 lack what follows
        reduction=config.get("reduction", "ptr"),
        qkv_bias=config.get("qkv_bias", True),
        layer_scale=config.get("layer_scale", False),
        distilled=config.get("distilled", False),
        registers=config.get("num_register_tokens", 0),
    ), labels


def save_checkpoint(
    checkpoint: Checkpoint, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write the folder beside its place, then put it there: the last good one is never lost.

    Raises CheckpointError where it cannot be written, or would replace what is no checkpoint.
    """
    check_place(folder)
    folder = folder.absolute()
    fresh = folder.with_name(f".{folder.name}.new")
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
        atomic.replace_folder(fresh, folder)
    except (OSError, SafetensorError) as error:  # of a full disk, say
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


def load_checkpoint(folder: Path) -> Checkpoint:
    """Rebuild the model (float32, evaluation mode).

    Raises CheckpointError with one line that names the file at fault.
    """
    found = place(folder)
    content = read_json(found / "config.json")
    if content.get("model_type") != MODEL_TYPE:
        kind = content.get("model_type")
        raise CheckpointError(
            f"{found / 'config.json'}: model_type is {kind!r}, not {MODEL_TYPE!r}"
        )
    try:
        config, labels = from_config(content)
        preprocess = Preprocess.from_config(read_json(found / "preprocessor_config.json"))
    except KeyError as error:
        raise CheckpointError(f"{folder}: its configuration lacks {error}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: its configuration is damaged: {error}") from None
    training_file = found / "training.json"
    training = read_json(training_file) if training_file.exists() else {}
    weights = read_tensors(found / "model.safetensors")
    try:
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
    file = place(folder) / "training_state.safetensors"
    return read_tensors(file) if file.exists() else None


def place(folder: Path) -> Path:
    """Where the last good checkpoint is: `folder`, or beside it where a writer was killed.

    Or inside it, where `folder` is that of a training run.
    """
    for candidate in (folder, folder / LAST):
        old = atomic.previous(candidate.absolute())
        if (candidate / "config.json").exists():
            return candidate
        if old.exists() and not candidate.exists():
            return old
    return folder


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where there is none."""
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


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; CheckpointError where it is missing or damaged."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint: {file} is missing") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
