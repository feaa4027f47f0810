"""Detect the format of a checkpoint, and the naming scheme of a state dict."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple

from pcae_training.checkpoint import MODEL_TYPE, CheckpointError, read_json

#: Names of the weights file in a folder, in order of preference.
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

_PATCH_KERNEL = re.compile(
    r"(?P<prefix>(?:.*\.)?)"
    r"(?:patch_embed\.proj|(?P<hugging_face>embeddings\.patch_embeddings\.projection))\.weight"
)


class Format(Enum):
    """The formats that `readers` can read."""

    OWN = auto()  # a folder written by pcae-train
    HUGGING_FACE = auto()  # a folder whose config.json has a model_type
    TIMM = auto()  # a folder whose config.json has an architecture
    STATE_DICT = auto()  # a file of tensors, without config.json


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk."""

    path: Path  # as error messages name it
    format: Format
    weights: Path  # the file of tensors; the folder itself if OWN
    config: Mapping[str, Any] = field(default_factory=dict)  # content of config.json


def detect_format(path: Path) -> Source:
    """Return the format of `path` and where its weights are. Raise CheckpointError if not found."""
    if path.name in FOLDER_WEIGHTS and (path.parent / "config.json").exists():
        path = path.parent  # config.json has what the tensors do not show
    if path.is_file():
        return Source(path, Format.STATE_DICT, path)
    if not path.exists() and path.suffix in FILE_SUFFIXES:
        raise CheckpointError(f"checkpoint not found: {path} does not exist")
    if not (path / "config.json").exists():  # the reader looks for what a killed writer left
        return Source(path, Format.OWN, path)
    config = read_json(path / "config.json")
    if config.get("model_type") == MODEL_TYPE:
        return Source(path, Format.OWN, path)
    if not config:
        return Source(path, Format.STATE_DICT, _find_weights(path))
    kind = Format.TIMM if "architecture" in config else Format.HUGGING_FACE
    return Source(path, kind, _find_weights(path), config)


def _find_weights(folder: Path) -> Path:
    for name in FOLDER_WEIGHTS:
        if (folder / name).exists():
            return folder / name
    names = " nor ".join(FOLDER_WEIGHTS)
    raise CheckpointError(f"{folder} contains neither {names}; sharded weights are not supported")


class Naming(NamedTuple):
    """How a state dict names the encoder's tensors."""

    prefix: str  # precedes every name of the encoder, such as "backbone."
    hugging_face: bool  # else timm, which MAE, DeiT, DINO and this project follow


def detect_naming(names: Iterable[str]) -> Naming:
    """Return the naming scheme, recognised by the patch kernel's name.

    Raise ValueError if there is no patch kernel or more than one.
    """
    kernels = [match for name in names if (match := _PATCH_KERNEL.fullmatch(name))]
    if not kernels:
        raise ValueError("not a vision transformer: it has no patch_embed.proj.weight")
    if len(kernels) > 1:
        found = ", ".join(match[0] for match in kernels)
        raise ValueError(f"contains more than one encoder ({found}); save one of them separately")
    return Naming(kernels[0]["prefix"], kernels[0]["hugging_face"] is not None)
