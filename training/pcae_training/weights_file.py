"""Check a file of tensors before a library reads it, and what it claims to hold after that.

A small file can claim anything: a header of gigabytes, a tensor of one value that is expanded to
a billion, or an archive that unpacks to a thousand times its size.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pcae_serve.bounded_file import open_regular

#: Bytes of a safetensors header; one of 10,000 tensors has 1 MB.
MAX_HEADER_BYTES = 20_000_000
#: Values that tensors claim, as a multiple of the file's size: some tensors share their values.
MAX_CLAIM = 4


def check_safetensors(file: Path) -> None:
    """Raise OSError if it is not a regular file, and ValueError if its header is too large."""
    with open_regular(file) as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {header_bytes:,} bytes")


def check_pickle(file: Path) -> None:
    """Raise OSError if it is not a regular file, and ValueError if it is a compressed archive.

    PyTorch stores tensors uncompressed, in archives since version 1.6.
    """
    with open_regular(file) as stream:
        if stream.read(4) != b"PK\x03\x04":
            return
        try:
            entries = zipfile.ZipFile(stream).infolist()
        except (zipfile.BadZipFile, NotImplementedError):
            raise ValueError("truncated, or not a PyTorch file") from None
    if any(entry.file_size > entry.compress_size for entry in entries):
        raise ValueError("compressed, which PyTorch's own files are not")


def check_claims(content: object, file: Path) -> None:
    """Raise ValueError if the tensors in `content` claim more values than a file can hold."""
    claimed = 0
    for tensor in _tensors(content):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError("contains tensors that are sparse, quantised or without values")
        claimed += tensor.numel() * tensor.element_size()
    if claimed > MAX_CLAIM * file.stat().st_size:
        raise ValueError(
            f"its tensors claim {claimed / 1e6:,.0f} MB, but the file has"
            f" {file.stat().st_size / 1e6:,.1f} MB"
        )


def _tensors(content: object) -> Iterator[Tensor]:
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))  # pickles can contain themselves
            waiting.extend(value.values() if isinstance(value, dict) else value)
