import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pcae_serve.bundle.reader import demo_path
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import CheckpointError
from pcae_training.model import VisionTransformer, ViTConfig
from tests.support.odd_files import JSON


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 10**9},
        {"depth": 0},
        {"depth": -1},
        {"depth": 12.0},
        {"depth": True},
        {"depth": "x" * 10**6},
        {"width": 10**7},
        {"image_size": 10**9},
        {"heads": 0},
        {"registers": 10**12},
        {"classes": 10**9},
        {"mlp_ratio": 1e12},
        {"mlp_ratio": float("nan")},
        {"norm_eps": "x"},
        {"norm_eps": float("inf")},
        {"reduction_points": (1,) * 10**6},
    ],
)
def test_absurd_sizes_are_refused_in_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|are more than") as caught:
        ViTConfig(**changes)
    assert len(str(caught.value)) < 200


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a copy of the demo's checkpoint."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(demo_path() / "models" / "vit" / name, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 200),
        ("hidden_size", 65_536),
        ("intermediate_size", 10**15),
        ("image_size", 8192),
        ("num_register_tokens", 10_000),
        ("num_attention_heads", 0),
        ("hidden_size", 0),
        ("num_hidden_layers", "12"),
        ("num_hidden_layers", None),
        ("reduction_points", [1] * 10**6),
        ("id2label", {str(i): "x" for i in range(200_000)}),
        ("id2label", {"0": "x", "label2id": 1}),
    ],
)
def test_a_config_that_claims_more_than_the_weights_hold_allocates_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {name: value}))
    built = []

    class Watched(VisionTransformer):
        def __init__(self, config: ViTConfig) -> None:
            built.append(torch.get_default_device().type)
            super().__init__(config)

    monkeypatch.setattr(checkpoints, "VisionTransformer", Watched)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(checkpoint)
    assert set(built) <= {"meta"}
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", JSON)
def test_json_beyond_the_bounds_is_refused(checkpoint: Path, case: str) -> None:
    content, word = JSON[case]
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=word):
        checkpoints.load(checkpoint)
