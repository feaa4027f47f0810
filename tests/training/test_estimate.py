import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.estimate import describe_time, measure_step
from pcae_training.finetune import Finetuning, finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.plan import Plan
from pcae_training.sample_rng import SampleRng
from pcae_training.settings import RunSettings
from pcae_training.world import World

PREPROCESS = Preprocess(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def plan(**changes: Any) -> Plan:
    settings = RunSettings(data="x", dry_run=True, batch_size=100, **changes)
    return Plan(settings, World(torch.device("cpu")), 1000)


@pytest.mark.parametrize(
    ("changes", "first_step", "text"),
    [
        ({"epochs": 100}, 0, "about 33 min for 100 epochs on this machine"),
        ({"epochs": 100, "stop_after": 1}, 0, "about 20 s for 1 epoch on this machine"),
        ({"epochs": 100}, 400, "about 20 min for 600 steps on this machine"),
    ],
)
def test_a_constant_cost(changes: dict[str, Any], first_step: int, text: str) -> None:
    run = plan(**changes)
    described = describe_time(run, lambda _: 7.0, 2.0, progress=1.0, first_step=first_step)
    assert described == text
    assert describe_time(run, lambda _: 7.0, 2.0, progress=1.0, shortest_s=1e5) is None


def test_a_cost_that_changes_is_averaged_over_the_run() -> None:
    run = plan(epochs=100)  # 1,000 steps: half of them at three times the cost

    def macs(progress: float) -> float:
        return 1.0 if progress < 0.5 else 3.0

    assert describe_time(run, macs, 3.6, progress=0.0) == "about 2 h for 100 epochs on this machine"
    assert describe_time(run, macs, 10.8, progress=1.0) == (
        "about 2 h for 100 epochs on this machine"
    )


class Objective(nn.Module):
    """An objective that takes `image_s` per image on a virtual clock, and 50 s more at first."""

    def __init__(self, image_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.now, self.image_s, self.extra_s, self.images = 0.0, image_s, 50.0, 0

    def forward(self, pixels: Tensor, labels: Tensor, rng: Any, progress: float) -> Tensor:
        assert progress == 1.0
        assert pixels.shape[1:] == (3, 8, 8)
        self.images += len(pixels)
        self.now += self.image_s * len(pixels) + self.extra_s
        self.extra_s = 0.0
        return self.weight.sum()


@pytest.mark.parametrize(
    ("image_s", "images"),
    [(0.1, 2 + 3 * 16), (1.0, 2 + 16)],  # no other step is timed after a slow one
)
def test_a_step_is_timed_on_few_images(
    image_s: float, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Objective(image_s)
    monkeypatch.setattr(time, "monotonic", lambda: objective.now)
    seconds = measure_step(objective, plan(accumulate=2), PREPROCESS, classes=2)
    assert objective.images == images
    assert seconds == pytest.approx(image_s * 100)  # of 100 images in two micro-batches
    assert objective.weight.grad is None


def test_the_expected_cost_is_that_of_the_budgets_that_are_drawn() -> None:
    fixed: dict[str, Any] = {"image_size": 12, "patch_size": 2, "width": 8, "heads": 2}
    for change in ({}, {"keep": 0.5}, {"sampling": "one"}):
        budgets = {} if "keep" in change else {"budgets": (1.0, 0.8, 0.6, 0.4)}
        settings = FinetuneSettings(data="x", dry_run=True, **fixed | budgets | change)
        model: Any = nn.Module()
        model.config = settings.config(2)
        objective = Finetuning.__new__(Finetuning)
        nn.Module.__init__(objective)
        objective.model, objective.settings = model, settings
        objective.budgets = settings.budget_choice
        geometry = model.config.geometry
        for progress in (0.0, 0.2, 1.0):
            drawn = [objective.budgets.draw(rng(step), progress) for step in range(400)]
            cost = [sum(geometry.macs(geometry.counts(k)) for k in ratios) for ratios in drawn]
            assert objective.macs(progress) == pytest.approx(3 * sum(cost) / 400, rel=0.03)


def rng(step: int) -> SampleRng:
    return SampleRng(0, step, 4)


def test_a_run_states_its_time_after_a_few_steps(
    class_folders: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = FinetuneSettings(
        data=str(class_folders(20)), out=tmp_path / "out", image_size=8, patch_size=2, width=8,
        heads=2, depth=11, batch_size=5, epochs=1, holdout=10, crop=0, randaugment=0, keep=0.5,
    )  # fmt: skip
    finetune(settings)
    assert "on this machine" not in capsys.readouterr().err  # shorter than a minute
    monkeypatch.setattr("pcae_training.trainer.STATED_FROM_S", 0)
    finetune(settings.model_copy(update={"out": tmp_path / "again"}))
    assert capsys.readouterr().err.count("for 1 epoch on this machine") == 1
