"""A frozen backbone, and the head first, then all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pcae_serve.command import run
from pcae_training import checkpoint as checkpoints
from pcae_training.commands import Train
from pcae_training.finetune import Finetuning, finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.finetune_start import prepare
from pcae_training.trainer import parameter_groups

TINY: dict[str, Any] = {"image_size": 8, "patch_size": 2, "width": 8, "heads": 2, "depth": 11}
RUN: dict[str, Any] = {
    "epochs": 2, "batch_size": 8, "holdout": 4, "keep": 1.0, "lr": 1e-2, "randaugment": 0,
}  # fmt: skip


@pytest.fixture
def tune(class_folders: Any, tmp_path: Path) -> Any:
    data = str(class_folders(10))

    def make(out: str, **changes: Any) -> FinetuneSettings:
        sizes = {} if "init" in changes else TINY
        return FinetuneSettings(data=data, out=tmp_path / out, **sizes | RUN | changes)

    return make


def pretrained(tune: Any) -> Path:
    """A run whose classes have other names, so that its head does not fit."""
    run = tune("first", epochs=1)
    finetune(run)
    config = run.folder / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace('"dark"', '"dusky"'))
    return Path(run.folder)


def changed(one: Path, other: Path) -> set[str]:
    before, after = (checkpoints.load(each).model.state_dict() for each in (one, other))
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_the_head_is_trained(tune: Any) -> None:
    first = pretrained(tune)
    run = tune("frozen", init=first, freeze=True, weight_ema=0.9)
    finetune(run)
    assert changed(first, run.folder) == {"head.weight", "head.bias"}


def test_what_is_new_is_trained_too(tune: Any) -> None:
    """Another pooling has another final norm."""
    first = pretrained(tune)
    run = tune("frozen", init=first, freeze=True, pooling="cls")
    finetune(run)
    new = prepare(run).new
    assert new == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    before, after = (checkpoints.load(each).model.state_dict() for each in (first, run.folder))
    for name, value in before.items():
        if not name.startswith(("head", "fc_norm")):
            assert torch.equal(after[name], value)
    assert not torch.equal(after["norm.weight"], torch.ones(8))


def test_the_head_first_and_then_all(tune: Any) -> None:
    first = pretrained(tune)
    half = tune("half", init=first, freeze_first=0.5, stop_after=1)
    finetune(half)
    assert changed(first, half.folder) == {"head.weight", "head.bias"}
    finetune(half.model_copy(update={"stop_after": None, "resume": True}))
    assert "blocks.0.attn.qkv.weight" in changed(first, half.folder)
    whole = tune("whole", init=first, freeze_first=0.5)
    finetune(whole)
    one, two = (checkpoints.load_state(run.folder) for run in (half, whole))
    assert one is not None
    assert two is not None
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not changed(half.folder, whole.folder)


def test_what_is_frozen_costs_one_pass_and_is_not_counted(tune: Any) -> None:
    start = prepare(run := tune("run", init=pretrained(tune), freeze_first=0.5))
    objective = Finetuning(start.checkpoint, run, start.holdout, new=start.new)
    assert objective.macs(0.6) == 3 * objective.macs(0.4)
    run = run.model_copy(update={"freeze_first": 0.0, "freeze": True})
    frozen = Finetuning(start.checkpoint, run, start.holdout, new=start.new)
    groups = parameter_groups(frozen, frozen.model, 0.05)
    assert sum(p.numel() for group in groups for p in group["params"]) == 8 * 2 + 2


def test_a_preset_is_other_defaults(class_folders: Any, tmp_path: Path) -> None:
    fixed: dict[str, Any] = {"data": "x", "out": tmp_path, "preset": "small-data"}
    preset = FinetuneSettings(**fixed, init=tmp_path / "vit")
    assert (preset.epochs, preset.mixup, preset.select) == (30, 0.0, "best")
    assert preset.freeze_first == 0.2
    given = FinetuneSettings(**fixed, init=tmp_path / "vit", epochs=5, freeze=True)
    assert (given.epochs, given.freeze, given.freeze_first) == (5, True, 0.0)
    assert FinetuneSettings(**fixed).freeze_first == 0.0  # there is nothing to freeze
    data = ["--data", str(class_folders(4)), "--preset", "small-data", "--dry-run"]
    sizes = ["--image-size", "8", "--patch-size", "2", "--width", "8", "--heads", "2"]
    assert run(Train, ["finetune", *data, *sizes, "--holdout", "2", "--keep", "0.6"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": True}, "--freeze keeps the weights of --init, which is missing"),
        ({"freeze_first": 0.5}, "--freeze keeps the weights of --init, which is missing"),
        ({"init": "x", "freeze": True, "freeze_first": 0.5}, "omit --freeze-first"),
    ],
)
def test_flags_that_cannot_be(changes: dict[str, Any], message: str, tune: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        tune("run", **changes)
    assert message in str(caught.value)
