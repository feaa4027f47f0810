"""Detect the format of a checkpoint, and the naming scheme of a state dict."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple

from pcae_serve.sources.needed_files import FOLDER_WEIGHTS, SHARD_INDEX
from pcae_training.checkpoint import CheckpointError, read_json
from pcae_training.import_weights.names import Scheme
from pcae_training.model_config import MODEL_TYPE

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

_SHARD = re.compile(r"(?:model|pytorch_model)-\d{5}-of-\d{5}\.(?:safetensors|bin)")
#: In the folder of a model of OpenCLIP, which may be one of `transformers` as well.
_OPEN_CLIP = "open_clip_config.json"
#: A checkpoint in the output folder of Hugging Face's Trainer.
_TRAINER_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

_PATCH_KERNEL = re.compile(
    r"(?P<prefix>(?:.*\.)?)"
    r"(?P<kernel>patch_embed\.proj|embeddings\.patch_embeddings\.projection"
    r"|embeddings\.patch_embeddings|embeddings\.patch_embedding)\.weight"
)
_SCHEMES: dict[str, Scheme] = {
    "patch_embed.proj": "timm",
    "embeddings.patch_embeddings.projection": "hugging-face",
    "embeddings.patch_embeddings": "dinov3",
    "embeddings.patch_embedding": "clip",
}


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
    weights: Path  # the file of tensors, or the list of its shards; the folder itself if OWN
    config: Mapping[str, Any] = field(default_factory=dict)  # content of config.json
    folders: tuple[Path, ...] = ()  # that may contain the preprocessor, the first one first
    notes: tuple[str, ...] = ()  # what was chosen, for the user


def detect_format(path: Path) -> Source:
    """Return the format of `path` and where its weights are. Raise CheckpointError if not found."""
    if path.name in FOLDER_WEIGHTS and (path.parent / "config.json").exists():
        path = path.parent  # config.json has what the tensors do not show
    elif _SHARD.fullmatch(path.name) and path.is_file():
        path = path.parent  # a part is not a checkpoint
    if path.is_file():
        return Source(path, Format.STATE_DICT, path, folders=(path.parent,))
    if not path.exists() and path.suffix in FILE_SUFFIXES:
        raise CheckpointError(f"checkpoint not found: {path} does not exist")
    saved, notes = _choose_saved(path)
    folders = (saved,) if saved == path else (saved, path)
    if not (saved / "config.json").exists() and (saved / _OPEN_CLIP).exists():
        raise CheckpointError(
            f"{path} is a model of OpenCLIP; supported: CLIP and SigLIP in the format of"
            " `transformers`"
        )
    if not (saved / "config.json").exists():  # the reader looks for what a killed writer left
        return Source(path, Format.OWN, saved)
    config = read_json(saved / "config.json")
    if config.get("model_type") == MODEL_TYPE:
        return Source(path, Format.OWN, saved)
    if not config:
        return Source(path, Format.STATE_DICT, _find_weights(saved), {}, folders, notes)
    kind = Format.TIMM if "architecture" in config else Format.HUGGING_FACE
    return Source(path, kind, _find_weights(saved), config, folders, notes)


def _choose_saved(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder with the weights, and a note if it is one of the Trainer's checkpoints.

    If `folder` itself has no weights, the best checkpoint according to trainer_state.json is used,
    else the last one.
    """
    if not folder.is_dir() or any((folder / name).exists() for name in FOLDER_WEIGHTS):
        return folder, ()
    numbered = sorted(
        (int(match[1]), child)
        for child in folder.iterdir()
        if (match := _TRAINER_CHECKPOINT.fullmatch(child.name)) and (child / "config.json").exists()
    )
    if not numbered:
        return folder, ()
    last = numbered[-1][1]
    state_file = last / "trainer_state.json"
    state = read_json(state_file) if state_file.exists() else {}
    best = state.get("best_model_checkpoint")
    among = f"{folder} has {len(numbered)} checkpoint{'s' * (len(numbered) > 1)} of a Trainer"
    if isinstance(best, str) and best:
        name = re.split(r"[/\\]", best.rstrip("/\\"))[-1]  # the folder may have been moved
        if any(child.name == name for _, child in numbered):
            return folder / name, (f"{among}; {name} is used, the best according to its state",)
        return last, (f"{among}; {last.name} is used, the last, as the best ({name}) is missing",)
    return last, (f"{among}; {last.name} is used, the last",)


def _find_weights(folder: Path) -> Path:
    for name in FOLDER_WEIGHTS:
        if (folder / name).exists():
            return folder / name
    names = " nor ".join(name for name in FOLDER_WEIGHTS if not name.endswith(SHARD_INDEX))
    raise CheckpointError(f"{folder} contains neither {names}, whole or in shards")


class Naming(NamedTuple):
    """How a state dict names the encoder's tensors."""

    prefix: str  # precedes every name of the encoder, such as "backbone."
    scheme: Scheme


def find_encoders(names: Iterable[str]) -> list[Naming]:
    """Return the naming scheme of every encoder, recognised by the patch kernel's name."""
    kernels = [match for name in names if (match := _PATCH_KERNEL.fullmatch(name))]
    return [Naming(kernel["prefix"], _SCHEMES[kernel["kernel"]]) for kernel in kernels]


def detect_naming(names: Iterable[str]) -> Naming:
    """Return the naming scheme. Raise ValueError if there is no encoder or more than one."""
    encoders = find_encoders(names)
    if not encoders:
        raise ValueError("not a vision transformer: it has no patch_embed.proj.weight")
    if len(encoders) > 1:
        found = ", ".join(f"{naming.prefix}…" for naming in encoders)
        raise ValueError(f"contains more than one encoder ({found}); save one of them separately")
    return encoders[0]
