from typing import Any

import pytest
import torch
from torch import Tensor

from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.reduction import (
    RULES,
    Tokens,
    attention_received,
    fixed_order,
    reduce_tokens,
    redundancy,
)

POINTS, COUNTS = (0, 2), (21, 8)
#: The first patch is long: it alone is most of the paper's mean, and one of many once normalised.
ONE_LONG = torch.tensor([[[9.0, 1.0], [0.1, 1.0], [-0.1, 1.0], [0.3, 1.0], [1.0, 0.2]]])


def vit(rule: Any) -> VisionTransformer:
    """A model whose patches differ much, so that no rank hangs on rounding."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "image_size": 24,
        "patch_size": 4,
        "width": 16,
        "depth": 4,
        "heads": 2,
        "classes": 5,
    }
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


def of(patches: Tensor, sizes: Tensor | None = None) -> Tokens:
    """Patches [B, n, D] alone, as tokens without any prefix."""
    position = torch.arange(patches.shape[1]).expand(len(patches), -1)
    return Tokens(patches, patches.shape[1], position, 0, sizes)


def test_the_least_alike_are_kept_and_the_rest_averaged() -> None:
    patches = torch.tensor([[[1.0, 0.3], [1, 0.1], [0, 5], [1, -0.1], [-3, 0]]])
    left = reduce_tokens(of(patches), 2, 3, "ptr")
    # The mean is (0, 1.06): the cosines are the patches' shares of the second direction.
    assert left.position.tolist() == [[3, 4]]  # -0.1 and 0, against 0.29, 0.1 and 1
    assert torch.equal(left.patch_tokens[0], patches[0, [3, 4]])
    torch.testing.assert_close(left.x[:, 2:], torch.tensor([[[2 / 3, 5.4 / 3]]]))
    assert left.sizes is None


@pytest.mark.parametrize("dropped", [2, torch.tensor(2)])
def test_given_scores_decide(dropped: Any) -> None:
    patches = torch.arange(16.0).view(2, 4, 2)
    scores = torch.tensor([[0.3, -1.0, 0.1, 5.0], [4.0, 3.0, 2.0, 1.0]])
    left = reduce_tokens(of(patches), 2, dropped, "ptr", scores)
    assert left.position.tolist() == [[1, 2], [3, 2]]  # lowest first
    assert left.patch_tokens.tolist() == [[[2, 3], [4, 5]], [[14, 15], [12, 13]]]
    assert left.x[:, 2:].tolist() == [[[3, 4]], [[9, 10]]]
    assert reduce_tokens(of(patches), 2, dropped, "ptr", scores, means=0).x.shape[1] == 2


def test_gradient_reaches_kept_and_dropped_patches() -> None:
    patches = torch.randn(1, 5, 3, requires_grad=True)
    reduce_tokens(of(patches), 2, 3, "ptr", torch.arange(5.0)[None]).x.sum().backward()  # type: ignore[no-untyped-call]
    assert patches.grad is not None
    expected = torch.tensor([1, 1, 1 / 3, 1 / 3, 1 / 3])[:, None].expand(5, 3)
    torch.testing.assert_close(patches.grad[0], expected)


def test_weighted_means_count_as_what_they_stand_for() -> None:
    patches = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    once = reduce_tokens(of(patches), 5, 4, "weighted")
    assert once.sizes is not None
    assert once.sizes.tolist() == [[1, 1, 1, 1, 1, 4]]
    twice = reduce_tokens(once, 2, 3, "weighted")
    assert twice.sizes is not None
    assert twice.sizes.tolist() == [[1, 1, 4, 3]]
    for left in (once, twice):  # nothing was lost on the way: the mean is that of all nine
        torch.testing.assert_close(left.pool(), patches.mean(dim=1))


def test_merged_averages_into_the_most_alike() -> None:
    patches = torch.tensor([[[1.0, 0], [0, 1], [0.8, 0.1], [0, 3], [0.1, 2]]])
    scores = torch.tensor([[0.0, 1, 2, 3, 4]])
    left = reduce_tokens(of(patches), 2, 3, "merged", scores)
    assert left.position.tolist() == [[0, 1]]
    torch.testing.assert_close(left.x, torch.tensor([[[0.9, 0.05], [0.1 / 3, 2]]]))
    assert left.sizes is not None
    assert left.sizes.tolist() == [[2, 3]]
    again = reduce_tokens(left, 1, 1, "merged", torch.tensor([[5.0, 0]]))
    torch.testing.assert_close(again.x[:, 0], patches.mean(dim=1))  # 2 and 3 patches weigh so
    torch.testing.assert_close(again.pool(), patches.mean(dim=1))
    assert again.sizes is not None
    assert again.sizes.tolist() == [[5]]


def test_merged_keeps_equal_patches_apart() -> None:
    patches = torch.ones(1, 4, 3)  # a blank image: every kept one is as near as every other
    left = reduce_tokens(of(patches), 3, 1, "merged")
    assert torch.equal(left.x, patches[:, :3])
    assert left.sizes is not None
    assert sorted(left.sizes[0].tolist()) == [1, 1, 2]


@torch.inference_mode()
@pytest.mark.parametrize("rule", ["weighted", "merged"])
def test_a_token_of_size_s_is_attended_to_as_s_equal_ones(rule: Any) -> None:
    model = vit(rule)
    block: Any = model.blocks[0]
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    sized = Tokens(x, 3, torch.arange(3).expand(2, -1), 1, torch.tensor([[1.0, 3, 2]]))
    several = x[:, [0, 1, 2, 2, 2, 3, 3]]
    found = block(x, bias=sized.attention_bias)
    torch.testing.assert_close(found, block(several)[:, [0, 1, 2, 5]])


def test_fixed_order_is_a_permutation_and_always_the_same() -> None:
    assert sorted(fixed_order(9)[0].tolist()) == list(range(9))
    assert fixed_order(9)[0].tolist() == fixed_order(9)[0].tolist() != list(range(9))


def test_attention_received_is_without_gradient_and_sums_to_one() -> None:
    q, k = torch.randn(2, 3, 2, 9, 8, requires_grad=True)
    received = attention_received(q, k)
    assert received.shape == (3, 9)
    assert not received.requires_grad
    torch.testing.assert_close(received.sum(dim=1), torch.ones(3))


@torch.inference_mode()
@pytest.mark.parametrize("rule", ["ptr", "ptr-normalised", "weighted"])
def test_the_least_redundant_patches_stay(rule: Any) -> None:
    model = vit(rule)
    for point, (before, after) in zip(POINTS, stages(model), strict=True):
        x = model.blocks[point](before.x, bias=before.attention_bias)
        patches = before._replace(x=x).patch_tokens
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
    noise, kept = torch.rand(3, 36, generator=torch.Generator().manual_seed(4)), {}
    for rule in RULES:
        positions = [after.position[0].tolist() for _, after in stages(vit(rule), noise)]
        assert [len(set(position)) for position in positions] == list(COUNTS)
        assert set(positions[1]) < set(positions[0]) < set(range(36))
        kept[rule] = frozenset(positions[0])
    assert (
        kept["weighted"] == kept["merged"] == kept["ptr"]
    )  # they differ in what becomes of others
    assert len(set(kept.values())) == len(RULES) - 2 == 4


@torch.inference_mode()
@pytest.mark.parametrize("rule", RULES)
def test_patches_may_be_chosen_beforehand(rule: Any) -> None:
    """With the sets a rule has chosen nothing changes; with others, those stay."""
    noise, model = torch.rand(3, 36, generator=torch.Generator().manual_seed(4)), vit(rule)
    logits, kept = model.classify(pixels(), COUNTS, noise=noise)
    again, same = model.classify(pixels(), COUNTS, noise=noise, kept=kept)
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
    first = torch.arange(36).expand(3, -1)
    _, chosen = model.classify(pixels(), COUNTS, kept=[first[:, :21], first[:, :8]], noise=noise)
    assert [sorted(stage[1].tolist()) for stage in chosen] == [list(range(21)), list(range(8))]
    for one, other in zip(same, kept, strict=True):
        assert torch.equal(one.sort(dim=1).values, other.sort(dim=1).values)


def assert_dropped(after: Tokens, row: int, patches: Tensor, kept: list[int]) -> None:
    """What a stage leaves of one image's patches [n, D]: those kept, then the rest's mean."""
    rest = [patch for i, patch in enumerate(patches) if i not in kept]
    torch.testing.assert_close(after.patch_tokens[row], patches[kept])
    torch.testing.assert_close(after.x[row, -1], torch.stack(rest).mean(dim=0))
