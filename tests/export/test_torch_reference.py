"""Torch's reference outputs: patches that are forced, and how close each choice was."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pcae_export.torch_reference import run_torch
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.evaluate import normalise
from pcae_training.reduction import redundancy

PIXELS = np.random.default_rng(2).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
COUNTS = (38, 22, 13)


@pytest.fixture(scope="module")
def stored(made: Any) -> Checkpoint:
    return checkpoints.load(made.bundle.root / "models" / "vit")


def test_torch_made_to_keep_its_own_patches_answers_the_same(stored: Checkpoint) -> None:
    expected = run_torch(stored, PIXELS, COUNTS)
    again = run_torch(stored, PIXELS, COUNTS, [stage.numpy() for stage in expected.kept])
    np.testing.assert_allclose(again.vectors, expected.vectors, atol=1e-5)
    for one, other in zip(again.kept, expected.kept, strict=True):
        np.testing.assert_array_equal(np.sort(one), np.sort(other))


def test_the_margin_is_the_gap_between_the_last_kept_and_the_first_dropped(
    stored: Checkpoint,
) -> None:
    """For one stage it is computed by hand; for two it is the smaller gap."""

    def margin(*counts: int) -> Any:
        return run_torch(stored, PIXELS, counts).margin

    model = stored.model
    images = normalise(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), stored.preprocess)
    with torch.no_grad():
        after = model.blocks[0](model.embed(images))
        scores = redundancy(after[:, 1:]).sort(dim=1).values
    np.testing.assert_allclose(margin(38, 38, 38), scores[:, 38] - scores[:, 37], atol=1e-7)
    assert margin(64, 64, 64).isinf().all()
    both = torch.minimum(margin(38, 38, 38), run_torch(stored, PIXELS, (38, 22, 22)).margin)
    np.testing.assert_array_equal(margin(38, 22, 22), both)
    assert (margin(38, 22, 22) < margin(38, 38, 38)).any()


def test_under_merged_the_margin_also_covers_what_is_merged_into_what(stored: Checkpoint) -> None:
    merged = replace(stored, model=deepcopy(stored.model))
    merged.model.config = replace(stored.model.config, reduction="merged")
    counts = (38, 38, 38)
    cut, both = (run_torch(c, PIXELS, counts).margin for c in (stored, merged))
    assert (both <= cut).all()
    assert (both < cut).any()


def test_a_fixed_order_is_never_close(tiny: Callable[..., Checkpoint]) -> None:
    assert run_torch(tiny(reduction="random"), PIXELS, COUNTS).margin.isinf().all()
