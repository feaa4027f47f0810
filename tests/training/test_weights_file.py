import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pcae_training.checkpoint import CheckpointError, read_tensors
from pcae_training.import_weights.tensors import read_state_dict


def saved(file: Path, content: Any) -> Path:
    torch.save(content, file)
    return file


def refused(file: Path, words: str) -> None:
    with pytest.raises((ValueError, CheckpointError), match=words) as caught:
        read_tensors(file) if file.suffix == ".safetensors" else read_state_dict(file)
    assert "\n" not in str(caught.value)


def test_shared_tensors_are_read(tmp_path: Path) -> None:
    tied = torch.zeros(1000)
    assert set(read_state_dict(saved(tmp_path / "x.pth", {"c": tied, "d": tied})).tensors) == {
        "c",
        "d",
    }


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x}, lambda x: {"other": [x]}])
def test_a_tensor_of_one_value_that_claims_a_terabyte_is_refused(tmp_path: Path, wrap: Any) -> None:
    huge = torch.zeros(1).expand(1000, 1000, 1000, 250)
    refused(saved(tmp_path / "x.pth", wrap({"w": huge})), "claim 1,000,000 MB, but the file has")


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    place = torch.zeros(2, 1, dtype=torch.long)
    sparse = torch.sparse_coo_tensor(place, [1.0], (10**6, 10**6), check_invariants=True)
    for name, tensor in (("meta", torch.zeros(10**9, device="meta")), ("sparse", sparse)):
        refused(saved(tmp_path / f"{name}.pth", {"w": tensor}), "sparse, quantised or without")


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1_000_000)}, buffer)
    with (
        zipfile.ZipFile(buffer) as plain,
        zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    refused(tmp_path / "x.pth", "compressed")
    (tmp_path / "cut.pth").write_bytes(buffer.getvalue()[:1000])
    refused(tmp_path / "cut.pth", "truncated")


def test_a_pickle_that_contains_itself_or_nests_deeply_is_read_or_refused(tmp_path: Path) -> None:
    itself: dict[str, Any] = {"w": torch.zeros(2)}
    itself["again"] = itself
    assert set(read_state_dict(saved(tmp_path / "x.pth", itself)).tensors) == {"w"}


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pth"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "a FIFO, not a regular file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "header claims"),
        (struct.pack("<Q", 30_000_000) + b"[" * 30_000_000, "header claims"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "cannot read"),
        (b"", "cannot read"),
    ],
    ids=["2^63 bytes", "30 MB", "nested", "empty"],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", words)


def test_a_shape_that_lies_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}
    header = json.dumps({"w": entry}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(file, "cannot read")
