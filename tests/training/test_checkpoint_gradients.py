"""Less memory: blocks are computed again in the backward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcae_serve.command import run
from pcae_training import checkpoint as checkpoints
from pcae_training.block import Block
from pcae_training.commands import Train
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.reduction import RULES

CONFIG: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "width": 8, "depth": 11, "heads": 2, "classes": 3,
}  # fmt: skip
RUN = [
    *("--image-size", "8", "--patch-size", "2", "--width", "8", "--heads", "2", "--depth", "11"),
    *("--epochs", "1", "--batch-size", "8", "--precision", "fp32"),
]


def gradients(model: VisionTransformer, recompute: bool) -> tuple[list[Tensor], int]:
    """Return the gradients of one step, and how often a block ran."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    factors = torch.ones(11, 2, 4)
    factors[3, 0, 1], factors[5] = 0, 2
    hooks = []
    for block in (m for m in model.modules() if isinstance(m, Block)):
        block.recompute = recompute
        hooks.append(block.mlp.register_forward_hook(count))
    model.zero_grad()
    counts = model.config.geometry.counts(0.6)
    model(images, counts, drop_path=factors, noise=noise).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return [p.grad for p in model.parameters() if p.grad is not None], calls


@pytest.mark.parametrize(
    ("rule", "parts"),
    [*((rule, {}) for rule in RULES), ("weighted", {"rope_theta": 100.0, "gated_mlp": True})],
)
def test_the_gradients_are_the_same_and_blocks_run_twice(rule: Any, parts: Any) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(**CONFIG, **parts, reduction=rule))
    kept, once = gradients(model, recompute=False)
    again, twice = gradients(model, recompute=True)
    assert (once, twice) == (11, 22)
    assert len(kept) == len(again)
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_computed_again_without_gradients() -> None:
    model = VisionTransformer(ViTConfig(**CONFIG))
    for block in model.blocks:
        block.recompute = True  # type: ignore[assignment]
    with torch.no_grad():
        assert not model(torch.rand(1, 3, 8, 8)).requires_grad


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_the_flag_changes_no_weight(command: str, class_folders: Any, tmp_path: Path) -> None:
    data = str(class_folders(10))
    own = ["--keep", "1.0", "--holdout", "4"] if command == "finetune" else []
    states = []
    for name, extra in (("a", []), ("b", ["--checkpoint-gradients"])):
        out = tmp_path / name
        flags = ["--data", data, "--out", str(out), *RUN, *own, *extra]
        assert run(Train, [command, *flags]) == 0
        states.append(checkpoints.load(out).model.state_dict())
    for one, other in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it, and hides this
@pytest.mark.parametrize("flag", ["--precision=bf16", "--compile", "--freeze-first=0.5"])
def test_it_changes_no_weight_with_other_flags(
    flag: str, class_folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elastic budgets and drop path are on by default."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_block(self, backend="eager")
    )
    data, first = ["--data", str(class_folders(10)), "--holdout", "4"], str(tmp_path / "first")
    assert run(Train, ["finetune", *data, "--out", first, *RUN, "--keep", "1.0"]) == 0
    states = []
    for name, extra in (("a", []), ("b", ["--checkpoint-gradients"])):
        torch._dynamo.reset()
        flags = ["--init", first, "--out", str(tmp_path / name), "--budgets", "1.0,0.6"]
        flags += ["--epochs", "2", "--batch-size", "8", "--ramp-start", "0", flag, *extra]
        assert run(Train, ["finetune", *data, *flags]) == 0
        states.append(checkpoints.load(tmp_path / name).model.state_dict())
    torch._dynamo.reset()
    for one, other in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_of_a_dry_run_computes_again_too(
    recompute: bool, class_folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bool] = set()

    def watch(objective: nn.Module, *_: object) -> float:
        seen.update(m.recompute for m in objective.modules() if isinstance(m, Block))
        return 1.0

    monkeypatch.setattr("pcae_training.trainer.measure_step", watch)
    flags = ["--checkpoint-gradients"] * recompute
    data = ["--data", str(class_folders(10)), "--holdout", "4"]
    assert run(Train, ["finetune", *data, *RUN, "--keep", "1.0", "--dry-run", *flags]) == 0
    assert seen == {recompute}
