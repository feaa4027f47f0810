from typing import Any

import pytest
import torch

from pcae_serve.preprocess import Preprocess
from pcae_training.data import LabelledImages, load
from pcae_training.evaluate import Top1, evaluate, normalise
from pcae_training.model import VisionTransformer, ViTConfig

PREPROCESS = Preprocess(8, 8, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))


@pytest.fixture
def images(class_folders: Any) -> LabelledImages:
    return load(str(class_folders(6)), "train", PREPROCESS)


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(ViTConfig(8, 2, width=8, heads=2, classes=2))


def test_top1_tells_its_interval() -> None:
    top1 = Top1(correct=4600, n=5000)
    assert top1.value == 0.92
    assert top1.interval == pytest.approx((0.9122, 0.9272), abs=1e-4)  # Wilson
    assert str(top1) == "92.00 % [91.22, 92.72] of 5,000"
    assert Top1(5, 5).interval[1] == pytest.approx(1)


def test_normalise_is_what_the_graph_does() -> None:
    pixels = torch.tensor([0, 102, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.5) / 0.5, (0.4 - 0.4) / 0.25, (1 - 0.3) / 0.2]
    torch.testing.assert_close(normalise(pixels, PREPROCESS).flatten(), torch.tensor(expected))


def test_every_budget_is_counted_on_the_rows_asked_for(
    images: LabelledImages, model: VisionTransformer
) -> None:
    rows, budgets = [0, 3, 7, 8, 11], (1.0, 0.6)
    accuracy = evaluate(model, images, rows, budgets, batch_size=2)
    assert list(accuracy) == [1.0, 0.6]
    for budget in budgets:
        counts = model.config.geometry.counts(budget)
        hits = 0
        for row in rows:
            pixels, label = images[row]
            hits += int(model(normalise(pixels[None], PREPROCESS), counts).argmax()) == label
        assert accuracy[budget] == Top1(hits, 5)


def test_a_budget_named_twice_counts_once(images: LabelledImages, model: VisionTransformer) -> None:
    assert evaluate(model, images, range(12), (1.0, 1.0)) == evaluate(
        model, images, range(12), (1.0,)
    )


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(images: LabelledImages, model: VisionTransformer, training: bool) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(model, images.in_memory(), range(12), (1.0,), precision=torch.bfloat16)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
