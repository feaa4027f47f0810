"""Rank, deviation and k-NN accuracy against slow references."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pcae_training.feature_figures import TokenSpread, effective_rank, knn_accuracy


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_rank(features: Tensor) -> float:
    """The same through the covariance's eigenvalues, one at a time."""
    x = features.double().numpy()
    variances = np.linalg.eigvalsh(np.cov(x.T))
    total = sum(max(v, 0.0) for v in variances)
    entropy = sum(-v / total * math.log(v / total) for v in variances if v > 1e-12)
    return math.exp(entropy)


def slow_knn(features: Tensor, labels: list[int], neighbours: int) -> float:
    """An image at a time; ties by counting from the nearest."""
    right = 0
    for i in range(len(features)):
        others = [j for j in range(len(features)) if j != i]
        others.sort(key=lambda j: float((features[i] - features[j]).double().norm()))
        near = [labels[j] for j in others[:neighbours]]
        most = max(near.count(label) for label in near)
        right += next(label for label in near if near.count(label) == most) == labels[i]
    return right / len(features)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (100, 100)])
def test_effective_rank(shape: tuple[int, int]) -> None:
    features = random(*shape) * torch.logspace(0, -2, shape[1]) + 3
    assert effective_rank(features) == pytest.approx(slow_rank(features), rel=1e-4)


def test_bounds_of_the_rank() -> None:
    line = torch.linspace(0, 1, 20)[:, None] * random(1, 6) + 5
    assert effective_rank(line) == pytest.approx(1)
    even = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_rank(even) == pytest.approx(6)


def test_rounding_is_not_rank() -> None:
    """Equal outputs differ in the last bits, in all directions."""
    constant = random(1, 16).expand(50, -1)
    assert effective_rank(constant) == 0
    assert effective_rank(constant + 1e-7 * random(50, 16, seed=1)) == 0
    assert effective_rank(constant + 1e-2 * random(50, 16, seed=1)) > 10


@pytest.mark.parametrize("neighbours", [1, 5])
def test_knn_accuracy(neighbours: int) -> None:
    labels = torch.arange(60) % 4
    features = random(60, 5) + torch.nn.functional.one_hot(labels, 5)
    expected = slow_knn(features, labels.tolist(), neighbours)
    assert 0.2 < expected < 1
    assert knn_accuracy(features, labels, neighbours) == pytest.approx(expected)


def test_fewer_images_than_neighbours() -> None:
    features, labels = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([1, 1, 0])
    assert knn_accuracy(features, labels, 5) == pytest.approx(2 / 3)  # a tie: the nearest


def test_tokens_in_batches() -> None:
    tokens = random(30, 7, 4) * torch.rand(7, 4) + 10 * random(7, 4, seed=1)
    spread = TokenSpread()
    for part in torch.split(tokens, 8):
        spread.add(part)
    torch.testing.assert_close(spread.features, tokens.mean(dim=1))
    slow = [float(tokens[:, p, d].std(correction=0)) for p in range(7) for d in range(4)]
    assert spread.deviation == pytest.approx(sum(slow) / len(slow), rel=1e-5)
