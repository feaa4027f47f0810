"""The moving average of weights."""

import pytest
import torch
from torch import nn

from pcae_training.average import WeightAverage


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def test_it_forgets_the_start_and_then_follows_the_decay() -> None:
    average, model = WeightAverage(linear(0.0), decay=0.9), linear(1.0)
    expected = 0.0
    for n in range(1, 201):
        average.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
        weight = average.module.get_parameter("weight").item()
        assert weight == pytest.approx(expected, abs=1e-5)
    assert expected > 0.999
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert model.weight.item() == 1.0


def test_a_loaded_average_goes_on_as_the_saved_one() -> None:
    whole, part = (WeightAverage(linear(0.0), decay=0.9) for _ in range(2))
    for step in range(6):
        whole.update(linear(float(step)))
    for step in range(3):
        part.update(linear(float(step)))
    resumed = WeightAverage(linear(7.0), decay=0.9)
    resumed.load_state_dict(part.state_dict())
    for step in range(3, 6):
        resumed.update(linear(float(step)))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_running_statistics_are_copied() -> None:
    norm = nn.BatchNorm1d(2)
    average = WeightAverage(norm, decay=0.9)
    norm(torch.randn(8, 2) + 3)
    average.update(norm)
    statistics = dict(norm.named_buffers())
    for name, value in average.module.named_buffers():
        assert torch.equal(value, statistics[name])
    assert statistics["running_mean"].abs().sum() > 0
