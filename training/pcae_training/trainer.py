"""The training loop: batches, optimiser, processes, checkpoints, stop and resume.

    RUN/                       --out; also contains the files of `journal`
      checkpoint/              the last complete checkpoint (see `checkpoint`)
      best/                    that of the best epoch, with --select best
      holdout.json             the images held out (see `heldout_record`)

An `Objective` gives the loss of a micro-batch. A step depends on the weights, the seed and its
number alone, so a run that was stopped anywhere continues from its last checkpoint as if it had not
been stopped.
"""

import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
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
from pcae_training.best_epoch import BestEpoch
from pcae_training.block import Block
from pcae_training.checkpoint import Checkpoint
from pcae_training.columns import DataChoice
from pcae_training.data import LabelledImages, TrainingData, load
from pcae_training.estimate import TIME_LIMIT_S, TIMED_STEPS, describe_time, measure_step, wait_for
from pcae_training.feature_watch import FeatureWatch
from pcae_training.inventory import Inventory, print_lines
from pcae_training.journal import Journal
from pcae_training.model import VisionTransformer
from pcae_training.number_format import describe_slow
from pcae_training.plan import Plan
from pcae_training.sample_rng import SampleRng
from pcae_training.schedule import cosine
from pcae_training.settings import PLACE, RunSettings
from pcae_training.stream import ImageStream, load_stream
from pcae_training.world import World

LOCK = "lock"
STOPPED = 128 + signal.SIGTERM  # exit code of a run that a signal stopped, after saving
BEST = "best"  # folder, in that of a run, of the checkpoint of the best epoch

#: The run's duration is stated at its start if it is at least this long.
STATED_FROM_S = 60.0


class Objective(Protocol):
    """The loss that a run minimises. A module, so that processes can share its gradients."""

    @property
    def model(self) -> VisionTransformer: ...

    @property
    def kept_prefix(self) -> str:
        """The prefix, in the state dict, of the weights that the checkpoint holds.

        The state to resume from has those of them that are others in the checkpoint.
        """
        ...

    @property
    def has_unused(self) -> bool:
        """Whether a step may leave parameters without a gradient."""
        ...

    def __call__(self, pixels: Tensor, labels: Tensor, rng: SampleRng, progress: float) -> Tensor:
        """Return the mean loss of a micro-batch: pixels uint8 [b, 3, S, S], labels int64 [b]."""
        ...

    def macs(self, progress: float) -> float:
        """Return the expected multiply-adds of a training step for one image."""
        ...

    def after_step(self) -> None:
        """Update what is derived from the weights, such as an average, after an optimiser step."""
        ...

    def checkpoint(self) -> Checkpoint:
        """Return the current model with its preprocessing and labels."""
        ...

    def after_epoch(self, world: World) -> Mapping[str, Mapping[str, float]]:
        """Return figures by name and case, such as held-out top-1 by keep ratio.

        Called in every process.
        """
        ...


class Trainer:
    """One start of a run: from the first step, or the one it resumes at, to the last."""

    def __init__(
        self,
        settings: RunSettings,
        objective: Any,  # an Objective and nn.Module: Python has no intersection types
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        data: TrainingData,
        world: World,
        inventories: Iterable[Inventory | None] = (),
        best: BestEpoch | None = None,
    ) -> None:
        """groups: parameter groups, each with a "scale" on the learning rate.

        inventories: of the data that the run uses. best: keep the best epoch, and may stop early.
        """
        self.best = best
        self.at_start: Callable[[Path], None] | None = None  # writes into the run's folder
        self.watch: FeatureWatch | None = None  # in the main process
        self.inventories = [inventory for inventory in inventories if inventory is not None]
        self.settings, self.objective, self.data, self.world = settings, objective, data, world
        for block in (m for m in objective.modules() if isinstance(m, Block)):
            block.recompute = settings.checkpoint_gradients  # also in the steps of `estimate`
        self.plan = Plan(settings, world, len(data))
        self.optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=betas, fused=True)
        self.step = 0
        self.history: list[dict[str, Any]] = []  # by epoch
        self._epoch_loss, self._epoch_steps, self._epoch_s = 0.0, 0, 0.0  # of the current epoch
        # since the last report: sum of losses, first step with a non-finite loss, micro-batches
        self._loss = torch.zeros(3, dtype=torch.float64, device=world.device)
        self._clock = 0.0  # when the last report ended
        self._first_step, self._first_step_end = 0, 0.0  # of this start
        self._time_stated = False
        self._stop: signal.Signals | None = None

    def run(self) -> bool:
        """Train to the last step. Return False if a signal stopped the run before."""
        settings, plan = self.settings, self.plan
        if slow := describe_slow(settings.precision, settings.device):
            print_lines(slow)
        if settings.compile:
            for block in (m for m in self.objective.modules() if isinstance(m, Block)):
                block.compile()
        learner = self.objective
        if self.world.size > 1:
            learner = DistributedDataParallel(
                self.objective, find_unused_parameters=self.objective.has_unused
            )
        with self._lock(), self._signals(), self._compiling():
            if settings.resume:
                self._resume()
            self._first_step = self.step
            seen = self.step * settings.batch_size
            total = plan.last_step * settings.batch_size
            journal: Any = nullcontext(None)
            if self.world.main:
                if self.at_start is not None:
                    self.at_start(settings.folder)
                journal = Journal(
                    settings.folder,
                    settings.model_dump(mode="json"),
                    step=self.step,
                    images=seen,
                    total=total,
                    data=[inventory.to_json() for inventory in self.inventories],
                )
            with journal as log:
                if log and self.watch is not None:
                    self.watch.begin(self.step, log)
                while self.step < plan.last_step and not self._exhausted() and not self._stopped():
                    self._epoch(learner, log)
        return self._stop is None

    @property
    def finished(self) -> bool:
        """Whether no step is left, also for a resumed run."""
        return self.step == self.plan.steps or self._exhausted()

    def _exhausted(self) -> bool:
        return self.best is not None and self.best.exhausted(self.history)

    def estimate(self) -> str | None:
        """Return a text on how long the run will take, from a few steps on random pixels."""
        classes = self.objective.model.config.classes
        step_s = measure_step(self.objective, self.plan, self.data.preprocess, classes)
        return describe_time(self.plan, self.objective.macs, step_s, progress=1.0)

    def _epoch(self, learner: nn.Module, log: Journal | None) -> None:
        """Train to the end of the current epoch."""
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
                if not self._time_stated:
                    self._state_time(log)
                self._watch(log)
            if self.step % plan.steps_per_epoch == 0:
                break  # saved after `_close_epoch`
            if self.step % settings.log_every == 0:
                self._report(log)
                if self.world.any(self._clock - saved > settings.save_every_s):
                    self.save()
                    self._clock = saved = time.monotonic()
            if self._stopped():
                break
        if self._loss[2] > 0:  # steps that have not been reported
            self._report(log)
        if self.step % plan.steps_per_epoch == 0:
            self._close_epoch(log)
        self.save()

    def _state_time(self, log: Journal) -> None:
        """Print how long the run will take, after its first steps."""
        steps = self.step - self._first_step
        if steps in (1, 1 + TIMED_STEPS):
            wait_for(self.world.device)
        now = time.monotonic()
        if steps == 1:  # the first step, which allocates memory and chooses kernels, is not timed
            self._first_step_end = now
            return
        elapsed_s = now - self._first_step_end
        if steps < 1 + TIMED_STEPS and elapsed_s < TIME_LIMIT_S:
            return
        self._time_stated = True
        text = describe_time(
            self.plan,
            self.objective.macs,
            elapsed_s / (steps - 1),
            progress=self.step / self.plan.steps,
            first_step=self._first_step,
            shortest_s=STATED_FROM_S,
        )
        if text is not None:
            log.write(text)

    def _watch(self, log: Journal) -> None:
        """Measure the features if it is time, which counts as no time of the steps."""
        if self.watch is not None and self.watch.due(self.step):
            wait_for(self.world.device)
            began = time.monotonic()
            self.watch.report(self.step, log)
            spent = time.monotonic() - began
            self._clock += spent
            self._first_step_end += spent

    def _close_epoch(self, log: Journal | None) -> None:
        """Evaluate, and record the figures of the epoch."""
        epoch = self.step // self.plan.steps_per_epoch
        figures = self.objective.after_epoch(self.world)
        self.history.append(
            {
                "epoch": epoch,
                "train_loss": round(self._epoch_loss / self._epoch_steps, 4),
                "train_s": round(self._epoch_s, 1),
                **figures,
            }
        )
        self._epoch_loss, self._epoch_steps, self._epoch_s = 0.0, 0, 0.0
        if log and self.best is not None and self.best.find(self.history) == epoch:
            # in front of the run's own checkpoint: a run killed between both repeats this epoch
            checkpoints.save(self._checkpoint(), self.settings.folder / BEST)
        if log and figures:
            flat = {
                f"{name}/{case}": value
                for name, cases in figures.items()
                for case, value in cases.items()
            }
            log.report(self.step, {"epoch": epoch, **flat})
            log.write(f"epoch {epoch}  " + "  ".join(f"{n} {v:.4f}" for n, v in flat.items()))

    def _step(self, learner: Any, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Make one optimiser step over the global batch."""
        settings, plan = self.settings, self.plan
        progress = (self.step + 0.5) / plan.steps  # the step's middle: the rate is never 0
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
            alone = self.world.size > 1 and not last  # gradients are reduced once, with the last
            with learner.no_sync() if alone else nullcontext():
                with torch.autocast(
                    self.world.device.type, settings.dtype, settings.dtype != torch.float32
                ):
                    loss = learner(pixels, labels, rng, progress)
                (loss / len(parts)).backward()
            self._add_loss(loss.detach())
        if settings.clip:
            nn.utils.clip_grad_norm_(self.objective.parameters(), settings.clip)
        self.optimizer.step()
        self.objective.after_step()
        self.step += 1

    def _add_loss(self, loss: Tensor) -> None:
        """Add to the reported loss, and keep the number of the first step with a non-finite loss.

        Computed on the device, without a sync.
        """
        bad = ~loss.isfinite() & (self._loss[1] == 0)
        self._loss[0] += loss
        self._loss[1] += bad * (self.step + 1)
        self._loss[2] += 1

    def _report(self, log: Journal | None) -> None:
        """Report the steps since the last report. Raise PcaeError if a loss was not finite."""
        epoch = (self.step - 1) // self.plan.steps_per_epoch + 1
        readings = self.world.gather([*self._loss.tolist(), self.data.unreadable])
        now = time.monotonic()  # `tolist` has waited for the device
        seconds, self._clock = now - self._clock, now
        self._loss.zero_()
        if bad := [int(step) for _, step, _, _ in readings if step]:
            raise PcaeError(
                f"the loss is not finite in step {min(bad)} (epoch {epoch}); try a smaller --lr"
                f" (the last good checkpoint, if any, stays in {self.settings.folder})"
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
        """Write the checkpoint with the state to resume from it.

        Raise PcaeError, and keep the previous checkpoint, if a weight is not finite.
        """
        if bad := [n for n, p in self.objective.named_parameters() if not p.isfinite().all()]:
            raise PcaeError(
                f"{bad[0]} is not finite after step {self.step}; try a smaller --lr"
                f" (the last good checkpoint, if any, stays in {self.settings.folder})"
            )
        if not self.world.main:
            return
        checkpoint = self._checkpoint()
        prefix, kept = self.objective.kept_prefix, checkpoint.model.state_dict()
        held = {f"{prefix}{name}": value for name, value in kept.items()}
        state = {
            f"objective/{name}": value
            for name, value in self.objective.state_dict().items()
            if name not in held or not torch.equal(value, held[name])
        }
        for name, parameter in self.objective.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer/{name}/{key}"] = value
        checkpoints.save(checkpoint, self.settings.folder / checkpoints.RUN_CHECKPOINT, state)

    def _checkpoint(self) -> Checkpoint:
        """Return the objective's checkpoint with the record of the run."""
        checkpoint: Checkpoint = self.objective.checkpoint()
        checkpoint.training = checkpoint.training | {
            "settings": self.settings.model_dump(mode="json", exclude={"resume"}),
            "step": self.step,
            "images": self.plan.images,
            "epochs_done": self.step // self.plan.steps_per_epoch,
            "history": self.history,
            "current_epoch": [self._epoch_loss, self._epoch_steps, self._epoch_s],
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            **({} if self.watch is None else {"watch": self.watch.record}),
        }
        return checkpoint

    def _resume(self) -> None:
        """Load weights, optimiser state and step from the checkpoint in --out."""
        out = self.settings.folder
        saved, state = checkpoints.load(out), checkpoints.load_state(out)
        training = saved.training
        if state is None:
            raise PcaeError(f"cannot resume {out}: its checkpoint has no optimiser state")
        before, now = training.get("settings", {}), self.settings.model_dump(mode="json")
        given = self.settings.model_fields_set  # a run of an earlier version lacks later flags
        changed = [
            name
            for name in now
            if name not in PLACE
            and (before[name] != now[name] if name in before else name in given)
        ]
        if changed:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise PcaeError(f"cannot resume {out}: it was started with other values of {flags}")
        if training["images"] != self.plan.images:
            raise PcaeError(
                f"cannot resume {out}: it was trained on {training['images']} images, and there are"
                f" {self.plan.images} now"
            )
        try:
            prefix, kept = self.objective.kept_prefix, saved.model.state_dict()
            weights = {f"{prefix}{name}": value for name, value in kept.items()}
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
            raise PcaeError(f"cannot resume {out}: its model differs: {reason}") from None
        self.step, self.history = int(training["step"]), list(training["history"])
        self._epoch_loss, self._epoch_steps, self._epoch_s = training["current_epoch"]
        if self.watch is not None and "watch" in training:  # not in runs of an earlier version
            self.watch.record = training["watch"]

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Lock the folder against a second run; on failure all processes raise PcaeError."""
        folder, failure = self.settings.folder, ""
        lock = FileLock(folder / LOCK, timeout=0)
        if self.world.main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except Timeout:
                failure = f"another run is writing to {folder}; choose another --out"
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
        """Report a failure of --compile, such as a missing compiler, in one line."""
        try:
            yield
        except TorchDynamoException as error:
            raise PcaeError(f"--compile failed: {one_line(error)}") from None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop after the current step on SIGTERM or Ctrl-C, at once on a second signal.

        Under torchrun only the first rule holds: it forwards signals that the terminal has sent to
        the whole process group already, so every process gets two.
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
        """Return whether to stop now; the same in all processes."""
        if self.world.any(self._stop is not None):
            self._stop = self._stop or signal.SIGTERM
        return self._stop is not None


def check_out(settings: RunSettings) -> None:
    """Raise PcaeError if --out contains something that this run must not replace."""
    if settings.out is None:  # a dry run
        return
    checkpoints.check_replaceable(settings.out / checkpoints.RUN_CHECKPOINT)
    saved = checkpoints.find_checkpoint(settings.out) / "config.json"
    if settings.resume:
        checkpoints.read_json(saved)  # raises if there is none
    elif saved.exists() and not settings.dry_run:
        raise PcaeError(
            f"{settings.out} already contains a run; continue it with --resume, or choose another"
            " --out"
        )


def training_data(
    settings: RunSettings, preprocess: Preprocess, **choice: Unpack[DataChoice]
) -> LabelledImages | ImageStream:
    """Open the training images. Raise DataError if they cannot be read.

    choice: columns that override those of the settings.
    """
    columns: DataChoice = {**settings.columns, **choice}
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
    """Return AdamW's parameter groups by weight decay and learning-rate scale, as MAE fine-tunes.

    Biases, norms and single tokens have no decay (in pretraining MAE decays CLS and mask token).
    The rate of a layer is `layer_decay` times that of the layer above it: embeddings have the
    lowest, final norm, pooling, projection and head the full one.
    """
    depth = model.config.depth
    layer = {
        parameter: int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        for name, parameter in model.named_parameters()
        if not name.startswith(("head", "norm.", "fc_norm.", "attn_pool.", "projection."))
    }
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or name.endswith(("_token", "pos_embed", "latent"))
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
