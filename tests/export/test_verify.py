"""The gate lets right graphs through, and stops wrong ones."""

import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcae_export.verify import BATCHES, ParityError, prove
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint

PIXELS = np.random.default_rng(2).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def stored(made: Any) -> Checkpoint:
    return checkpoints.load(made.bundle.root / "models" / "vit")


def test_right_graphs_pass(made: Any, stored: Checkpoint) -> None:
    parity = prove(made.bundle, stored, PIXELS)
    assert (parity.images, parity.batches) == (64, BATCHES)
    assert set(parity.worst) == {"low", "mid", "full"}
    assert max(parity.worst.values()) < 1e-4
    assert parity.near_ties["full"] == 0  # nothing is cut


def test_other_weights_are_caught(made: Any, stored: Checkpoint) -> None:
    other = replace(stored, model=deepcopy(stored.model))
    with torch.no_grad():
        other.model.head.bias[0] += 0.002
    with pytest.raises(ParityError, match=r"elastic graph, batch 1: a logit differs .* 0\.002"):
        prove(made.bundle, other, PIXELS)


def test_a_wrong_static_graph_is_caught(made: Any, stored: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(made.bundle.root, tmp_path / "wrong")
    wrong = replace(made.bundle, root=tmp_path / "wrong")
    shutil.copy(wrong.file("vit", "full.onnx"), wrong.file("vit", "mid.onnx"))
    with pytest.raises(ParityError, match="tier 'mid', static graph"):
        prove(wrong, stored, PIXELS)


def test_a_graph_that_keeps_other_patches_is_caught(made: Any, stored: Checkpoint) -> None:
    with torch.no_grad():
        other = replace(stored, model=deepcopy(stored.model))
        other.model.pos_embed[:, 1:] = other.model.pos_embed[:, 1:].flip(1)
    with pytest.raises(ParityError):
        prove(made.bundle, other, PIXELS)


def test_images_that_prove_nothing_are_refused(made: Any, stored: Checkpoint) -> None:
    flat = replace(stored, model=deepcopy(stored.model))
    with torch.no_grad():
        flat.model.pos_embed.zero_()  # one grey image without positions: all patches are equal
    with pytest.raises(ParityError, match="near ties"):
        prove(made.bundle, flat, np.full_like(PIXELS, 128))


def test_few_images_are_refused(made: Any, stored: Checkpoint) -> None:
    with pytest.raises(ParityError, match="needs 64 images, and there are 63"):
        prove(made.bundle, stored, PIXELS[:63])
