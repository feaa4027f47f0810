import json
from pathlib import Path
from typing import Any

import pytest

from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights.detect import Format, Naming, detect_format, detect_naming


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "pcae_vit"}, Format.OWN),
        ({"model_type": "dinov2"}, Format.HUGGING_FACE),
        ({"architecture": "vit_tiny", "model_type": "timm_wrapper"}, Format.TIMM),
        ({"hidden_size": 16}, Format.HUGGING_FACE),
        ({}, Format.STATE_DICT),
    ],
)
def test_a_folder_is_known_by_its_config(config: Any, expected: Format, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.touch()  # the format is found without reading weights
    for path in (tmp_path, weights):
        found = detect_format(path)
        assert (found.format, found.path) == (expected, tmp_path)
        assert found.weights == (tmp_path if expected is Format.OWN else weights)


def test_a_file_is_a_state_dict(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    assert detect_format(file).format is Format.STATE_DICT  # no config.json next to it
    with pytest.raises(CheckpointError, match=r"checkpoint not found: .*other\.pth"):
        detect_format(tmp_path / "other.pth")


def test_a_folder_without_config_may_hold_an_interrupted_checkpoint(tmp_path: Path) -> None:
    assert detect_format(tmp_path / "run").format is Format.OWN


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("patch_embed.proj.weight", Naming("", "timm")),
        ("backbone.patch_embed.proj.weight", Naming("backbone.", "timm")),
        ("vit.embeddings.patch_embeddings.projection.weight", Naming("vit.", "hugging-face")),
        ("embeddings.patch_embeddings.weight", Naming("", "dinov3")),
        (
            "vision_model.embeddings.patch_embedding.weight",
            Naming("vision_model.", "clip"),
        ),
    ],
)
def test_naming_is_known_by_the_patch_kernel(kernel: str, expected: Naming) -> None:
    assert detect_naming(["cls_token", kernel, "head.weight"]) == expected
