"""Read the state dict out of a file, without its wrappers and common prefixes."""

import argparse
import pickle
from pathlib import Path

import torch
from torch import Tensor

from pcae_serve.errors import one_line
from pcae_training.checkpoint import CheckpointError, read_tensors
from pcae_training.weights_file import check_claims, check_pickle

#: Keys under which training programs keep the state dict, outermost first; of DINO's two networks
#: the teacher is used, which is the published one.
WRAPPERS = ("model", "state_dict", "teacher")


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a PyTorch or safetensors file by name.

    A pickle runs no code: only tensors, plain values and the `argparse.Namespace` that MAE, DeiT
    and DINO save with them are rebuilt. Raise ValueError or CheckpointError if the file is damaged
    or not a state dict.
    """
    if file.suffix == ".safetensors":
        return _strip_common_prefix(read_tensors(file))
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
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"contains a {type(content).__name__}, expected a state dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return _strip_common_prefix(tensors)


def _strip_common_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove `module.`, `_orig_mod.` and other prefixes that all names share."""
    while tensors and len(first := {name.partition(".")[0] for name in tensors}) == 1:
        start = len(first.pop()) + 1
        if any(len(name) <= start for name in tensors):
            break
        tensors = {name[start:]: tensor for name, tensor in tensors.items()}
    return tensors
