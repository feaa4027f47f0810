"""Rotary positions stay with the patches that are kept; the layers of `transformers` agree."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcae_training.import_weights import initialise, load_checkpoint
from pcae_training.model import VisionTransformer
from pcae_training.reduction import Tokens, reduce_tokens
from pcae_training.rotary import RotaryPositions, Rotation
from tests.support.families import build, write
from tests.support.foreign_checkpoints import TINY, rebuilt, vit

ROTARY = replace(TINY, rope_theta=100.0, registers=3)
PREFIX = 4


def images(size: int = 24) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def angles(theirs: Any, of: Tensor, kept: Tensor, means: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [m + means, d] of `transformers`, those of means at no angle."""
    cos, sin = theirs.rope_embeddings(of)
    still = torch.ones(means, cos.shape[1]), torch.zeros(means, cos.shape[1])
    return torch.cat([cos[kept], still[0]]), torch.cat([sin[kept], still[1]])


@torch.inference_mode()
@pytest.mark.parametrize(("rule", "means"), [("ptr", 1), ("attention", 1), ("merged", 0)])
def test_kept_patches_keep_their_angles(
    hugging_face: Any, rule: Any, means: int, tmp_path: Path
) -> None:
    theirs = build(hugging_face, "dinov3")
    model = rebuilt(load_checkpoint(write(theirs, tmp_path)))
    model.config = replace(model.config, reduction_points=(0,), reduction=rule)
    _, after_stage, last = model.walk(model.embed(images()), (18,))
    patches = after_stage.position[0]
    assert patches.tolist() != sorted(patches.tolist())  # else the order would not matter
    if rule == "merged":  # sizes count in attention, which their layer lacks
        after_stage = after_stage._replace(sizes=None)
        bias, rotation = after_stage.attention_bias, after_stage.rotation
        last = last._replace(x=model.blocks[1](after_stage.x, None, bias, rotation))
    found = angles(theirs, images(), patches, means)
    expected = theirs.model.layer[1](after_stage.x, position_embeddings=found)
    torch.testing.assert_close(last.x, expected, atol=1e-5, rtol=1e-5)
    elsewhere = angles(theirs, images(), patches.flip(0), means)
    other = theirs.model.layer[1](after_stage.x, position_embeddings=elsewhere)
    assert (last.x - other).abs().max() > 0.01


def test_a_stage_keeps_the_angles_of_prefix_patches_and_means() -> None:
    rotation: Rotation = RotaryPositions(3, 8, 100.0)(prefix=2)
    x = torch.randn(2, 2 + 9, 8, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(x, 9, torch.arange(9).expand(2, -1), 2, rotation=rotation)
    once = reduce_tokens(tokens, 5, 4, "ptr")
    twice = reduce_tokens(once, 2, 3, "ptr")
    assert twice.rotation is not None
    for image in range(2):
        for table, still, found in zip(rotation, (1.0, 0.0), twice.rotation, strict=True):
            rows = table[0, 2 + twice.position[image], 0]
            unmoved = torch.full((2, 4), still)
            assert torch.equal(found[image, :, 0], torch.cat([unmoved, rows, unmoved]))


@torch.inference_mode()
def test_positions_of_another_image_size_are_computed(hugging_face: Any, tmp_path: Path) -> None:
    theirs = build(hugging_face, "dinov3")
    found = load_checkpoint(write(theirs, tmp_path))
    larger = VisionTransformer(replace(found.config, image_size=40)).eval()
    fitted = initialise(larger, found)
    assert (fitted.missing, fitted.unused) == ([], [])
    expected = theirs(images(40)).pooler_output
    torch.testing.assert_close(larger(images(40)), expected, atol=1e-4, rtol=0)


def test_angles_are_there_in_a_model_built_without_values() -> None:
    with torch.device("meta"):
        model = VisionTransformer(ROTARY)
    model.load_state_dict(vit(ROTARY).state_dict(), assign=True)
    assert torch.equal(model.eval()(images()), vit(ROTARY)(images()))


def test_the_order_of_patches_matters_by_their_angles_alone() -> None:
    model = vit(ROTARY)
    x = model.embed(images())
    swapped = x.clone()
    swapped[:, [PREFIX, PREFIX + 35]] = x[:, [PREFIX + 35, PREFIX]]
    *_, last = model.walk(x)
    *_, other = model.walk(swapped)
    assert not torch.allclose(last.x[:, 0], other.x[:, 0], atol=1e-3)


def test_a_model_in_mixed_precision_turns_in_it() -> None:
    model, exact = vit(ROTARY), vit(ROTARY)(images())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images())
    assert found.isfinite().all()
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": -1.0}, "theta of rotary positions must be 0 or more, not -1.0"),
        ({"rope_theta": float("inf")}, "theta of rotary positions must be 0 or more"),
        ({"width": 12, "heads": 2}, "6 channels per head are not a multiple of 4"),
    ],
)
def test_what_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ROTARY, **changes)
