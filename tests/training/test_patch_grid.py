"""The last state of every patch: what was dropped, what was merged, and what is left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pcae_training.import_weights import initialise, load_checkpoint
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.reduction import RULES, fixed_order
from tests.support.foreign_checkpoints import SIZES, randomised

SIDE, WIDTH, PREFIX = 6, 16, 1
POINTS, COUNTS = (0, 2), (21, 8)


def vit(rule: Any, pooling: Any = "cls") -> VisionTransformer:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=24, patch_size=4, width=WIDTH, depth=4, heads=2, classes=0, pooling=pooling,
        reduction_points=POINTS, reduction=rule,
    )  # fmt: skip
    model = VisionTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pixels() -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def block_outputs(model: VisionTransformer) -> list[Tensor]:
    """The tokens after each block, before any is dropped, of a run that the caller starts."""
    found = list[Tensor]()
    for block in model.blocks:
        block.register_forward_hook(lambda *call: found.append(call[2]))
    return found


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "merged"])
@torch.no_grad()
def test_a_dropped_patch_has_the_state_that_it_was_dropped_with(rule: Any) -> None:
    model = vit(rule)
    outputs, order = block_outputs(model), fixed_order(SIDE**2)
    features, kept, grid = model.classify_densely(pixels(), COUNTS, noise=order)
    assert torch.equal(features, model.classify(pixels(), COUNTS, noise=order)[0])
    expected, there = torch.zeros(3, SIDE**2, WIDTH), [torch.arange(SIDE**2).expand(3, -1), *kept]
    for block, position in zip((*POINTS, 3), there, strict=True):
        for image, patches in enumerate(position):
            states = outputs[block][image, PREFIX : PREFIX + len(patches)]
            expected[image, patches.long()] = states
    torch.testing.assert_close(grid.flatten(1, 2), model.norm(expected))
    assert grid.shape == (3, SIDE, SIDE, WIDTH)


@torch.no_grad()
def test_a_merged_patch_has_the_state_of_the_one_it_went_into() -> None:
    model = vit("merged")
    *_, last = model.walk(model.embed(pixels()), COUNTS, dense=True)
    grid = model.patch_grid(last).flatten(1, 2)  # [B, P, D]
    left = model.norm(last.patch_tokens)
    assert last.sizes is not None
    for image in range(3):
        torch.testing.assert_close(grid[image, last.position[image]], left[image])
        same = (grid[image][:, None] == left[image][None]).all(dim=2)  # [P, m]
        assert torch.equal(same.sum(dim=0).float(), last.sizes[image])


@pytest.mark.parametrize("pooling", ["mean", "normed-mean"])
@torch.no_grad()
def test_the_final_norm_is_applied_to_each_patch(pooling: Any) -> None:
    model = vit("ptr", pooling)
    *_, last = model.walk(model.embed(pixels()))
    norm = model.fc_norm if pooling == "mean" else model.norm
    grid = model.classify_densely(pixels())[2]
    torch.testing.assert_close(grid.flatten(1, 2), norm(last.patch_tokens))


@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_at_keep_ratio_1_it_is_the_last_hidden_state_of_dinov2(
    tmp_path: Path, registers: int
) -> None:
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = SIZES | ({"num_register_tokens": registers} if registers else {})
    config = getattr(transformers, f"{kind}Config")(**sizes)
    theirs = randomised(getattr(transformers, f"{kind}Model")(config)).eval()
    theirs.save_pretrained(tmp_path)
    found = load_checkpoint(tmp_path)
    for rule in ("ptr", "merged"):
        ours = VisionTransformer(replace(found.config, reduction=rule)).eval()
        initialise(ours, found)
        side = found.config.image_size
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
        full = ours.config.geometry.counts(1)
        grid = ours.classify_densely(images, full)[2].flatten(1, 2)
        expected = theirs(images).last_hidden_state[:, 1 + registers :]
        torch.testing.assert_close(grid, expected, atol=1e-4, rtol=0)
