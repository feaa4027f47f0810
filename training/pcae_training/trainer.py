"""The loop that all training shares: batches, optimiser, processes, checkpoints, stop and resume.

    RUN/                       what --out names; beside it what `journal` writes
      checkpoint/              the last good one (see `checkpoint`)

It knows nothing of what is learnt: an `Objective` gives the loss of a micro-batch. A step depends
on the weights, the seed and its own number alone, so a run that was stopped anywhere goes on from
its last checkpoint as if it had never stopped.
"""

import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, Protocol, Unpack

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError, one_line
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.columns import ColumnChoice
from pcae_training.data import LabelledImages, TrainingData, load
from pcae_training.journal import Journal
from pcae_training.model import Block, VisionTransformer
from pcae_training.plan import Plan
from pcae_training.sample_rng import SampleRng
from pcae_training.schedule import cosine
from pcae_training.settings import PLACE, RunSettings
from pcae_training.stream import ImageStream, load_stream
from pcae_training.world import World

LOCK = "lock"
STOPPED = 128 + signal.SIGTERM  # exit code of a run that was told to stop and has saved itself
MODEL = "model."  # what an objective calls the weights that its checkpoint holds


class Objective(Protocol):
    """What a run minimises. A module, so that processes can share its gradients."""

    @property
    def model(self) -> VisionTransformer: ...

    def __call__(self, pixels: Tensor, labels: Tensor, rng: SampleRng, progress: float) -> Tensor:
        """Mean loss of a micro-batch: pixels uint8 [b, 3, S, S], labels int64 [b]."""
        ...

    def stepped(self) -> None:
        """The optimiser has made a step."""
        ...

    def checkpoint(self) -> Checkpoint:
        """What is worth keeping, as of now."""
        ...

    def epoch_ended(self, world: World) -> Mapping[str, Mapping[str, float]]:
        """Figures by name and case, as held-out top-1 by keep ratio; every process calls it."""
        ...


class Trainer:
    """One start of a run: from step `resume` found, to the last or until told to stop."""

    def __init__(
        self,
        settings: RunSettings,
        objective: Any,  # an Objective that is an nn.Module: Python has no such type
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        data: TrainingData,
        world: World,
    ) -> None:
        """groups: parameter groups, each with a "scale" on the learning rate."""
        self.settings, self.objective, self.data, self.world = settings, objective, data, world
        self.plan = Plan(settings, world, len(data))
        self.optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=betas, fused=True)
        self.step = 0
        self.history: list[dict[str, Any]] = []  # by epoch
        self._epoch_loss, self._epoch_steps, self._epoch_s = 0.0, 0, 0.0  # of the epoch at hand
        # since the last report: sum of losses, first step whose loss is no number, micro-batches
        self._loss = torch.zeros(3, dtype=torch.float64, device=world.device)
        self._clock = 0.0  # when the last report ended
        self._stop: signal.Signals | None = None

    def run(self) -> bool:
        """Train to the end of this start; False where a signal stopped it before."""
        settings, plan = self.settings, self.plan
        if settings.compile:
            for block in (m for m in self.objective.modules() if isinstance(m, Block)):
                block.compile()
        learner = self.objective
        if self.world.size > 1:
            learner = DistributedDataParallel(self.objective, find_unused_parameters=False)
        with self._lock(), self._signals(), self._compiling():
            if settings.resume:
                self._resume()
            seen = self.step * settings.batch_size
            total = plan.last_step * settings.batch_size
            journal: Any = nullcontext(None)
            if self.world.main:
                journal = Journal(
                    settings.out,
                    settings.model_dump(mode="json"),
                    step=self.step,
                    images=seen,
                    total=total,
                )
            with journal as log:
                while self.step < plan.last_step and not self._stopped():
                    self._epoch(learner, log)
        return self._stop is None

    def _epoch(self, learner: nn.Module, log: Journal | None) -> None:
        """What is left of the epoch that the next step is in."""
        settings, plan = self.settings, self.plan
        epoch, at = divmod(self.step, plan.steps_per_epoch)
        batches = self.data.epoch(
            settings.seed, epoch, plan.slices(at), self.world.device, settings.workers
        )
        self._loss.zero_()
        self._clock = saved = time.monotonic()
        for _ in range(at, plan.steps_per_epoch):
            self._step(learner, batches)
            if log:
                log.advance(settings.batch_size, f"epoch {epoch + 1}/{settings.epochs}")
            if self.step % plan.steps_per_epoch == 0:
                break  # to be saved once it is closed, not before
            if self.step % settings.log_every == 0:
                self._report(log)
                if self.world.any(self._clock - saved > settings.save_every_s):
                    self.save()
                    self._clock = saved = time.monotonic()
            if self._stopped():
                break
        if self._loss[2] > 0:  # steps that no report has told of
            self._report(log)
        if self.step % plan.steps_per_epoch == 0:
            self._close_epoch(log)
        self.save()

    def _close_epoch(self, log: Journal | None) -> None:
        """Measure, and write down what the epoch came to."""
        epoch = self.step // self.plan.steps_per_epoch
        figures = self.objective.epoch_ended(self.world)
        self.history.append(
            {
                "epoch": epoch,
                "train_loss": round(self._epoch_loss / self._epoch_steps, 4),
                "train_s": round(self._epoch_s, 1),
                **figures,
            }
        )
        self._epoch_loss, self._epoch_steps, self._epoch_s = 0.0, 0, 0.0
        if log and figures:
            flat = {
                f"{name}/{case}": value
                for name, cases in figures.items()
                for case, value in cases.items()
            }
            log.report(self.step, {"epoch": epoch, **flat})
            log.tell(f"epoch {epoch}  " + "  ".join(f"{n} {v:.4f}" for n, v in flat.items()))

    def _step(self, learner: Any, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimiser step over the global batch."""
        settings, plan = self.settings, self.plan
        progress = (self.step + 0.5) / plan.steps  # its middle, where the rate is never 0
        final = settings.min_lr / settings.peak_lr
        rate = settings.peak_lr * cosine(progress, settings.warmup, final)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad()
        parts = plan.micro_batches
        for part in parts:
            pixels, labels = next(batches)
            rng = SampleRng(settings.seed, self.step, settings.batch_size, part.start, part.stop)
            last = part is parts[-1]
            alone = self.world.size > 1 and not last  # gradients are shared once, with the last
            with learner.no_sync() if alone else nullcontext():
                with torch.autocast(
                    self.world.device.type, settings.dtype, enabled=settings.precision != "fp32"
                ):
                    loss = learner(pixels, labels, rng, progress)
                (loss / len(parts)).backward()
            self._note(loss.detach())
        if settings.clip:
            nn.utils.clip_grad_norm_(self.objective.parameters(), settings.clip)
        self.optimizer.step()
        self.objective.stepped()
        self.step += 1

    def _note(self, loss: Tensor) -> None:
        """Add to the reported loss, and remember the first step whose loss was no number.

        On the device: nothing waits for it.
        """
        bad = ~loss.isfinite() & (self._loss[1] == 0)
        self._loss[0] += loss
        self._loss[1] += bad * (self.step + 1)
        self._loss[2] += 1

    def _report(self, log: Journal | None) -> None:
        """Read the loss of the steps since the last time; PcaeError where it was not finite."""
        epoch = (self.step - 1) // self.plan.steps_per_epoch + 1
        readings = self.world.gather([*self._loss.tolist(), self.data.unreadable])
        now = time.monotonic()  # the device has been waited for
        seconds, self._clock = now - self._clock, now
        self._loss.zero_()
        if bad := [int(step) for _, step, _, _ in readings if step]:
            raise PcaeError(
                f"the loss is not finite in step {min(bad)} (epoch {epoch}): try a smaller --lr;"
                f" {self.settings.out} keeps the last good checkpoint, if there was one"
            )
        steps = round(readings[0][2]) // self.settings.accumulate
        total = sum(loss for loss, *_ in readings) / len(readings) / self.settings.accumulate
        self._epoch_loss += total
        self._epoch_steps += steps
        self._epoch_s += seconds
        if log:
            log.report(
                self.step,
                {
                    "epoch": epoch,
                    "loss": total / steps,
                    "lr": max(float(g["lr"]) for g in self.optimizer.param_groups),
                    "img_per_s": steps * self.settings.batch_size / max(seconds, 1e-9),
                    "unreadable": max(unreadable for *_, unreadable in readings),
                },
            )

    def save(self) -> None:
        """Write the checkpoint with all that is needed to go on from it.

        Raises PcaeError, and leaves the last one, where a weight is no finite number.
        """
        if bad := [n for n, p in self.objective.named_parameters() if not p.isfinite().all()]:
            raise PcaeError(
                f"{bad[0]} is not finite after step {self.step}: try a smaller --lr;"
                f" {self.settings.out} keeps the last good checkpoint, if there was one"
            )
        if not self.world.main:
            return
        checkpoint = self.objective.checkpoint()
        checkpoint.training = checkpoint.training | {
            "settings": self.settings.model_dump(mode="json", exclude={"resume"}),
            "step": self.step,
            "images": self.plan.images,
            "epochs_done": self.step // self.plan.steps_per_epoch,
            "history": self.history,
            "epoch_at_hand": [self._epoch_loss, self._epoch_steps, self._epoch_s],
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        state = {
            f"objective/{name}": value
            for name, value in self.objective.state_dict().items()
            if not name.startswith(MODEL)  # the checkpoint's own weights
        }
        for name, parameter in self.objective.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer/{name}/{key}"] = value
        checkpoints.save(checkpoint, self.settings.out / checkpoints.RUN_CHECKPOINT, state)

    def _resume(self) -> None:
        """Take weights, optimiser and step from the checkpoint in --out."""
        out = self.settings.out
        saved, state = checkpoints.load(out), checkpoints.load_state(out)
        training = saved.training
        if state is None:
            raise PcaeError(f"cannot resume {out}: it was saved without its optimiser's state")
        before, now = training.get("settings", {}), self.settings.model_dump(mode="json")
        if changed := [name for name in now if name not in PLACE and before.get(name) != now[name]]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise PcaeError(f"cannot resume {out}: it was written with another {flags}")
        if training["images"] != self.plan.images:
            raise PcaeError(
                f"cannot resume {out}: it was trained on {training['images']} images, and there are"
                f" {self.plan.images} now"
            )
        try:
            weights = {f"{MODEL}{name}": value for name, value in saved.model.state_dict().items()}
            for name, value in state.items():
                if name.startswith("objective/"):
                    weights[name.removeprefix("objective/")] = value
            self.objective.load_state_dict(weights)
            for name, parameter in self.objective.named_parameters():
                if f"optimizer/{name}/step" in state:
                    self.optimizer.state[parameter] = {
                        key: state[f"optimizer/{name}/{key}"].to(parameter.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise PcaeError(f"cannot resume {out}: another model was saved: {reason}") from None
        self.step, self.history = int(training["step"]), list(training["history"])
        self._epoch_loss, self._epoch_steps, self._epoch_s = training["epoch_at_hand"]

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep a second run from writing to the same folder; all processes go on, or none."""
        folder, failure = self.settings.out, ""
        lock = FileLock(folder / LOCK, timeout=0)
        if self.world.main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except Timeout:
                failure = f"another run is writing to {folder}: choose another --out"
            except OSError as error:
                failure = f"cannot write to {folder}: {error.strerror}"
        if any(failures := self.world.gather(failure)):
            raise PcaeError(failures[0])
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """What stops --compile, such as a missing compiler, in one line."""
        try:
            yield
        except TorchDynamoException as error:
            raise PcaeError(f"--compile does not work here: {one_line(error)}") from None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the step at hand; a second one ends it at once.

        Not where torchrun started several: it passes on what its terminal has sent already.
        """

        def stop(number: int, _: FrameType | None) -> None:
            self._stop = signal.Signals(number)
            if self.world.size == 1:
                for each, handler in before.items():
                    signal.signal(each, handler)

        before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
        for each in before:
            signal.signal(each, stop)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _stopped(self) -> bool:
        """Whether to end now: all processes or none."""
        if self.world.any(self._stop is not None):
            self._stop = self._stop or signal.SIGTERM
        return self._stop is not None


def check_out(settings: RunSettings) -> None:
    """Raise PcaeError where --out holds what this run must not replace."""
    checkpoints.check_replaceable(settings.out / checkpoints.RUN_CHECKPOINT)
    saved = checkpoints.find_checkpoint(settings.out) / "config.json"
    if settings.resume:
        checkpoints.read_json(saved)  # says what is missing
    elif saved.exists() and not settings.dry_run:
        raise PcaeError(
            f"{settings.out} holds a run already: go on with --resume, or choose another --out"
        )


def training_data(
    settings: RunSettings, preprocess: Preprocess, **wanted: Unpack[ColumnChoice]
) -> LabelledImages | ImageStream:
    """The images that a run is told to train on. Raises DataError where they cannot be read.

    wanted: about the columns, where the caller knows better than the settings.
    """
    columns: ColumnChoice = {**settings.columns, **wanted}
    source, split, limit = settings.data, settings.split, settings.max_unreadable
    if settings.epoch_size is not None and settings.stream:
        size = settings.epoch_size
        return load_stream(
            source, split, preprocess, epoch_size=size, max_unreadable=limit, **columns
        )
    return load(source, split, preprocess, max_unreadable=limit, **columns)


def parameter_groups(
    objective: nn.Module, model: VisionTransformer, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters by weight decay and learning-rate scale, as MAE groups them to fine-tune.

    No decay on biases, norms, and single tokens (in pretraining MAE decays CLS and mask token); the
    rate of a layer is `layer_decay` times that of the layer above it: embeddings lowest, head and
    final norm at 1.
    """
    depth = model.config.depth
    layer = {
        parameter: int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        for name, parameter in model.named_parameters()
        if not name.startswith(("head", "norm.", "fc_norm."))
    }
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or name.endswith(("_token", "pos_embed"))
        level = layer.get(parameter, depth + 1)
        group = groups.setdefault(
            (plain, level),
            {
                "params": [],
                "weight_decay": 0.0 if plain else weight_decay,
                "scale": layer_decay ** (depth + 1 - level),
            },
        )
        group["params"].append(parameter)
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for group in groups.values():  # at layer decay 1 all levels are one
        same = merged.setdefault((group["weight_decay"], group["scale"]), {**group, "params": []})
        same["params"].extend(group["params"])
    return list(merged.values())
