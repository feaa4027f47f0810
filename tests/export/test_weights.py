"""Weights stored as float16, and their byte ranges in the file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pcae_export.weights import WeightsError, read_places, to_half, write


def test_each_lies_where_it_is_said_to(tmp_path: Path) -> None:
    weights = {
        "head.bias": torch.tensor([1.5, -2.25, 65504.0]),
        "blocks.0.attn.qkv.weight": torch.arange(12.0).reshape(3, 4).T,  # not contiguous
        "cls_token": torch.full((1, 1, 2), 0.1),
    }
    file = tmp_path / "model.safetensors"
    stored = to_half(weights)
    write(stored, file)
    found, raw = read_places(file), file.read_bytes()
    assert set(found) == set(weights)
    for name, place in found.items():
        assert place.shape == weights[name].shape
        content = np.frombuffer(raw[place.offset : place.offset + place.length], np.float16)
        np.testing.assert_array_equal(content.reshape(place.shape), weights[name].half())
    assert found["head.bias"].length == 6
    assert sum(place.length for place in found.values()) == 2 * (3 + 12 + 2)


def test_others_read_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write(to_half({"a": torch.tensor([0.1])}), file)
    assert torch.equal(load_file(file)["a"], torch.tensor([0.1]).half())
    assert file.stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("value", [65520.0, float("inf"), float("nan")])
def test_what_float16_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(WeightsError, match=r"head\.bias has values beyond the range of float16"):
        to_half({"head.weight": torch.ones(2), "head.bias": torch.tensor([0.0, value])})
