"""The best epoch of a run: which it is, what is kept of it, and when a run stops early."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.best_epoch import BestEpoch
from pcae_training.finetune import Finetuning, finetune
from pcae_training.finetune_settings import FinetuneSettings

TINY: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "width": 8, "heads": 2, "depth": 11, "batch_size": 8,
    "holdout": 4, "budgets": (1.0, 0.6), "crop": 0, "randaugment": 0, "mixup": 0, "cutmix": 0,
}  # fmt: skip


@pytest.fixture
def tune(class_folders: Any, tmp_path: Path) -> Any:
    data = str(class_folders(10))

    def make(out: str, **changes: Any) -> FinetuneSettings:
        return FinetuneSettings(data=data, out=tmp_path / out, **TINY | changes)

    return make


def rows(*scores: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch, "holdout_top1": {"1.0": large, "0.6": small}}
        for epoch, (large, small) in enumerate(scores, 1)
    ]


def test_the_mean_over_the_budgets_decides_and_the_first_of_equals() -> None:
    best = BestEpoch()
    assert best.find([]) is None
    assert best.find(rows((0.9, 0.5), (0.8, 0.7), (0.7, 0.8))) == 2


def test_patience() -> None:
    history = rows((0.5, 0.5), (0.6, 0.6), (0.6, 0.6), (0.6, 0.5))
    assert not BestEpoch(patience=2).exhausted(history[:3])
    assert BestEpoch(patience=2).exhausted(history)
    assert not BestEpoch(patience=2).exhausted([])
    assert not BestEpoch().exhausted(history)


def scores(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Replace the held-out score after each epoch."""

    def after_epoch(self: Finetuning, _: Any) -> Any:
        epoch = next(given)
        return {"holdout_top1": {"1.0": epoch}}

    given = iter(values)
    monkeypatch.setattr(Finetuning, "after_epoch", after_epoch)


@pytest.mark.parametrize("weight_ema", [0.0, 0.5])
def test_the_weights_of_the_best_epoch_are_kept(
    weight_ema: float,
    tune: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores(monkeypatch, 0.1, 0.9, 0.5, 0.5)
    run = tune("best", epochs=9, patience=2, weight_ema=weight_ema)
    assert finetune(run) is not None
    saved = checkpoints.load(run.out)
    assert [row["epoch"] for row in saved.training["history"]] == [1, 2, 3, 4]
    assert saved.training["selected_epoch"] == 2
    assert "kept the weights of epoch 2" in capsys.readouterr().err
    scores(monkeypatch, 0.1, 0.9)
    second = tune("two", epochs=9, stop_after=2, weight_ema=weight_ema)
    assert finetune(second) is not None
    expected = checkpoints.load(second.out).model.state_dict()
    for name, value in saved.model.state_dict().items():
        assert torch.equal(value, expected[name])


def test_a_run_in_two_parts_keeps_the_same_weights(
    tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, 0.9, 0.5, 0.6)
    whole = tune("whole", epochs=3, select="best")
    finetune(whole)
    parts = tune("parts", epochs=3, select="best")
    scores(monkeypatch, 0.9, 0.5, 0.6)
    finetune(parts.model_copy(update={"stop_after": 2}))
    assert "selected_epoch" not in checkpoints.load(parts.out).training
    finetune(parts.model_copy(update={"resume": True}))
    for load in (lambda out: checkpoints.load(out).model.state_dict(), checkpoints.load_state):
        one, two = load(whole.out), load(parts.out)
        assert one is not None
        assert two is not None
        assert all(torch.equal(one[name], two[name]) for name in one)
    finetune(parts.model_copy(update={"resume": True}))  # of a finished run
    assert checkpoints.load(parts.out).training["selected_epoch"] == 1


def test_the_best_epoch_was_removed(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tune("gone", epochs=2, select="best")
    finetune(run.model_copy(update={"stop_after": 1}))
    scores(monkeypatch, 0.0)
    best = run.out / "best"
    best.rename(run.out / "elsewhere")
    with pytest.raises(PcaeError, match="best"):
        finetune(run.model_copy(update={"resume": True}))


def test_patience_needs_the_best_epoch(tune: Any) -> None:
    assert tune("a", patience=1).select == "best"
    with pytest.raises(ValidationError, match="it needs --select best"):
        tune("a", patience=1, select="last")
