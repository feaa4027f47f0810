import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pcae_training.diversity import measure_layers, nuclear_norm_per_token
from pcae_training.model import VisionTransformer, ViTConfig

TINY = ViTConfig(8, 2, width=8, heads=2, classes=2)


def vit(config: ViTConfig = TINY) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(config).eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def slow(tokens: Tensor) -> float:
    """Paper, appendix A, for one image's tokens [N, D]."""
    rows = tokens.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return float(np.linalg.svd(rows)[1].sum() / len(rows))


def plain_layers(model: VisionTransformer, image: Tensor) -> list[Tensor]:
    """Patch tokens [N, D] of one image [3, H, W] as they enter and after every block."""
    x = model.embed(image[None])
    layers = [x[0, 1:]]
    for block in model.blocks:
        x = block(x)
        layers.append(x[0, 1:])
    return layers


@pytest.mark.parametrize("shape", [(5, 16), (16, 5), (7, 7), (1, 4)])
def test_it_is_the_papers_measure(shape: tuple[int, int]) -> None:
    tokens = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    expected = torch.tensor([slow(image) for image in tokens])
    torch.testing.assert_close(nuclear_norm_per_token(tokens), expected, atol=1e-5, rtol=0)


def test_tokens_that_are_the_same_reach_the_lower_bound() -> None:
    one = torch.tensor([1.0, 2.0, 3.0])
    tokens = torch.stack([one, 5 * one, -one, one])[None]  # lengths and signs count for nothing
    assert nuclear_norm_per_token(tokens).item() == pytest.approx(1 / math.sqrt(4))


def test_orthogonal_tokens_reach_the_upper_bound() -> None:
    assert nuclear_norm_per_token(3 * torch.eye(4, 9)[None]).item() == pytest.approx(1)
    frame = torch.cat([torch.eye(3), torch.eye(3)])[None]  # 6 tokens of 3 dimensions
    assert nuclear_norm_per_token(frame).item() == pytest.approx(math.sqrt(3 / 6))


def test_half_tokens_are_measured_in_float32() -> None:
    tokens = torch.randn(2, 6, 8).bfloat16()
    measured = nuclear_norm_per_token(tokens)
    assert measured.dtype == torch.float32
    assert torch.equal(measured, nuclear_norm_per_token(tokens.float()))


def test_every_layer_is_averaged_over_images() -> None:
    model = vit()
    with torch.inference_mode():
        per_image = [[slow(x) for x in plain_layers(model, image)] for image in images()]
    found = measure_layers(model, images())
    assert found.shape == (13,)
    expected = torch.tensor(np.mean(per_image, axis=0), dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_with_reduction_only_the_patches_left_count() -> None:
    model, counts = vit(), (11, 7, 4)
    found = measure_layers(model, images(1), counts)
    with torch.inference_mode():
        layers = plain_layers(model, images(1)[0])
        _, kept = model.classify(images(1), counts)
    assert found[0].item() == pytest.approx(slow(layers[0]), abs=1e-5)
    # the first stage comes after block 0, before anything else has changed
    assert found[1].item() == pytest.approx(slow(layers[1][kept[0][0]]), abs=1e-5)
    for layer, n in ((1, 11), (8, 7), (11, 4), (12, 4)):
        assert 1 / math.sqrt(n) <= found[layer] <= math.sqrt(min(n, 8) / n)
    assert found[12] != pytest.approx(slow(layers[12]), abs=1e-3)


def test_the_random_rule_takes_its_noise() -> None:
    model = vit(replace(TINY, reduction="random"))
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(3))
    one, again = (measure_layers(model, images(), (8, 4, 2), noise=noise) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, measure_layers(model, images(), (8, 4, 2), noise=1 - noise))
