"""Store the weights once, as float16 safetensors; graphs refer to byte ranges of that file."""

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
    """The byte range of one tensor in the file."""

    offset: int
    length: int
    shape: tuple[int, ...]


def to_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round weights to float16. Raises WeightsError if a value overflows."""
    stored = {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise WeightsError(
                f"{name} has values beyond the range of float16 (largest"
                f" {weights[name].abs().max():.3g}): the checkpoint is damaged or training diverged"
            )
    return stored


def write(stored: dict[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors, with the usual permissions (save_file restricts them)."""
    file.write_bytes(save(stored, metadata={"format": "pt"}))


def read_places(file: Path) -> dict[str, Place]:
    """Return each tensor's byte range: 8 bytes of header length, the header, then the tensors."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = Place(8 + header_bytes + begin, end - begin, tuple(entry["shape"]))
    return found
