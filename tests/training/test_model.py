from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcae_training.model import (
    VisionTransformer,
    ViTConfig,
    sincos_position,
)
from pcae_training.reduction import reduce_patches, redundancy

TINY = ViTConfig(image_size=24, patch_size=4, width=16, depth=12, heads=2, classes=5)
COUNTS = [(36, 36, 36), (25, 17, 11), (36, 20, 20), (21, 12, 7), (3, 2, 1)]


def vit(config: ViTConfig = TINY) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(config).eval()


def pixels(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def plain_forward(model: Any, images: Tensor) -> Tensor:
    """A plain ViT, written from the textbook, on the same modules."""
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    cls = model.cls_token.expand(len(images), -1, -1)
    x = torch.cat([cls, patches], dim=1) + model.pos_embed
    for block in model.blocks:
        heads = []
        b, n, d = x.shape
        for part in block.attn.qkv(block.norm1(x)).chunk(3, dim=-1):
            heads.append(part.view(b, n, model.config.heads, -1).transpose(1, 2))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(b, n, d)
        x = x + block.attn.proj(mixed)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    if model.config.pooling == "cls":
        return model.head(model.norm(x[:, 0]))
    return model.head(model.fc_norm(x[:, 1:].mean(dim=1)))


def slow_ptr(model: Any, image: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, list[list[int]]]:
    """DESIGN section 2 for one image, a token at a time."""
    x = model.embed(image[None])[0]
    cls, patches = x[0], dict(enumerate(x[1:]))
    appended: list[Tensor] = []
    kept_per_stage = []
    for i, block in enumerate(model.blocks):
        x = block(torch.stack([cls, *patches.values(), *appended])[None])[0]
        cls, tokens = x[0], x[1 : 1 + len(patches)]
        appended = list(x[1 + len(patches) :])
        patches = dict(zip(patches, tokens, strict=True))
        if i in model.config.reduction_points:
            m = counts[len(kept_per_stage)]
            if m < len(patches):
                mean = sum(patches.values()) / len(patches)
                ranked = sorted(
                    patches,
                    key=lambda j: float(patches[j] @ mean / (patches[j].norm() * mean.norm())),
                )
                appended.append(sum(patches[j] for j in ranked[m:]) / (len(patches) - m))
                patches = {j: patches[j] for j in ranked[:m]}
            kept_per_stage.append(list(patches))
    if model.config.pooling == "cls":
        return model.head(model.norm(cls)), kept_per_stage
    return model.head(model.fc_norm(sum(patches.values()) / len(patches))), kept_per_stage


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_keeping_all_is_bit_for_bit_the_plain_vit(pooling: Any) -> None:
    model, images = vit(replace(TINY, pooling=pooling)), pixels()
    expected = plain_forward(model, images)
    assert torch.equal(model(images), expected)
    assert torch.equal(model(images, (36, 36, 36)), expected)


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("counts", COUNTS)
def test_reduction_agrees_with_a_slow_one(counts: tuple[int, ...], pooling: Any) -> None:
    model, images = vit(replace(TINY, pooling=pooling)), pixels()
    logits, kept = model.classify(images, counts)
    assert [k.shape for k in kept] == [(3, m) for m in counts]
    for row, image in enumerate(images):
        expected, expected_kept = slow_ptr(model, image, counts)
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-4)
        assert [sorted(k[row].tolist()) for k in kept] == [sorted(k) for k in expected_kept]


@torch.inference_mode()
@pytest.mark.parametrize("counts", COUNTS)
def test_dropped_tokens_are_gone_from_the_tensors(counts: tuple[int, ...]) -> None:
    model, lengths = vit(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model(pixels(), counts)
    assert tuple(lengths) == TINY.geometry.tokens_per_block(counts)


@torch.inference_mode()
def test_counts_of_the_tensors_are_the_papers_for_196_patches() -> None:
    config = ViTConfig(image_size=28, patch_size=2, width=8, heads=2, classes=3)
    model, lengths = vit(config), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model(torch.randn(1, 3, 28, 28), config.geometry.counts(0.7))
    assert lengths == [197, *[139] * 7, *[98] * 3, 70]


@torch.inference_mode()
def test_kept_are_original_indices_each_stage_within_the_one_before() -> None:
    _, kept = vit().classify(pixels(), (21, 12, 7))
    for row in range(3):
        stages = [set(k[row].tolist()) for k in kept]
        assert [len(stage) for stage in stages] == [21, 12, 7]
        assert stages[2] < stages[1] < stages[0] < set(range(36))


def test_reduce_patches_keeps_the_least_alike_and_averages_the_rest() -> None:
    patches = torch.tensor([[[1.0, 0.3], [1, 0.1], [0, 5], [1, -0.1], [-3, 0]]])
    kept, mean, index = reduce_patches(patches, 2, 3)
    similarity = redundancy(patches)[0]
    order = similarity.argsort().tolist()
    assert index[0].tolist() == order[:2]
    assert torch.equal(kept[0], patches[0, order[:2]])
    torch.testing.assert_close(mean[0, 0], patches[0, order[2:]].mean(dim=0))


def test_ranking_is_float32_under_autocast() -> None:
    model = vit()
    with (
        torch.autocast("cpu", torch.bfloat16),
        mock.patch("pcae_training.reduction.redundancy", wraps=redundancy) as ranked,
    ):
        model(pixels(), (25, 17, 11))
        results = [redundancy(call.args[0]) for call in ranked.call_args_list]
    assert len(results) == 3
    assert {result.dtype for result in results} == {torch.float32}
    for call, result in zip(ranked.call_args_list, results, strict=True):
        assert torch.equal(result, redundancy(call.args[0].float()))  # as outside of autocast


def test_ranking_is_float32_for_a_half_model() -> None:
    patches = torch.randn(2, 9, 8).bfloat16()
    assert torch.equal(redundancy(patches), redundancy(patches.float()))


def test_attention_is_fused() -> None:
    with mock.patch.object(
        F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention
    ) as fused:
        vit()(pixels())
    assert fused.call_count == 12


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_gradient_reaches_every_parameter(pooling: Any) -> None:
    model = vit(replace(TINY, pooling=pooling))
    model(pixels(), (21, 12, 7)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("pooling", "norm"), [("mean", "fc_norm"), ("cls", "norm")])
def test_names_are_timms(pooling: Any, norm: str) -> None:
    in_block = [
        f"{module}.{kind}"
        for module in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    assert list(vit(replace(TINY, pooling=pooling)).state_dict()) == [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *(f"blocks.{i}.{name}" for i in range(12) for name in in_block),
        f"{norm}.weight",
        f"{norm}.bias",
        "head.weight",
        "head.bias",
    ]


def test_shapes_of_vit_b() -> None:
    with torch.device("meta"), mock.patch("pcae_training.model.init_weights"):
        model = VisionTransformer(ViTConfig())
    assert sum(p.numel() for p in model.parameters()) == 86_567_656  # timm vit_base_patch16_224
    assert model.pos_embed.shape == (1, 197, 768)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_positions_tell_rows_from_columns() -> None:
    table = sincos_position(16, 3)[0]
    assert table.shape == (10, 16)
    assert not table[0].any()  # CLS
    grid = table[1:].view(3, 3, 16)
    assert torch.equal(grid[0, 2, :8], grid[2, 2, :8])  # column in the first half, as MAE
    assert torch.equal(grid[2, 0, 8:], grid[2, 2, 8:])
    assert len({tuple(token.tolist()) for token in table[1:]}) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "patch size 5 does not divide 24"),
        ({"heads": 3}, "3 heads do not divide width 16"),
        ({"width": 18}, "width 18 is not a multiple of 4"),
        ({"depth": 10}, "outside 10 blocks"),
        ({"reduction_points": (7, 0, 10)}, "must rise"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_as_many_counts_as_stages() -> None:
    with pytest.raises(ValueError, match="zip"):
        vit()(pixels(), (20, 10))
