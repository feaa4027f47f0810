import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training import finetune as module
from pcae_training.finetune import (
    FinetuneSettings,
    Trainer,
    augmentation,
    finetune,
    parameter_groups,
)
from pcae_training.model import VisionTransformer, ViTConfig


@pytest.fixture
def settings(class_folders: Any, tmp_path: Path) -> Any:
    """Settings of a run of a second; `out` and others as named."""
    data = str(class_folders(20))

    def make(out: str = "out", **changes: Any) -> FinetuneSettings:
        sizes = {} if "init" in changes else {"image_size": 8, "width": 8, "heads": 2, "depth": 11}
        fixed: dict[str, Any] = {
            "patch_size": 2, "budgets": (1.0, 0.6), "epochs": 2, "batch_size": 10, "lr": 3e-3,
            "shift": 1, "holdout": 10, "erase": 0.2,
        }  # fmt: skip
        return FinetuneSettings(data=data, out=tmp_path / out, **sizes | fixed | changes)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder).model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_learns_what_can_be_told_apart(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = settings(epochs=4, lr=1e-2, label_smoothing=0)
    accuracy = finetune(run)
    assert {budget: (t.value, t.n) for budget, t in accuracy.items()} == {
        1.0: (1.0, 10),
        0.6: (1.0, 10),
    }
    saved = checkpoints.load(run.out)
    assert saved.labels == ["bright", "dark"]
    training = saved.training
    losses = [epoch["train_loss"] for epoch in training["history"]]
    assert losses[-1] < losses[0] / 2
    assert [epoch["epoch"] for epoch in training["history"]] == [1, 2, 3, 4]
    assert set(training["history"][0]["holdout_top1"]) == {"1.0", "0.6"}
    assert training["final"] == {"1.0": {"top1": 1.0, "n": 10}, "0.6": {"top1": 1.0, "n": 10}}
    assert training["epochs_done"] == 4
    assert training["settings"]["budgets"] == [1.0, 0.6]
    printed = capsys.readouterr()
    assert "keep 0.6   held-out top-1" in printed.out + printed.err


def test_resumed_is_bit_for_bit_unbroken(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = settings("whole", epochs=3), settings("broken", epochs=3)
    finetune(whole)

    epoch = Trainer.epoch

    def stop_after_one(self: Trainer, number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt
        epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            finetune(broken)
    assert checkpoints.load(broken.out).training["epochs_done"] == 1
    resumed = broken.model_copy(update={"resume": True})
    accuracy = finetune(resumed)
    assert same(weights(whole.out), weights(broken.out))
    one, other = (checkpoints.load(out).training for out in (whole.out, broken.out))
    assert one["final"] == other["final"]
    assert [e["train_loss"] for e in one["history"]] == [e["train_loss"] for e in other["history"]]

    assert finetune(resumed) == accuracy  # nothing is left to do, and nothing changes
    assert same(weights(whole.out), weights(broken.out))
    assert len(checkpoints.load(broken.out).training["history"]) == 3


def test_a_run_can_be_had_in_two_parts(settings: Any) -> None:
    whole, parts = settings("whole", epochs=2), settings("parts", epochs=2)
    finetune(whole)
    finetune(parts.model_copy(update={"stop_after": 1}))
    training = checkpoints.load(parts.out).training
    assert training["epochs_done"] == 1
    assert training["final"]
    finetune(parts.model_copy(update={"resume": True}))
    assert same(weights(whole.out), weights(parts.out))


def test_resume_refuses_another_run(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(PcaeError, match=r"no checkpoint: .*out/config\.json cannot be read"):
        finetune(settings(resume=True))
    finetune(settings(epochs=1))
    with pytest.raises(PcaeError, match=r"written with another --epochs, --lr$"):
        finetune(settings(resume=True, epochs=3, lr=1e-4))
    (tmp_path / "out" / "training_state.safetensors").unlink()
    with pytest.raises(PcaeError, match="without its optimiser's state"):
        finetune(settings(resume=True, epochs=1))


def test_every_budget_is_drawn_and_the_ramp_holds_back(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets, drawn = (1.0, 0.8, 0.6), []
    step = Trainer.step

    def recorded(self: Trainer, number: int, *batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        result = step(self, number, *batch)
        drawn.append((number / self.steps, result[1]))
        return result

    monkeypatch.setattr(Trainer, "step", recorded)
    finetune(settings(epochs=4, batch_size=3, budgets=budgets))
    assert {ratio for at, ratio in drawn if at <= 0.1} == {1.0}
    assert {ratio for at, ratio in drawn if at >= 0.35} == set(budgets)


def test_from_a_checkpoint_with_another_patch_size(settings: Any) -> None:
    first = settings("first", patch_size=4, epochs=1, budgets=(1.0,))
    finetune(first)
    second = settings("second", init=first.out, epochs=1)
    finetune(second)
    saved = checkpoints.load(second.out)
    assert (saved.model.config.patch_size, saved.model.config.image_size) == (2, 8)
    assert saved.training["init"]["settings"]["patch_size"] == 4  # how it came about is kept


def test_a_checkpoint_of_other_labels(settings: Any) -> None:
    first = settings("first", epochs=1)
    finetune(first)
    config = first.out / "config.json"
    config.write_text(config.read_text().replace('"dark"', '"dusky"'))
    with pytest.raises(PcaeError, match="was trained on labels"):
        finetune(settings("second", init=first.out))


def test_a_budget_the_checkpoint_cannot_serve(settings: Any) -> None:
    first = settings("first", patch_size=4, epochs=1, budgets=(1.0,))
    finetune(first)
    with pytest.raises(PcaeError, match=r"keep ratio 0.3 leaves no patch"):
        finetune(settings("second", init=first.out, patch_size=None, budgets=(0.3,)))


def test_a_run_that_diverges_leaves_the_last_good_checkpoint(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(epochs=2)
    normalise = module.normalise

    def poisoned(pixels: torch.Tensor, preprocess: Any) -> torch.Tensor:
        images = normalise(pixels, preprocess)
        return images / 0 if run.out.exists() else images

    monkeypatch.setattr(module, "normalise", poisoned)
    with pytest.raises(PcaeError, match="the loss in epoch 2 is nan: try a smaller --lr"):
        finetune(run)
    assert checkpoints.load(run.out).training["epochs_done"] == 1


def test_a_place_that_holds_something_else_is_refused_before_training(
    settings: Any, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    with pytest.raises(PcaeError, match="is no checkpoint: it is not replaced"):
        finetune(settings())


def test_bf16_and_lazy_loading(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcae_training.data.MEMORY_LIMIT_BYTES", 0)
    run = settings(epochs=1, precision="bf16")
    finetune(run)
    assert {tensor.dtype for tensor in weights(run.out).values()} == {torch.float32}
    assert json.loads((run.out / "training.json").read_text())["epochs_done"] == 1


def test_no_decay_on_biases_norms_and_positions() -> None:
    model = VisionTransformer(ViTConfig(8, 2, width=8, heads=2, classes=2))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, free = parameter_groups(model, 0.05)
    assert {names[p].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}  # type: ignore[attr-defined]
    assert {"cls_token", "pos_embed", "fc_norm.weight"} <= {names[p] for p in free["params"]}  # type: ignore[attr-defined]
    assert len(decayed["params"]) + len(free["params"]) == len(names)  # type: ignore[arg-type]


def test_augmentation_off_changes_nothing(settings: Any) -> None:
    images = torch.randn(4, 3, 8, 8)
    off = augmentation(settings(shift=0, flip=False, erase=0), 8)
    assert torch.equal(off(images), images)
    on = augmentation(settings(shift=2, flip=True, erase=0.5), 8)(images)
    assert on.shape == images.shape
    assert not torch.equal(on, images)


@pytest.mark.parametrize("written", ["1.0,.5", "[1.0, 0.5]", ".5,1", (0.5, 1.0, 1.0), ["1", ".5"]])
def test_budgets_are_read_in_many_forms(written: Any) -> None:
    run = FinetuneSettings(data="x", out=Path("y"), budgets=written)
    assert run.budgets == (1.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": "a"}, "keep ratio must be a number"),
        ({"budgets": ""}, "keep ratio must be a number"),
        ({"budgets": "1.0,1.1"}, "not 1.1"),
        ({"budgets": "nan"}, "keep ratio must be"),
        ({"budgets": ()}, "keep ratios are numbers with commas between"),
        ({"budgets": 0.01}, "keep ratios are numbers with commas between"),
        ({"budgets": "0.01"}, "leaves no patch"),
        ({"image_size": 28}, "patch size 16 does not divide 28"),
        ({"width": 194}, "do not divide width"),
        ({"depth": 4}, "greater than or equal to 11"),
        ({"ramp_start": 0.5, "ramp_length": 0.6}, "reach beyond the run"),
        ({"init": Path("z"), "width": 64, "image_size": 28}, "leave out --image-size, --width"),
        ({"device": "tpu"}, "should match pattern"),
        ({"lr": 0}, "greater than 0"),
    ],
)
def test_flags_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FinetuneSettings(data="x", out=Path("y"), **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_such_device(settings: Any) -> None:
    with pytest.raises(PcaeError, match="there is no cuda on this machine"):
        finetune(settings(device="cuda"))
