from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcae_training.model import VisionTransformer, ViTConfig, sincos_position
from pcae_training.reduction import redundancy

TINY = ViTConfig(image_size=24, patch_size=4, width=16, depth=12, heads=2, classes=5)
COUNTS = [(36, 36, 36), (25, 17, 11), (36, 20, 20), (21, 12, 7), (3, 2, 1)]
KINDS = {
    "MAE": TINY,
    "ViT": replace(TINY, pooling="cls"),
    "DeiT": replace(TINY, pooling="cls", distilled=True),
    "DINOv2": replace(TINY, pooling="cls", registers=4, layer_scale=True),
    "all": replace(TINY, registers=2, layer_scale=True, qkv_bias=False),
}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def vit(config: ViTConfig = TINY) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter)  # as new, a branch hardly counts
    return model


def pixels(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def plain_embed(model: Any, images: Tensor) -> Tensor:
    """Prefix tokens and patches, with positions for all but registers."""
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    positions = iter(model.pos_embed[0])
    tokens = [model.cls_token[0, 0] + next(positions)]
    if model.config.distilled:
        tokens.append(model.dist_token[0, 0] + next(positions))
    if model.config.registers:
        tokens.extend(model.reg_token[0])
    patches = patches + torch.stack(list(positions))
    return torch.cat([torch.stack(tokens).expand(len(images), -1, -1), patches], dim=1)


def plain_pool(model: Any, x: Tensor, patches: Tensor) -> Tensor:
    """Logits of tokens x [B, N, D], with the patches [B, n, D] among them."""
    if model.config.pooling == "mean":
        logits: Tensor = model.head(model.fc_norm(patches.mean(dim=1)))
        return logits
    logits = model.head(model.norm(x[:, 0]))
    if model.config.distilled:
        logits = (logits + model.head_dist(model.norm(x[:, 1]))) / 2
    return logits


def plain_forward(model: Any, images: Tensor) -> Tensor:
    """A plain ViT, written from the textbook, on the same modules."""
    x = plain_embed(model, images)
    b, n, d = x.shape
    for block in model.blocks:
        scale1, scale2 = (block.ls1.gamma, block.ls2.gamma) if model.config.layer_scale else (1, 1)
        heads = []
        for part in block.attn.qkv(block.norm1(x)).chunk(3, dim=-1):
            heads.append(part.view(b, n, model.config.heads, -1).transpose(1, 2))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(b, n, d)
        x = x + block.attn.proj(mixed) * scale1
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))) * scale2
    return plain_pool(model, x, x[:, n - 36 :])


def slow_walk(
    model: Any,
    x: Tensor,
    counts: tuple[int, ...],
    prefix: int = 1,
    append: bool = True,
    points: tuple[int, ...] = TINY.reduction_points,
) -> tuple[Tensor, list[dict[int, Tensor]]]:
    """DESIGN section 2 for one image's tokens x [N, D], a token at a time.

    The tokens that come out, and each stage's patches by where they stand in the image.
    """
    head, patches = x[:prefix], dict(enumerate(x[prefix:]))
    appended: list[Tensor] = []
    stages: list[dict[int, Tensor]] = []
    for i, block in enumerate(model.blocks):
        x = block(torch.stack([*head, *patches.values(), *appended])[None])[0]
        end = prefix + len(patches)
        head, tokens, appended = x[:prefix], x[prefix:end], list(x[end:])
        patches = dict(zip(patches, tokens, strict=True))
        if i in points:
            m = counts[len(stages)]
            if m < len(patches):
                mean = sum(patches.values()) / len(patches)
                ranked = sorted(
                    patches,
                    key=lambda j: float(patches[j] @ mean / (patches[j].norm() * mean.norm())),
                )
                dropped = sum(patches[j] for j in ranked[m:]) / (len(patches) - m)
                appended += [dropped] if append else []
                patches = {j: patches[j] for j in ranked[:m]}
            stages.append(patches)
    return torch.stack([*head, *patches.values(), *appended]), [*stages, patches]


@each_kind
def test_keeping_all_is_bit_for_bit_the_plain_vit(config: ViTConfig) -> None:
    model, images = vit(config), pixels()
    expected = plain_forward(model, images)
    assert torch.equal(model(images), expected)
    assert torch.equal(model(images, (36, 36, 36)), expected)


@torch.inference_mode()
@each_kind
@pytest.mark.parametrize("counts", COUNTS)
def test_reduction_agrees_with_a_slow_one(counts: tuple[int, ...], config: ViTConfig) -> None:
    model, images = vit(config), pixels()
    logits, kept = model.classify(images, counts)
    assert [k.shape for k in kept] == [(3, m) for m in counts]
    for row, x in enumerate(plain_embed(model, images)):
        x, (*stages, patches) = slow_walk(model, x, counts, prefix=len(x) - 36)
        expected = plain_pool(model, x[None], torch.stack(list(patches.values()))[None])
        torch.testing.assert_close(logits[row], expected[0], atol=1e-5, rtol=1e-4)
        assert [sorted(k[row].tolist()) for k in kept] == [sorted(stage) for stage in stages]


@torch.inference_mode()
def test_patches_alone_walk_without_means_at_stages_of_their_own() -> None:
    model, counts, points = vit(), (20, 9), (1, 4)
    patches = model.embed_patches(pixels())
    assert patches.shape == (3, 36, 16)
    walked = list(model.walk(patches, counts, prefix=0, points=points, append=False))
    assert torch.equal(walked[0].x, patches)
    assert [tokens.x.shape[1] for tokens in walked] == [36, 36, *[20] * 3, *[9] * 8]
    last = walked[-1]
    assert torch.equal(last.patch_tokens, last.x)
    for row, x in enumerate(patches):
        expected, stages = slow_walk(model, x, counts, prefix=0, append=False, points=points)
        assert last.position[row].tolist() == list(stages[-1])
        torch.testing.assert_close(last.x[row], expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@each_kind
def test_walking_keeps_the_prefix_before_the_patches(config: ViTConfig) -> None:
    model, prefix = vit(config), 1 + config.distilled + config.registers
    walked = list(model.walk(model.embed(pixels()), (21, 12, 7)))
    assert len(walked) == 13
    for tokens in walked:
        assert tokens.prefix == prefix
        assert tokens.patch_tokens.shape == (3, tokens.patches, 16)
    assert walked[-1].x.shape == (3, prefix + 7 + 3, 16)  # a mean of each stage


@torch.inference_mode()
@each_kind
def test_without_classes_the_model_gives_what_its_head_reads(config: ViTConfig) -> None:
    classifier: Any = vit(config)
    model = vit(replace(config, classes=0))
    left = model.load_state_dict(classifier.state_dict(), strict=False)
    heads = ["head", "head_dist"][: 1 + config.distilled]
    wanted = [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]
    assert (left.missing_keys, left.unexpected_keys) == ([], wanted)
    if config.distilled:
        classifier.head_dist = classifier.head  # then the mean may be taken before as well
    features = model(pixels(), (21, 12, 7))
    assert features.shape == (3, 16)
    torch.testing.assert_close(classifier.head(features), classifier(pixels(), (21, 12, 7)))


@torch.inference_mode()
def test_drop_path_multiplies_each_samples_branches() -> None:
    block: Any = vit(KINDS["DINOv2"]).blocks[0]
    x = torch.randn(4, 7, 16)
    factors = torch.tensor([[0.0, 1, 2, 0], [0, 1, 0, 3]])
    found = block(x, factors)
    assert torch.equal(found[0], x[0])  # both branches dropped
    assert torch.equal(found[1], block(x)[1])
    attended = block.attn(block.norm1(x)) * block.ls1.gamma
    torch.testing.assert_close(found[2], x[2] + 2 * attended[2])
    transformed = block.mlp(block.norm2(x)) * block.ls2.gamma
    torch.testing.assert_close(found[3], x[3] + 3 * transformed[3])


@torch.inference_mode()
def test_drop_path_reaches_the_block_it_is_for() -> None:
    model, images = vit(), pixels()
    factors = torch.ones(12, 2, 3)
    assert torch.equal(model(images, drop_path=factors), model(images))
    factors[3, :, 1] = 0
    walked = list(model.walk(model.embed(images), (21, 12, 7), drop_path=factors))
    unchanged = [
        bool((b.x[1] == a.x[1]).all()) for a, b in pairwise(walked) if a.x.shape == b.x.shape
    ]
    assert unchanged == [i == 2 for i in range(9)]  # after blocks 0, 7 and 10 are stages
    logits = model(images, drop_path=0 * factors)
    patches = plain_embed(model, images)[:, 1:]
    torch.testing.assert_close(logits, plain_pool(model, patches, patches))


def test_layer_scale_starts_next_to_nothing() -> None:
    torch.manual_seed(0)
    model: Any = VisionTransformer(KINDS["DINOv2"])
    for block in model.blocks:
        assert block.ls1.gamma.tolist() == block.ls2.gamma.tolist() == pytest.approx([1e-5] * 16)


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


def test_attention_is_fused() -> None:
    with mock.patch.object(
        F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention
    ) as fused:
        vit()(pixels())
    assert fused.call_count == 12


@each_kind
def test_gradient_reaches_every_parameter(config: ViTConfig) -> None:
    model = vit(config)
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


def test_names_of_more_tokens_and_scales_are_those_of_deit_and_dinov2() -> None:
    plain = vit(KINDS["ViT"]).state_dict()
    deit, dino = vit(KINDS["DeiT"]).state_dict(), vit(KINDS["DINOv2"]).state_dict()
    assert set(deit) - set(plain) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    scales = {f"blocks.{i}.{name}.gamma" for i in range(12) for name in ("ls1", "ls2")}
    assert set(dino) - set(plain) == {"reg_token", *scales}
    assert deit["pos_embed"].shape == (1, 2 + 36, 16)
    assert dino["pos_embed"].shape == (1, 1 + 36, 16)  # registers have none
    assert dino["reg_token"].shape == (1, 4, 16)
    assert "blocks.0.attn.qkv.bias" not in vit(KINDS["all"]).state_dict()


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
        ({"depth": 10}, "outside the 10 blocks"),
        ({"reduction_points": (7, 0, 10)}, "must be in ascending order"),
        (
            {"reduction": "least"},
            "reduction 'least' is not one of ptr, ptr-normalised, weighted, merged, random, a",
        ),
        ({"distilled": True}, "a distilled model must pool its CLS and distillation tokens"),
        ({"gated_mlp": True, "pooling": "attention"}, "gated MLPs cannot be pooled by attention"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_as_many_counts_as_stages() -> None:
    with pytest.raises(ValueError, match="zip"):
        vit()(pixels(), (20, 10))


def test_a_gated_mlp_has_three_products() -> None:
    plain = ViTConfig(mlp_ratio=3.0)
    gated = replace(plain, mlp_ratio=2.0, gated_mlp=True)
    counts = plain.geometry.counts(0.7)
    assert gated.geometry.macs(counts) == plain.geometry.macs(counts)
