from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights import LoadedCheckpoint, fit_weights, initialise
from pcae_training.import_weights.resize import resize_kernel
from pcae_training.model import VisionTransformer
from tests.support.foreign_checkpoints import TINY, vit


def found_from(model: VisionTransformer) -> LoadedCheckpoint:
    return LoadedCheckpoint(model.config, dict(model.state_dict()))


HEAD = ["head.weight", "head.bias"]
NORM, FC_NORM = ["norm.weight", "norm.bias"], ["fc_norm.weight", "fc_norm.bias"]


@pytest.mark.parametrize(
    ("change", "missing", "unused"),
    [
        ({"image_size": 40}, [], []),
        ({"classes": 3}, HEAD, HEAD),
        ({"classes": 0}, [], HEAD),
        ({"pooling": "mean"}, [*FC_NORM, *HEAD], [*NORM, *HEAD]),
    ],
)
def test_missing_parameters_keep_their_values(
    change: dict[str, Any], missing: list[str], unused: list[str]
) -> None:
    source, model = vit(seed=1), vit(replace(TINY, **change), seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fitted = initialise(model, found_from(source))
    assert (fitted.missing, fitted.unused) == (missing, unused)
    for name, tensor in model.state_dict().items():
        if name in missing:
            assert torch.equal(tensor, before[name]), name
        elif name != "pos_embed":
            assert torch.equal(tensor, source.state_dict()[name]), name
    prefix = model.pos_embed[:, :1]
    assert torch.equal(prefix, source.pos_embed[:, :1])  # CLS has no place on the grid


def test_another_count_of_classes_of_a_distilled_model() -> None:
    fitted = fit_weights(
        found_from(vit(replace(TINY, distilled=True))), replace(TINY, distilled=True, classes=3)
    )
    assert fitted.missing == [*HEAD, "head_dist.weight", "head_dist.bias"]


@torch.inference_mode()
@pytest.mark.parametrize("distilled", [False, True])
def test_another_patch_size_gives_a_resized_patch_its_token(distilled: bool) -> None:
    source = vit(replace(TINY, distilled=distilled))
    config = replace(source.config, image_size=48, patch_size=8)  # the same grid
    model = VisionTransformer(config).eval()
    initialise(model, found_from(source))
    patch = torch.randn(1, 3, 4, 4)
    resized = F.interpolate(patch, size=(8, 8), mode="bilinear")
    expected = source.patch_embed(patch)
    torch.testing.assert_close(model.patch_embed(resized), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.pos_embed, source.pos_embed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, r"cls_token has shape \[1, 1, 16\], expected \[1, 1, 32\]"),
        ({"depth": 3}, r"blocks.2.norm1.weight \[16\] is missing"),
        ({"depth": 1}, r"unexpected tensor blocks.1.norm1.weight \[16\]"),
        ({"mlp_ratio": 2.0}, r"blocks.0.mlp.fc1.weight has shape \[64, 16\], expected \[32, 16\]"),
        ({"heads": 4}, "the checkpoint has 2 heads, the model 4"),
        ({"registers": 2}, r"reg_token \[1, 2, 16\] is missing"),
        (
            {"channels": 1},
            r"proj.weight has shape \[16, 3, 4, 4\], expected \[16, 1, 4, 4\]",
        ),
    ],
)
def test_what_cannot_fit_is_named_with_both_shapes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        fit_weights(found_from(vit()), replace(TINY, **change))


@pytest.mark.parametrize(("new", "limit"), [(2, 0.2), (8, 0.05)])  # 2 x 2 lose the slopes
def test_a_resized_patch_gives_nearly_the_same_token(new: int, limit: float) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(16, 3, 4, 4) / 7  # 48 numbers a patch
    y, x = torch.meshgrid(torch.linspace(0, 2, 16), torch.linspace(0, 3, 16), indexing="ij")
    smooth = torch.stack([x.sin(), y.cos(), (x + y).sin()])[None]
    resized = F.interpolate(smooth, scale_factor=new / 4, mode="bilinear")  # same patches, new size
    tokens = F.conv2d(smooth, kernel, stride=4)
    again = F.conv2d(resized, resize_kernel(kernel, new), stride=new)
    assert (again - tokens).norm() / tokens.norm() < limit
    flat = torch.full((1, 3, 16, 16), 0.7)
    torch.testing.assert_close(
        F.conv2d(flat, resize_kernel(kernel, new), stride=new)[..., 0, 0],
        F.conv2d(flat, kernel, stride=4)[..., 0, 0],
    )


def test_the_same_patch_size_is_the_identity() -> None:
    kernel = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_kernel(kernel, 4), kernel)
