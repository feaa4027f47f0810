"""The loop: resumed anywhere, shared by processes, stopped by signals, it computes the same."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.command import run
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.commands import Train
from pcae_training.finetune import Finetuning, finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.pretrain import build, pretrain
from pcae_training.pretrain_settings import PretrainSettings
from pcae_training.pretrain_start import new_encoder
from pcae_training.sample_rng import SampleRng
from pcae_training.trainer import Trainer, parameter_groups

MODEL = {"image_size": 8, "patch_size": 2, "width": 8, "depth": 11, "heads": 2}
TRAIN = [sys.executable, "-m", "pcae_training.cli"]


@pytest.fixture
def tune(class_folders: Any, tmp_path: Path) -> Callable[..., FinetuneSettings]:
    """Settings of a fine-tuning of six steps with everything random switched on."""
    data = str(class_folders(20))

    def make(out: str, **changes: Any) -> FinetuneSettings:
        fixed: dict[str, Any] = {
            "budgets": (1.0, 0.8, 0.6), "ramp_start": 0, "ramp_length": 0, "epochs": 2,
            "batch_size": 10, "lr": 3e-3, "holdout": 10, "drop_path": 0.3, "log_every": 1,
        }  # fmt: skip
        return FinetuneSettings(data=data, out=tmp_path / out, **MODEL | fixed | changes)

    return make


@pytest.fixture
def learn(class_folders: Any, tmp_path: Path) -> Callable[..., PretrainSettings]:
    """Settings of a pretraining of eight steps."""
    data = str(class_folders(20))

    def make(out: str, **changes: Any) -> PretrainSettings:
        fixed: dict[str, Any] = {
            "epochs": 2, "batch_size": 10, "lr": 3e-3, "log_every": 1, "drop_path": 0.3,
        }  # fmt: skip
        return PretrainSettings(data=data, out=tmp_path / out, **MODEL | fixed | changes)

    return make


def weights(folder: Path) -> dict[str, Tensor]:
    state = checkpoints.load_state(folder)
    assert state is not None
    return checkpoints.load(folder).model.state_dict() | state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """As abrupt as a process that is gone: nothing gets to save."""


def kill_at(step: int, patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have `act` happen before the optimiser step of that number, counted from 0."""
    original = Trainer._step

    def watched(self: Trainer, *arguments: Any) -> None:
        if self.step == step:
            act()
        original(self, *arguments)

    patch.setattr(Trainer, "_step", watched)


def killed() -> None:
    raise Killed


EVERY_STEP, EVERY_EPOCH = 1e-9, 1e9


@pytest.mark.parametrize(
    ("step", "save_every_s"),
    [
        (3, EVERY_EPOCH),  # at the end of the first epoch
        (5, EVERY_STEP),  # in the second epoch
        pytest.param(1, EVERY_STEP, marks=pytest.mark.slow),  # fast in test_adapters
        pytest.param(3, EVERY_STEP, marks=pytest.mark.slow),
        pytest.param(4, EVERY_STEP, marks=pytest.mark.slow),
        pytest.param(4, EVERY_EPOCH, marks=pytest.mark.slow),
        pytest.param(5, EVERY_EPOCH, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_and_resumed_is_unbroken(
    step: int, save_every_s: float, tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune("whole")
    finetune(whole)
    with monkeypatch.context() as patch:
        kill_at(step, patch, killed)
        with pytest.raises(Killed):
            finetune(tune("broken", save_every_s=save_every_s))
    accuracy = finetune(tune("broken", save_every_s=save_every_s, resume=True))
    broken = tune("broken")
    assert same(weights(whole.out), weights(broken.out))
    one, other = (checkpoints.load(run.out).training for run in (whole, broken))
    assert one["final"] == other["final"]
    assert [e["train_loss"] for e in one["history"]] == [e["train_loss"] for e in other["history"]]
    assert accuracy is not None
    trails = [
        [(line["step"], line["loss"]) for line in metrics(run.out) if "loss" in line]
        for run in (whole, broken)
    ]
    assert trails[0] == trails[1]  # lines of steps that were done again are not there twice


def test_killed_before_an_epoch_is_closed(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tune("whole")
    finetune(whole)
    close = Trainer._close_epoch

    def second(self: Trainer, log: Any) -> None:
        close(self, log) if self.step == 3 else killed()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_close_epoch", second)
        with pytest.raises(Killed):
            finetune(tune("broken", save_every_s=EVERY_STEP))
    finetune(tune("broken", resume=True))
    one, other = (checkpoints.load(tune(out).out).training for out in ("whole", "broken"))
    for epochs in (one["history"], other["history"]):
        for epoch in epochs:
            del epoch["train_s"]
    assert one["history"] == other["history"]
    assert len(one["history"]) == 2


def test_a_pretraining_is_resumed_with_its_teacher(
    learn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn("whole", ema=0.9)
    pretrain(whole)
    with monkeypatch.context() as patch:
        kill_at(6, patch, killed)
        with pytest.raises(Killed):
            pretrain(learn("broken", ema=0.9, save_every_s=EVERY_STEP))
    assert pretrain(learn("broken", ema=0.9, resume=True))
    one, other = weights(whole.out), weights(learn("broken").out)
    assert same(one, other)
    assert any(name.startswith("objective/teacher.") for name in one)
    assert any(name.startswith("optimizer/decoder.") for name in one)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_and_saves_the_run(
    number: signal.Signals, tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tune("whole"), tune("stopped", log_every=100)
    finetune(whole)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        kill_at(1, patch, lambda: os.kill(os.getpid(), number))
        assert finetune(stopped) is None
    assert signal.getsignal(number) is before
    assert checkpoints.load(stopped.out).training["step"] == 2  # the step at hand is finished
    assert finetune(stopped.model_copy(update={"resume": True})) is not None
    assert same(weights(whole.out), weights(stopped.out))


def test_a_stopped_command_returns_143(
    learn: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = learn("stopped")
    kill_at(1, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(Train, ["pretrain", *flags(stopped)]) == 143
    lines = capsys.readouterr().err.splitlines()
    assert "training: 0 of 80 images" in lines  # a log, not a terminal
    again = f"continue with the same command and --resume (--out {stopped.out})"
    assert lines[-1] == f"pcae-train: stopped and saved; {again}"
    assert checkpoints.load(stopped.out).training["step"] == 2


@pytest.mark.slow
def test_a_stopped_command_exits_with_143(learn: Any) -> None:
    made = learn("run")
    flags = [f"--data={made.data}", f"--out={made.out}", "--image-size=8", "--patch-size=2"]
    flags += ["--width=8", "--heads=2", "--batch-size=10", "--epochs=120000", "--log-every=1"]
    with subprocess.Popen([*TRAIN, "pretrain", *flags], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not (made.out / "metrics.jsonl").exists() or not metrics(made.out):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        printed = process.stderr.read().decode()
        assert process.wait(300) == 143
    lines = printed.splitlines()
    assert "training: 0 of 4,800,000 images" in lines  # a log, not a terminal
    again = f"continue with the same command and --resume (--out {made.out})"
    assert lines[-1] == f"pcae-train: stopped and saved; {again}"
    assert checkpoints.load(made.out).training["step"] >= 1


def flags(settings: FinetuneSettings | PretrainSettings) -> list[str]:
    """The command line that gives these settings."""
    given = []
    for name, value in settings.model_dump(exclude_defaults=True).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            given.append(f"--{flag}={text}")
    return given


def two_processes(command: str, run: FinetuneSettings | PretrainSettings) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launch, "-m", "pcae_training.cli", command, *flags(run)]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def in_two_processes(settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tune with this process as the first of two, which saves starting torchrun and it."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as reserved:
        port = reserved.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [*TRAIN, "finetune", *flags(settings)]
    second = subprocess.Popen(
        command,
        env=ONE_THREAD | world | {"RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with monkeypatch.context() as patch:
            for name, value in world.items() | {("RANK", "0")}:
                patch.setenv(name, value)
            assert finetune(settings) is not None
        printed, _ = second.communicate(timeout=600)
    finally:
        second.kill()
        second.wait()
    assert second.returncode == 0, printed[-3000:]
    assert "wrote" not in printed  # only the first process writes


def with_torchrun(settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    command = two_processes("finetune", settings)
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote") == 1


@pytest.mark.parametrize(
    "launch", [in_two_processes, pytest.param(with_torchrun, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "classes",
    [
        {},
        pytest.param({"balance": True}, marks=pytest.mark.slow),
        pytest.param({"class_weights": "auto"}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(
    classes: dict[str, Any],
    launch: Callable[[FinetuneSettings, pytest.MonkeyPatch], None],
    tune: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second epoch, going on from what one process made of the first."""
    more = {"seed": 3, "batch_size": 8, "accumulate": 2, "randaugment": 9, "erase": 0.5, **classes}
    alone, shared = tune("alone", **more), tune("shared", **more)
    finetune(alone)
    finetune(shared.model_copy(update={"stop_after": 1}))
    launch(shared.model_copy(update={"resume": True}), monkeypatch)
    one, two = metrics(alone.out), metrics(shared.out)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (one, two)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    accuracy = [[line for line in lines if "holdout_top1/1.0" in line] for lines in (one, two)]
    assert accuracy[0] == accuracy[1]
    ours, theirs = weights(alone.out), weights(shared.out)
    for name, tensor in ours.items():
        if not name.endswith("qkv.bias"):  # softmax ignores the keys': Adam scales up rounding
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_share_masks_and_stop_together(learn: Any) -> None:
    more = {"epochs": 100_000, "reduction": "random", "log_every": 1}
    shared, alone = learn("shared", **more), learn("alone", **more)
    command = two_processes("pretrain", shared)

    def losses(run: PretrainSettings) -> list[float]:
        return [line["loss"] for line in metrics(run.folder) if "loss" in line]

    with subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not (shared.out / "metrics.jsonl").exists() or len(losses(shared)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        printed = process.stderr.read().decode()
        process.wait(300)
    step = checkpoints.load(shared.out).training["step"]
    assert step >= 3, printed[-2000:]
    assert printed.count("pcae-train: stopped and saved; continue with") == 1
    pretrain(alone.model_copy(update={"stop_after": 1}))
    assert losses(shared)[:3] == pytest.approx(losses(alone)[:3], rel=1e-5)


def test_accumulation_changes_nothing_but_rounding(tune: Any) -> None:
    whole, parts = tune("whole", mixup=0, cutmix=0), tune("parts", mixup=0, cutmix=0, accumulate=5)
    finetune(whole)
    finetune(parts)
    losses = [
        [line["loss"] for line in metrics(run.out) if "loss" in line] for run in (whole, parts)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it, and hides this
def test_budgets_cost_few_graphs(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_block(self, backend=counter)
    )
    torch._dynamo.reset()
    graphs = []
    ended = Finetuning.after_epoch

    def counted(self: Finetuning, world: Any) -> Any:
        graphs.append(counter.frame_count)  # before evaluation's own
        return ended(self, world)

    monkeypatch.setattr(Finetuning, "after_epoch", counted)
    budgets = (1.0, 0.9, 0.8, 0.7, 0.6)
    finetune(tune("run", compile=True, budgets=budgets, epochs=6, batch_size=5, drop_path=0))
    torch._dynamo.reset()
    assert counter.frame_count > 0
    # a number of tokens is met as a fixed one first, then any number with the same graph
    assert graphs[0] <= 4
    assert graphs[-1] == graphs[1]


@pytest.mark.parametrize(
    "flags",
    [{"reduction": rule} for rule in ("ptr", "random", "attention")]
    + [{"method": method} for method in ("pcae", "mae", "simmim", "pcae-simmim")],
)
def test_a_step_asks_the_device_for_nothing(
    flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on `meta` have no values: whatever would wait for a GPU's, raises there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta
    fixed = {"data": "x", "out": Path("y"), "image_size": 24, "patch_size": 4, "shift": 1}
    preprocess = Preprocess(24, 24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    learner: Any
    if "method" in flags:
        pre = PretrainSettings(**fixed | flags, width=16, heads=2, drop_path=0.1)
        learner = build(pre, new_encoder(pre, preprocess), steps=1000)
    else:
        tuning = FinetuneSettings(**fixed | flags, width=8, heads=2, budgets=(1.0, 0.6))
        model = VisionTransformer(tuning.config(3, reduction=tuning.reduction))
        learner = Finetuning(Checkpoint(model, preprocess, list("abc")), tuning, None)  # type: ignore[arg-type]
    learner.to("meta")
    batch = 64  # so that every RandAugment operation is drawn
    pixels = torch.zeros(batch, 3, 28, 28, dtype=torch.uint8, device="meta")
    labels = torch.zeros(batch, dtype=torch.int64, device="meta")
    learner(pixels, labels, SampleRng(0, 0, batch), 1.0).backward()
    learner.after_step()


def test_a_loss_that_is_no_number(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tune("run", log_every=1)
    forward = Finetuning.forward

    def poisoned(self: Finetuning, pixels: Tensor, labels: Tensor, rng: Any, at: float) -> Tensor:
        loss = forward(self, pixels, labels, rng, at)
        return loss / 0 if rng.step == 4 else loss

    monkeypatch.setattr(Finetuning, "forward", poisoned)
    with pytest.raises(PcaeError, match=r"not finite in step 5 \(epoch 2\); try a smaller --lr"):
        finetune(run)
    saved = checkpoints.load(run.out)
    assert saved.training["step"] == 3
    assert all(tensor.isfinite().all() for tensor in saved.model.state_dict().values())


def test_weights_that_are_no_numbers_are_not_saved(
    tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is finite, what the optimiser makes of it is not."""
    run = tune("run", log_every=100)
    stepped = Finetuning.after_step

    def spoilt(self: Finetuning) -> None:
        stepped(self)
        if spoil.pop(0):
            with torch.no_grad():
                self.model.get_parameter("head.bias")[0] = float("nan")

    spoil = [False, False, False, False, False, True]
    monkeypatch.setattr(Finetuning, "after_step", spoilt)
    with pytest.raises(PcaeError, match=r"head\.bias is not finite after step 6"):
        finetune(run)
    assert checkpoints.load(run.out).training["step"] == 3


def test_one_run_at_a_time_writes_to_a_folder(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, refused = tune("run"), []

    def second() -> None:
        with pytest.raises(PcaeError, match="another run is writing to") as error:
            finetune(run)
        refused.append(str(error.value))

    kill_at(1, monkeypatch, second)
    finetune(run)
    assert len(refused) == 1


def test_resume_refuses_another_run(tune: Any) -> None:
    with pytest.raises(PcaeError, match=r"checkpoint not found: .*config\.json"):
        finetune(tune("run", resume=True))
    finetune(tune("run", epochs=1))
    with pytest.raises(PcaeError, match=r"started with other values of --epochs, --lr$"):
        finetune(tune("run", resume=True, epochs=3, lr=1e-4))
    (Path(tune("run").data) / "train" / "dark" / "000.png").unlink()
    with pytest.raises(PcaeError, match="was trained on 30 images, and there are 29 now"):
        finetune(tune("run", resume=True, epochs=1))
    (tune("run").out / "checkpoint" / "training_state.safetensors").unlink()
    with pytest.raises(PcaeError, match="its checkpoint has no optimiser state"):
        finetune(tune("run", resume=True, epochs=1))


def test_a_new_run_does_not_replace_an_old_one_unasked(tune: Any) -> None:
    finetune(tune("run", epochs=1))
    with pytest.raises(PcaeError, match="already contains a run; continue it with --resume"):
        finetune(tune("run", epochs=1, seed=5))


def test_groups() -> None:
    model = VisionTransformer(ViTConfig(8, 2, width=8, heads=2, depth=11, classes=2))
    plain = parameter_groups(model, model, 0.05)
    assert sorted(group["weight_decay"] for group in plain) == [0.0, 0.05]
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in plain:
        for parameter in group["params"]:
            undecayed = (
                names[parameter].endswith(("bias", "token", "embed"))
                or "norm" in (names[parameter])
            )
            assert (group["weight_decay"] == 0) == undecayed

    scales = {
        names[parameter]: group["scale"]
        for group in parameter_groups(model, model, 0.05, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert len(scales) == len(names)
    assert scales["head.weight"] == scales["fc_norm.bias"] == 1
    assert scales["blocks.10.mlp.fc2.weight"] == 0.5
    assert scales["blocks.0.norm1.bias"] == 0.5**11
    assert scales["cls_token"] == scales["patch_embed.proj.weight"] == 0.5**12


def test_a_launcher_that_knows_no_state_begins_and_then_goes_on(tune: Any) -> None:
    run = tune("again", stop_after=1)
    again = {"resume_or_begin": True}
    finetune(FinetuneSettings(**run.model_dump() | again))
    assert checkpoints.load(run.out).training["step"] == 3
    finetune(FinetuneSettings(**run.model_dump() | again | {"stop_after": None}))
    assert checkpoints.load(run.out).training["step"] == 6


@pytest.mark.slow
def test_the_slurm_script_goes_on_after_a_process_is_killed(learn: Any, tmp_path: Path) -> None:
    """Slurm's own programs are stand-ins; torchrun and its processes are real."""
    programs = tmp_path / "programs"
    programs.mkdir()
    torchrun = f'exec {sys.executable} -m torch.distributed.run "$@"'
    for name, body in (
        ("srun", 'exec "$@"'), ("scontrol", "echo localhost"), ("torchrun", torchrun),
    ):  # fmt: skip
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    path = f"{programs}:{os.environ['PATH']}"
    run = learn("slurm", epochs=30, save_every_s=0.5)
    script = Path(__file__).parents[2] / "training" / "recipes" / "slurm.sh"
    command = [str(script), "pretrain", *flags(run)]
    environment = ONE_THREAD | slurm | {"SLURM_JOB_ID": str(os.getpid()), "PATH": path}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not (run.out / checkpoints.RUN_CHECKPOINT / "config.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.stderr is not None
        printed = process.stderr.read().decode()
        assert process.wait(300) == 0, printed[-3000:]
    _, _, again = printed.partition("(exitcode: -9)")
    begun = re.search(r"training: ([\d,]+) of", again)
    assert begun is not None, printed[-3000:]
    assert begun[1] != "0"  # resumed, not started again
    assert checkpoints.load(run.out).training["step"] == 30 * 4
