"""Read the state dict out of a file or its shards, without its wrappers and common prefixes.

Training programs often keep two sets of weights: those of the last step (raw), and their moving
average (ema), with which they usually report accuracy. The average is taken by default, as in
timm; a note names what was taken.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pcae_serve.errors import one_line
from pcae_serve.sources.needed_files import SHARD_INDEX
from pcae_training.checkpoint import CheckpointError, read_json, read_tensors
from pcae_training.import_weights.detect import find_encoders
from pcae_training.weights_file import check_claims, check_pickle

WeightsChoice = Literal["raw", "ema"]

#: Keys under which training programs keep the state dict, outermost first; of DINO's two networks
#: the teacher is used, which is the published one.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "shadow")

#: Keys of raw weights and of their average in one file.
PAIRS = (
    ("current_model_state", "state_dict"),  # Lightning's WeightAveraging
    ("state_dict", "state_dict_ema"),  # timm
    ("model", "model_ema"),  # DeiT, torchvision's references
    ("state_dict", "ema_state_dict"),
    ("model_state_dict", "ema_state_dict"),
    ("model_state_dict", "ema_model_state_dict"),
    ("model", "ema"),
    ("state_dict", "ema"),
    ("state_dict", "model_ema"),
    ("student", "teacher"),  # DINO, where the teacher is the student's average
)
#: Keys of averaged weights that have no other meaning.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model_state_dict", "ema")

#: A part of a name that marks averaged weights next to raw ones.
_AVERAGED_NAME = re.compile(r"(?:^|[._])(?:ema|teacher|averaged?|swa|shadow)(?=[._]|$)")

#: A counter among the tensors of torch's AveragedModel.
_COUNTER = "n_averaged"


class StateDict(NamedTuple):
    """Tensors by name, and what was chosen among several, for the user."""

    tensors: dict[str, Tensor]
    notes: list[str]


def read_state_dict(file: Path, choice: WeightsChoice | None = None) -> StateDict:
    """Return the tensors of a PyTorch or safetensors file by name, or of all shards in an index.

    choice: which weights to take if a file has two sets; None for the averaged ones. A pickle runs
    no code: only tensors, plain values and the `argparse.Namespace` that MAE, DeiT and DINO save
    with them are rebuilt. Raise ValueError or CheckpointError if the file is damaged, is not a
    state dict, or lacks the weights that `choice` names.
    """
    notes: list[str] = []
    read = _read_shards if file.name.endswith(SHARD_INDEX) else _read
    try:
        content = _unwrap(read(file), choice, notes)
    except RecursionError:  # pickles can contain themselves
        raise ValueError("its state dict is nested too deeply") from None
    if _COUNTER in content and not notes:
        _take_only_averaged(_COUNTER, choice, notes)
    tensors = {
        str(name): value
        for name, value in content.items()
        if isinstance(value, Tensor) and name != _COUNTER
    }
    tensors = _choose_encoder(_strip_common_prefix(tensors), choice, notes)
    if choice == "ema" and not notes:
        raise ValueError("contains no averaged weights, which --weights ema asks for")
    return StateDict(tensors, notes)


def _read(file: Path) -> Mapping[Any, Any]:
    if file.suffix == ".safetensors":
        return read_tensors(file)
    try:
        check_pickle(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise ValueError(
            "contains objects other than tensors, or is damaged; save its state dict"
        ) from None
    except Exception as error:  # torch raises many kinds on damaged files
        raise ValueError(f"truncated, or not a PyTorch file: {one_line(error)}") from None
    check_claims(content, file)
    if not isinstance(content, dict):
        raise ValueError(f"contains a {type(content).__name__}, expected a state dict")
    return content


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all shards that an index lists. Raise CheckpointError if one lacks."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    files: dict[str, set[str]] = {}
    for tensor, name in places.items():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise CheckpointError(f"{index}: {name!r} is not the name of a file in its folder")
        files.setdefault(name, set()).add(tensor)
    tensors: dict[str, Tensor] = {}
    for number, (name, expected) in enumerate(sorted(files.items()), 1):
        shard = index.parent / name
        if not shard.is_file():
            raise CheckpointError(
                f"{shard} is missing, shard {number} of {len(files)} in {index.name}; download it"
            )
        found = _read(shard)
        if missing := sorted(expected - found.keys()):
            raise CheckpointError(f"{shard} lacks {missing[0]}, which {index.name} lists")
        tensors |= {tensor: found[tensor] for tensor in expected}
    return tensors


def _unwrap(
    content: Mapping[Any, Any], choice: WeightsChoice | None, notes: list[str]
) -> Mapping[Any, Any]:
    """Return the innermost state dict, choosing between raw and averaged weights."""
    callbacks = content.get("callbacks")  # of Lightning; each has a state of its own
    if isinstance(callbacks, dict) and not any(name in content for name in AVERAGED):
        states = (state for state in callbacks.values() if isinstance(state, dict))
        found = {k: v for state in states for k, v in state.items() if k in AVERAGED}
        content = {**content, **found}
    for raw, averaged in PAIRS:
        if _is_filled(content.get(raw)) and _is_filled(content.get(averaged)):
            return _unwrap(content[_taken(raw, averaged, choice, notes)], choice, notes)
    for averaged in AVERAGED:
        if _is_filled(content.get(averaged)):
            _take_only_averaged(averaged, choice, notes)
            return _unwrap(content[averaged], choice, notes)
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            return _unwrap(content[_choose_wrapped(content, key, choice, notes)], choice, notes)
    return content


def _choose_wrapped(
    content: Mapping[Any, Any], key: str, choice: WeightsChoice | None, notes: list[str]
) -> str:
    """Return which of several encoders to use: that at `key`, or its average of any name."""
    others = [name for name, value in content.items() if name != key and _holds_encoder(value)]
    if len(others) == 1 and _AVERAGED_NAME.search(str(others[0])):
        return _taken(key, others[0], choice, notes)
    if others and choice != "ema":
        notes.append(f"its weights ({key}) are used, not those in {', '.join(map(str, others))}")
    return key


def _holds_encoder(value: object, depth: int = 3) -> bool:
    """Return whether a value is a state dict of an encoder, in at most `depth` wrappers."""
    if not isinstance(value, dict):
        return False
    inner = depth > 0 and any(_holds_encoder(value.get(key), depth - 1) for key in WRAPPERS)
    return inner or bool(find_encoders(name for name in value if isinstance(name, str)))


def _take_only_averaged(name: str, choice: WeightsChoice | None, notes: list[str]) -> None:
    """Note that the only weights are averaged ones. Raise ValueError if `choice` is raw."""
    if choice == "raw":
        raise ValueError(f"contains only averaged weights ({name}), not raw ones")
    notes.append(f"its averaged weights ({name}) are used, as it contains no others")


def _is_filled(value: object) -> bool:
    return isinstance(value, dict) and bool(value)


def _taken(raw: str, averaged: str, choice: WeightsChoice | None, notes: list[str]) -> str:
    """Return which of two names to use, and note it."""
    taken, left = (raw, averaged) if choice == "raw" else (averaged, raw)
    kind, other = ("raw", "ema") if choice == "raw" else ("averaged", "raw")
    notes.append(f"its {kind} weights ({taken}) are used; --weights {other} uses {left}")
    return taken


def _strip_common_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove `module.`, `_orig_mod.` and other prefixes that all names share."""
    while tensors and len(first := {name.partition(".")[0] for name in tensors}) == 1:
        start = len(first.pop()) + 1
        if any(len(name) <= start for name in tensors):
            break
        tensors = {name[start:]: tensor for name, tensor in tensors.items()}
    return tensors


def _choose_encoder(
    tensors: dict[str, Tensor], choice: WeightsChoice | None, notes: list[str]
) -> dict[str, Tensor]:
    """Keep one of two encoders if one is the other's average, such as model.… and ema_model.…"""
    prefixes = [naming.prefix for naming in find_encoders(tensors)]
    averaged = [prefix for prefix in prefixes if _AVERAGED_NAME.search(prefix)]
    if len(prefixes) != 2 or len(averaged) != 1:
        return tensors
    (raw,) = set(prefixes) - set(averaged)
    taken = _taken(raw, averaged[0], choice, notes)
    root = _differing_root(taken, averaged[0] if taken == raw else raw)
    other = _differing_root(averaged[0] if taken == raw else raw, taken)
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if (name.startswith(root) if root else not name.startswith(other))
    }
    return _strip_common_prefix(kept)


def _differing_root(prefix: str, other: str) -> str:
    """Return the start of `prefix` up to and with the first part that differs from `other`."""
    root = ""
    for part, another in zip(prefix.split("."), other.split("."), strict=False):
        if part != another:
            return f"{root}{part}." if part else root
        root += f"{part}."
    return root
