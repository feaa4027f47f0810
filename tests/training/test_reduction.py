from typing import Any

import pytest
import torch
from torch import Tensor

from pcae_training.model import Tokens, VisionTransformer, ViTConfig
from pcae_training.reduction import RULES, attention_received, reduce_patches, redundancy

POINTS, COUNTS = (0, 2), (21, 8)
#: The first patch is long: it alone is most of the paper's mean, and one of many once normalised.
ONE_LONG = torch.tensor([[[9.0, 1.0], [0.1, 1.0], [-0.1, 1.0], [0.3, 1.0], [1.0, 0.2]]])


def vit(rule: Any) -> VisionTransformer:
    """A model whose patches differ much, so that no rank hangs on rounding."""
    torch.manual_seed(0)
    sizes = {"image_size": 24, "patch_size": 4, "width": 16, "depth": 4, "heads": 2, "classes": 5}
    model = VisionTransformer(ViTConfig(**sizes, reduction_points=POINTS, reduction=rule))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pixels() -> Tensor:
    """Images whose patches are strong and weak, so that the rules disagree."""
    random = torch.Generator().manual_seed(1)
    strength = 9 * torch.rand(3, 1, 6, 6, generator=random) ** 3
    strength = strength.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return strength * torch.randn(3, 3, 24, 24, generator=random)


def stages(model: VisionTransformer, noise: Tensor | None = None) -> list[tuple[Tokens, Tokens]]:
    """The tokens before the block of each stage, and after the stage."""
    walked = list(model.walk(model.embed(pixels()), COUNTS, noise=noise))
    return [(walked[point], walked[point + 1]) for point in POINTS]


def slow_cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt())


def slow_redundancy(patches: Tensor, normalised: bool) -> list[float]:
    """Of one image's patches [n, D], a patch at a time."""
    whole = [p / (p * p).sum().sqrt() for p in patches] if normalised else list(patches)
    mean = sum(whole) / len(whole)
    assert isinstance(mean, Tensor)
    return [slow_cosine(patch, mean) for patch in patches]


def slow_attention(block: Any, x: Tensor, heads: int) -> list[float]:
    """What the tokens of one image, x [N, D], receive: a head and a query at a time."""
    n, width = x.shape
    size = width // heads
    qkv = block.attn.qkv(block.norm1(x))
    received = [0.0] * n
    for head in range(heads):
        q = qkv[:, head * size : (head + 1) * size]
        k = qkv[:, width + head * size : width + (head + 1) * size]
        for query in q:
            powers = [float(((query * key).sum() / size**0.5).exp()) for key in k]
            for i, power in enumerate(powers):
                received[i] += power / sum(powers) / (heads * n)
    return received


def lowest(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: scores[i])[:count]


@pytest.mark.parametrize("normalised", [False, True])
def test_redundancy_agrees_with_a_slow_one(normalised: bool) -> None:
    patches = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    for found, row in zip(redundancy(patches, normalised), patches, strict=True):
        assert found.tolist() == pytest.approx(slow_redundancy(row, normalised), abs=1e-6)


def test_a_long_patch_weighs_no_more_once_normalised() -> None:
    assert redundancy(ONE_LONG)[0].argmax() == 4  # beside the long one
    assert redundancy(ONE_LONG, normalised=True)[0].argmax() == 3
    scaled = ONE_LONG * torch.tensor([1.0, 7, 0.2, 3, 5])[:, None]
    torch.testing.assert_close(redundancy(scaled, True), redundancy(ONE_LONG, True))


def test_ranking_is_float32_for_a_half_model() -> None:
    patches = torch.randn(2, 9, 8).bfloat16()
    assert torch.equal(redundancy(patches), redundancy(patches.float()))
    assert redundancy(patches).dtype == torch.float32
    q, k = torch.randn(2, 1, 2, 9, 8).bfloat16()
    assert torch.equal(attention_received(q, k), attention_received(q.float(), k.float()))


def test_reduce_patches_keeps_the_least_alike_and_averages_the_rest() -> None:
    patches = torch.tensor([[[1.0, 0.3], [1, 0.1], [0, 5], [1, -0.1], [-3, 0]]])
    kept, mean, index = reduce_patches(patches, 2, 3)
    # The mean is (0, 1.06): the cosines are the patches' shares of the second direction.
    assert index.tolist() == [[3, 4]]  # -0.1 and 0, against 0.29, 0.1 and 1
    assert torch.equal(kept[0], patches[0, [3, 4]])
    torch.testing.assert_close(mean, torch.tensor([[[2 / 3, 5.4 / 3]]]))


@pytest.mark.parametrize("dropped", [2, torch.tensor(2)])
def test_reduce_patches_goes_by_the_scores_it_is_given(dropped: Any) -> None:
    patches = torch.arange(16.0).view(2, 4, 2)
    scores = torch.tensor([[0.3, -1.0, 0.1, 5.0], [4.0, 3.0, 2.0, 1.0]])
    kept, mean, index = reduce_patches(patches, 2, dropped, scores)
    assert index.tolist() == [[1, 2], [3, 2]]  # lowest first
    assert kept.tolist() == [[[2, 3], [4, 5]], [[14, 15], [12, 13]]]
    assert mean.tolist() == [[[3, 4]], [[9, 10]]]


def test_gradient_reaches_kept_and_dropped_patches() -> None:
    patches = torch.randn(1, 5, 3, requires_grad=True)
    kept, mean, _ = reduce_patches(patches, 2, 3, torch.arange(5.0)[None])
    (kept.sum() + mean.sum()).backward()
    assert patches.grad is not None
    expected = torch.tensor([1, 1, 1 / 3, 1 / 3, 1 / 3])[:, None].expand(5, 3)
    torch.testing.assert_close(patches.grad[0], expected)


def test_attention_received_is_without_gradient_and_sums_to_one() -> None:
    q, k = torch.randn(2, 3, 2, 9, 8, requires_grad=True)
    received = attention_received(q, k)
    assert received.shape == (3, 9)
    assert not received.requires_grad
    torch.testing.assert_close(received.sum(dim=1), torch.ones(3))


@torch.inference_mode()
@pytest.mark.parametrize("rule", ["ptr", "ptr-normalised"])
def test_the_least_redundant_patches_stay(rule: Any) -> None:
    model = vit(rule)
    for point, (before, after) in zip(POINTS, stages(model), strict=True):
        patches = Tokens(model.blocks[point](before.x), *before[1:]).patch_tokens
        for row in range(3):
            scores = slow_redundancy(patches[row], normalised=rule == "ptr-normalised")
            expected = lowest(scores, after.patches)
            assert after.position[row].tolist() == before.position[row, expected].tolist()
            assert_dropped(after, row, patches[row], expected)


@torch.inference_mode()
def test_the_most_attended_patches_stay() -> None:
    model = vit("attention")
    for point, (before, after) in zip(POINTS, stages(model), strict=True):
        block = model.blocks[point]
        patches = Tokens(block(before.x), *before[1:]).patch_tokens
        for row in range(3):
            received = slow_attention(block, before.x[row], heads=2)[1 : 1 + before.patches]
            expected = lowest([-share for share in received], after.patches)
            assert after.position[row].tolist() == before.position[row, expected].tolist()
            assert_dropped(after, row, patches[row], expected)


@torch.inference_mode()
def test_the_patches_of_the_lowest_noise_stay() -> None:
    noise = torch.rand(3, 36, generator=torch.Generator().manual_seed(4))
    model = vit("random")
    for point, count, (before, after) in zip(POINTS, COUNTS, stages(model, noise), strict=True):
        patches = Tokens(model.blocks[point](before.x), *before[1:]).patch_tokens
        for row in range(3):
            expected = lowest(noise[row].tolist(), count)  # of all patches: stages are nested
            assert after.position[row].tolist() == expected
            places = before.position[row].tolist()
            assert_dropped(after, row, patches[row], [places.index(i) for i in expected])


@torch.inference_mode()
def test_random_draws_anew_where_it_is_given_no_noise() -> None:
    model = vit("random")
    first, second = (model.classify(pixels(), COUNTS)[1][1] for _ in range(2))
    assert first.shape == second.shape == (3, 8)
    assert not torch.equal(first, second)
    assert len({tuple(sorted(row)) for row in first.tolist()}) == 3  # each image its own


@torch.inference_mode()
def test_rules_keep_different_patches_each_stage_within_the_one_before() -> None:
    noise, kept = torch.rand(3, 36, generator=torch.Generator().manual_seed(4)), set()
    for rule in RULES:
        positions = [after.position[0].tolist() for _, after in stages(vit(rule), noise)]
        assert [len(set(position)) for position in positions] == list(COUNTS)
        assert set(positions[1]) < set(positions[0]) < set(range(36))
        kept.add(frozenset(positions[0]))
    assert len(kept) == len(RULES) == 4


def assert_dropped(after: Tokens, row: int, patches: Tensor, kept: list[int]) -> None:
    """What a stage leaves of one image's patches [n, D]: those kept, then the rest's mean."""
    rest = [patch for i, patch in enumerate(patches) if i not in kept]
    torch.testing.assert_close(after.patch_tokens[row], patches[kept])
    torch.testing.assert_close(after.x[row, -1], torch.stack(rest).mean(dim=0))
