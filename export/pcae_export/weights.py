"""The weights on disk: float16, once, as a safetensors file whose bytes the graphs point into.

It knows tensors and where they lie; it knows nothing of networks or of graphs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from pcae_serve.errors import PcaeError


class WeightsError(PcaeError):
    """The weights cannot be stored."""


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in the file, in bytes."""

    offset: int
    length: int
    shape: tuple[int, ...]


def to_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they will be stored. Raises WeightsError where float16 cannot hold a value."""
    stored = {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise WeightsError(
                f"{name} has values that float16 cannot hold (largest"
                f" {weights[name].abs().max():.3g}): the checkpoint is damaged or has diverged"
            )
    return stored


def write(stored: dict[str, Tensor], file: Path) -> None:
    """Write float16 tensors as safetensors, readable by all (save_file makes it the owner's)."""
    file.write_bytes(save(stored, metadata={"format": "pt"}))


def read_places(file: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file begins: 8 bytes of header length, header, tensors."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = Place(8 + header_bytes + begin, end - begin, tuple(entry["shape"]))
    return found
