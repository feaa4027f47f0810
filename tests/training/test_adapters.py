"""Low-rank adapters: few numbers are trained, a plain model is saved, and runs resume exactly."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pcae_serve.command import run
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.adapters import (
    AdaptedLinear,
    AdapterTargets,
    adapt,
    describe_adapters,
    load_merged,
    merge,
    merged_parameters,
)
from pcae_training.commands import Train
from pcae_training.finetune import Finetuning, finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.finetune_start import prepare
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.reduction import RULES
from pcae_training.trainer import Trainer, parameter_groups

TINY: dict[str, Any] = {"image_size": 8, "patch_size": 2, "width": 8, "heads": 2, "depth": 11}
RUN: dict[str, Any] = {
    "epochs": 2, "batch_size": 8, "holdout": 4, "budgets": (1.0, 0.6), "lr": 1e-2,
    "ramp_start": 0, "ramp_length": 0, "drop_path": 0.3, "log_every": 1,
}  # fmt: skip


@pytest.fixture
def tune(class_folders: Any, tmp_path: Path) -> Callable[..., FinetuneSettings]:
    data = str(class_folders(14))

    def make(out: str, **changes: Any) -> FinetuneSettings:
        sizes = {} if "init" in changes else TINY
        return FinetuneSettings(data=data, out=tmp_path / out, **sizes | RUN | changes)

    return make


@pytest.fixture
def first(tune: Any) -> Path:
    """A run to start from."""
    start = tune("first", epochs=1)
    finetune(start)
    return Path(start.folder)


def adapted(targets: AdapterTargets = "attention", **changes: Any) -> VisionTransformer:
    """A model with adapters that add something."""
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(**TINY | {"classes": 3} | changes))
    adapt(model, 2, 4, targets)
    for name, parameter in model.named_parameters():
        if name.endswith("adapter_b"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_merged_it_computes_the_same(rule: Any, targets: Any) -> None:
    model = adapted(targets, reduction=rule, qkv_bias=rule != "random")
    images, noise = torch.rand(4, 3, 8, 8), torch.rand(4, 16)
    counts = model.config.geometry.counts(0.6)
    plain = merge(model)
    assert list(plain.state_dict()) == list(VisionTransformer(model.config).state_dict())
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    with torch.no_grad():
        one, other = (each(images, counts, noise=noise) for each in (model, plain))
        torch.testing.assert_close(one, other)
        load_merged(model, plain)
        assert torch.equal(model(images, counts, noise=noise), other)
        for name, layer in model.named_parameters():
            if name.endswith("adapter_b"):
                layer.add_(1)
        assert not torch.allclose(model(images, counts, noise=noise), other)


def test_weights_that_are_saved_are_not_computed_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    used, original = set(), AdaptedLinear.merge

    def watched(self: AdaptedLinear) -> Tensor:
        used.add(torch.get_float32_matmul_precision())
        return original(self)

    monkeypatch.setattr(AdaptedLinear, "merge", watched)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as on a GPU
        merge(adapted())
        assert (used, torch.get_float32_matmul_precision()) == ({"highest"}, "high")
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_adapter_begins_at_nothing_and_is_scaled_by_alpha_over_the_rank() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(**TINY, classes=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapt(model, 2, 4)
    assert all(torch.equal(value, before[n]) for n, value in merged_parameters(model).items())
    layer: Any = model.blocks[0].attn.qkv  # type: ignore[union-attr]
    with torch.no_grad():
        layer.adapter_b.fill_(0.5)
        added = layer.merge() - before["blocks.0.attn.qkv.weight"]
        torch.testing.assert_close(added, 2 * layer.adapter_b @ layer.adapter_a)


def test_what_is_trained(tune: Any, first: Path) -> None:
    """Adapters, head and final norm, and what --init does not provide: here another norm."""
    settings = tune("run", init=str(first), lora=2, lora_targets="all", pooling="cls")
    start = prepare(settings)
    objective = Finetuning(start.checkpoint, settings, start.holdout, new=start.new)
    trained = {n for n, p in objective.model.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if "adapter" in name}
    assert len(adapters) == 11 * 4 * 2
    assert trained - adapters == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    groups = parameter_groups(objective, objective.model, 0.05, settings.decay_of_layers)
    assert {group["scale"] for group in groups} == {1.0}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert objective.macs(1.0) == pytest.approx(
        2
        / 3
        * Finetuning(start.checkpoint, tune("whole", init=str(first)), start.holdout).macs(1.0)
    )


def test_the_head_first_and_then_the_adapters(tune: Any, first: Path) -> None:
    settings = tune("run", init=str(first), lora=2, freeze_first=0.5)
    start = prepare(settings)
    objective = Finetuning(start.checkpoint, settings, start.holdout, new=start.new)

    def trained() -> set[str]:
        return {n for n, p in objective.model.named_parameters() if p.requires_grad}

    everything = trained()
    objective._set_frozen(0.4)
    assert trained() == {"head.weight", "head.bias"}
    objective._set_frozen(0.6)
    assert trained() == everything
    assert [objective.macs(at) for at in (0.4, 0.6)] == [
        1 / 2 * objective.macs(0.6),
        objective.macs(0.6),
    ]


def test_a_layer_that_is_new_is_trained_in_full() -> None:
    model = VisionTransformer(ViTConfig(**TINY, classes=3))
    adapt(model, 2, 2, new={"blocks.3.attn.qkv.weight", "pos_embed"})
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "adapter" not in n}
    assert {"blocks.3.attn.qkv.weight", "pos_embed"} < trained
    assert "21 of rank 2, factor 1, " in describe_adapters(model)


def weights(folder: Path) -> dict[str, Tensor]:
    state = checkpoints.load_state(folder)
    assert state is not None
    return checkpoints.load(folder).model.state_dict() | state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def changed(one: Path, other: Path) -> set[str]:
    before, after = (checkpoints.load(each).model.state_dict() for each in (one, other))
    assert list(before) == list(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_checkpoint_is_the_plain_merged_model(tune: Any, first: Path) -> None:
    made = tune("run", init=str(first), lora=2)
    accuracy = finetune(made)
    assert accuracy is not None
    names = changed(first, made.folder)
    wanted = {f"blocks.{i}.attn.{layer}.weight" for i in range(11) for layer in ("qkv", "proj")}
    assert names == wanted | {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    start = prepare(made)  # adapted again, and loaded from the state
    objective = Finetuning(start.checkpoint, made, start.holdout, new=start.new)
    state = {
        f"model.{name}": v for name, v in checkpoints.load(made.out).model.state_dict().items()
    }
    for name, value in weights(made.out).items():
        if name.startswith("objective/"):
            state[name.removeprefix("objective/")] = value
    objective.load_state_dict(state)
    base = checkpoints.load(first).model.state_dict()
    for name in wanted:  # the weights of --init, unchanged, below the adapters
        assert torch.equal(objective.model.state_dict()[name], base[name])
    assert not changed_state(objective.kept, checkpoints.load(made.out).model)
    again = tune("again", init=str(made.out), lora=2)  # and it is what a next run starts from
    assert finetune(again) is not None


def changed_state(one: nn.Module, other: nn.Module) -> list[str]:
    before, after = one.state_dict(), other.state_dict()
    return [name for name in before if not torch.equal(before[name], after[name])]


class Killed(BaseException):
    """As abrupt as a process that is gone: nothing gets to save."""


EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"lora_targets": "all", "weight_ema": 0.9, "select": "best"},
    {"freeze_first": 0.4, "select": "best", "checkpoint_gradients": True},
    {"weight_ema": 0.9, "distil_from": "average", "distil": 1.0},
)


@pytest.mark.parametrize(
    ("step", "extra"),
    [
        # each kind of state once: none in the first epoch, the others in the second
        pytest.param(step, extra, marks=[] if (step == 1) == (not extra) else pytest.mark.slow)
        for step in (1, 4)
        for extra in EXTRAS
    ],
)
def test_killed_anywhere_and_resumed_is_unbroken(
    step: int, extra: dict[str, Any], tune: Any, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"init": str(first), "lora": 2, **extra}
    whole, broken = tune("whole", **flags), tune("broken", **flags, save_every_s=1e-9)
    finetune(whole)
    original = Trainer._step

    def watched(self: Trainer, *arguments: Any) -> None:
        if self.step == step:
            raise Killed
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", watched)
        with pytest.raises(Killed):
            finetune(broken)
    accuracy = finetune(broken.model_copy(update={"resume": True}))
    assert accuracy is not None
    assert same(weights(whole.out), weights(broken.out))
    one, other = (checkpoints.load(each.out).training for each in (whole, broken))
    assert one["final"] == other["final"]
    if "select" in extra:
        best = checkpoints.load(whole.out / "best").model
        assert not changed_state(best, checkpoints.load(whole.out).model)


def test_the_average_is_that_of_the_merged_weights(tune: Any, first: Path) -> None:
    made = tune("run", init=str(first), lora=2, weight_ema=0.5)
    start = prepare(made)
    objective = Finetuning(start.checkpoint, made, start.holdout, new=start.new)
    expected = merged_parameters(objective.model)
    for step in range(3):
        with torch.no_grad():
            for name, parameter in objective.model.named_parameters():
                if parameter.requires_grad and "adapter" in name:
                    parameter.add_(0.1 * (step + 1))
        objective.after_step()
        decay = min(0.5, (2 + step) / (11 + step))
        new = merged_parameters(objective.model)
        expected = {name: decay * expected[name] + (1 - decay) * new[name] for name in new}
    for name, value in objective.kept.named_parameters():
        torch.testing.assert_close(value, expected[name])
    assert objective.kept is objective.average.module  # type: ignore[union-attr]


@pytest.mark.slow  # test_checkpoint_gradients has a fast one, without adapters
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it, and hides this
def test_compiled_with_gradients_recomputed(tune: Any, first: Path, monkeypatch: Any) -> None:
    compile_block = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_block(self, backend="eager"))
    torch._dynamo.reset()
    flags = {"init": str(first), "lora": 2, "lora_targets": "all", "drop_path": 0.0}
    plain, fast = (
        tune(name, **flags, **more)
        for name, more in (("plain", {}), ("fast", {"compile": True, "checkpoint_gradients": True}))
    )
    finetune(plain)
    finetune(fast)
    torch._dynamo.reset()
    one, other = weights(plain.out), weights(fast.out)
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow  # test_trainer has a fast one
def test_two_processes_train_as_one(tune: Any, first: Path, tmp_path: Path) -> None:
    flags = {"init": str(first), "lora": 2, "weight_ema": 0.9, "freeze_first": 0.4}
    alone, shared = tune("alone", **flags), tune("shared", **flags)
    finetune(alone)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = [f"--data={shared.data}", f"--out={shared.out}", f"--init={first}", "--lora=2"]
    given += ["--weight-ema=0.9", "--freeze-first=0.4", "--budgets=1.0,0.6", "--lr=0.01"]
    given += ["--epochs=2", "--batch-size=8", "--holdout=4", "--drop-path=0.3", "--log-every=1"]
    command = [*launch, "-m", "pcae_training.cli", "finetune", *given]
    command += ["--ramp-start=0", "--ramp-length=0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = weights(alone.out), weights(shared.out)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        if name.startswith("objective/model.") or not name.startswith(("objective/", "optimizer/")):
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)


def test_the_command(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, made = str(tmp_path / "images"), tmp_path / "made"
    flags = ["--data", images, "--init", str(first), "--holdout", "4", "--epochs", "1"]
    flags += ["--lora", "2", "--lora-targets", "all", "--lora-alpha", "8", "--keep", "0.6"]
    assert run(Train, ["finetune", *flags, "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    model = checkpoints.load(first).model
    own = sum(p.numel() for p in model.parameters())
    adapters = 11 * 2 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8))
    trained = adapters + 2 * 8 + 2 * 8 + 2
    assert f"parameters {own:,} in the model, {trained:,} trained in this run" in printed
    assert f"adapters   44 of rank 2, factor 4, {adapters:,} parameters" in printed
    assert run(Train, ["finetune", *flags, "--out", str(made)]) == 0
    assert run(Train, ["evaluate", str(made), "--data", images, "--split", "train"]) == 0
    config = json.loads((made / "checkpoint" / "config.json").read_text())
    assert config["num_hidden_layers"] == 11
    assert checkpoints.load(made).training["settings"]["lora_alpha"] == 8


def test_the_presets_rate_by_layer_is_left_out(tmp_path: Path) -> None:
    fixed: dict[str, Any] = {"data": "x", "out": tmp_path, "init": "vit"}
    assert FinetuneSettings(**fixed).decay_of_layers == 0.65
    assert FinetuneSettings(**fixed, lora=4).decay_of_layers == 1.0
    assert FinetuneSettings(**fixed, lora=4, layer_decay=0.9).decay_of_layers == 0.9
    preset = FinetuneSettings(**fixed, lora=4, preset="small-data")
    assert (preset.decay_of_layers, preset.freeze_first) == (1.0, 0.2)
    assert FinetuneSettings(**fixed, preset="small-data").decay_of_layers == 0.75


@pytest.mark.parametrize("changes", [{}, {"init": "vit", "lora": 4, "lora_alpha": 8.0}])
def test_settings_are_made_from_their_dump(changes: dict[str, Any], tmp_path: Path) -> None:
    fixed: dict[str, Any] = {"data": "x", "out": tmp_path}
    settings = FinetuneSettings(**fixed, **changes)
    sizes = {"width", "depth"} if changes else set()
    assert FinetuneSettings(**settings.model_dump(exclude=sizes | {"budgets"})) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": 2}, "--lora adapts the weights of --init, which is missing"),
        ({"init": "x", "lora": 0}, "greater than or equal to 1"),
        (
            {"init": "x", "lora": 2, "freeze": True},
            "--freeze trains no adapters; omit it or --lora",
        ),
        (
            {"init": "x", "lora_alpha": 2},
            "--lora-alpha is for adapters; give their rank with --lora",
        ),
        ({"init": "x", "lora_targets": "all"}, "--lora-targets is for adapters; give their rank"),
    ],
)
def test_flags_that_cannot_be(changes: dict[str, Any], message: str, tune: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        tune("run", **changes)
    assert message in str(caught.value)


def test_a_rank_that_saves_nothing(tune: Any, first: Path) -> None:
    with pytest.raises(PcaeError, match="--lora 8 is too large for width 8; at most 7"):
        finetune(tune("run", init=str(first), lora=8))
