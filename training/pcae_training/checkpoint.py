"""Save and load pcae-train's checkpoints: a folder with the model, its preprocessing and labels.

    config.json                sizes, labels            (Hugging Face field names)
    preprocessor_config.json   how images become pixels
    model.safetensors          weights under timm's names
    training_state.safetensors / training.json   optimiser state and position in the run, to resume

Writing is atomic, also if the power fails: the new folder is written and synced as `.NAME.new`, the
old one is renamed to `.NAME.old` and removed after the new one has its name. `load` finds the old
one if the writer was killed in between. One writer at a time. Wherever a checkpoint is read, the
folder of the training run that contains it is accepted too. Checkpoints of other projects:
`import_weights`.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pcae_serve import atomic, bounded_json
from pcae_serve.bundle import processor_config
from pcae_serve.bundle.manifest import Answers
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.processor_config import read_own_processor
from pcae_serve.errors import PcaeError
from pcae_training.model import VisionTransformer
from pcae_training.model_config import from_config, to_config
from pcae_training.output import check_writable
from pcae_training.weights_file import check_safetensors

#: Characters of what torch says about weights that do not fit: it lists every tensor.
MAX_REASON = 400
#: Name of the checkpoint inside the folder of a training run.
RUN_CHECKPOINT = "checkpoint"


class CheckpointError(PcaeError):
    """A checkpoint is missing, damaged or of an unsupported kind."""


@dataclass
class Checkpoint:
    """A model with the preprocessing and labels it is used with."""

    model: VisionTransformer
    preprocess: Preprocess
    labels: list[str]
    training: dict[str, Any] = field(default_factory=dict)  # how it was trained, for the model card
    multi_label: bool = False  # labels are independent: a sigmoid each, instead of a softmax

    @property
    def answers(self) -> Answers:
        """Return what the model's outputs mean."""
        if not self.model.config.classes:
            return "features"
        return "labels" if self.multi_label else "classes"


def save(checkpoint: Checkpoint, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a checkpoint atomically; a previous one is replaced only by a complete one.

    state: what `load_state` returns. Raise CheckpointError if it cannot be written, or if `folder`
    exists and is not a checkpoint.
    """
    check_replaceable(folder)
    folder = folder.absolute()
    fresh = folder.with_name(f".{folder.name}.new")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)  # left by a writer that was killed
        fresh.mkdir()
        config = to_config(checkpoint.model.config, checkpoint.labels, checkpoint.multi_label)
        _write_json(fresh / "config.json", config)
        _write_json(fresh / "preprocessor_config.json", checkpoint.preprocess.to_config())
        _write_json(fresh / "training.json", checkpoint.training)
        _write_tensors(fresh / "model.safetensors", checkpoint.model.state_dict())
        if state is not None:
            _write_tensors(fresh / "training_state.safetensors", state)
        atomic.replace_folder(fresh, folder)
    except (OSError, SafetensorError) as error:  # such as a full disk
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raise CheckpointError unless `folder` does not exist, is empty or is a checkpoint."""
    try:
        replaceable = (
            not folder.exists()
            or (folder / "training.json").exists()  # written by `save` alone
            or (folder.is_dir() and not any(folder.iterdir()))
        )
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from None
    if not replaceable:
        raise CheckpointError(f"{folder} exists and is not a checkpoint, so it is not replaced")
    if not folder.exists():
        check_writable(folder)


def load(folder: Path) -> Checkpoint:
    """Load a checkpoint, its model in float32 and evaluation mode.

    Raise CheckpointError with a one-line message that names the faulty file.
    """
    found = find_checkpoint(folder)
    content = read_json(found / "config.json")
    try:
        config, labels, multi_label = from_config(content, str(found / "config.json"))
        file = found / processor_config.FILE
        preprocess = read_own_processor(read_json(file), str(file))
    except KeyError as error:
        raise CheckpointError(f"{folder}: its configuration has no field {error}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: its configuration is invalid: {error}") from None
    training_file = found / "training.json"
    training = read_json(training_file) if training_file.exists() else {}
    weights = read_tensors(found / "model.safetensors")
    try:
        with torch.device("meta"):  # a wrong size is found before anything is allocated
            VisionTransformer(config).load_state_dict(weights, assign=True)
        model = VisionTransformer(config)
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except ValueError as error:  # of ViTConfig
        raise CheckpointError(f"{folder}: {error}") from None
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:MAX_REASON]
        raise CheckpointError(f"{folder}: the weights do not match config.json: {reason}") from None
    return Checkpoint(model.eval(), preprocess, labels, training, multi_label)


def load_state(folder: Path) -> dict[str, Tensor] | None:
    """Return the training state saved with a checkpoint, or None if it was saved without."""
    file = find_checkpoint(folder) / "training_state.safetensors"
    return read_tensors(file) if file.exists() else None


def find_checkpoint(folder: Path) -> Path:
    """Return the folder of the last complete checkpoint.

    It is `folder`, or `folder`/checkpoint of a training run, or the previous one next to either if
    a writer was killed while replacing it. Return `folder` if there is none.
    """
    for candidate in (folder, folder / RUN_CHECKPOINT):
        old = atomic.previous(candidate.absolute())
        if (candidate / "config.json").exists():
            return candidate
        if old.exists() and not candidate.exists():
            return old
    return folder


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise CheckpointError if there is none."""
    try:
        content = bounded_json.read_json(file)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint not found: {file} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(content, file, metadata={"format": "pt"})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raise CheckpointError if missing or damaged."""
    try:
        check_safetensors(file)
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint not found: {file} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
