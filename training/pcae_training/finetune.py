"""Fine-tune a ViT so that one set of weights serves every budget.

Every step draws a keep ratio from `budgets`; the paper's ramp holds reduction back at first. It
knows nothing of export or of tiers: it reports accuracy per budget and leaves the choice open.
"""

import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypedDict

import kornia.augmentation as K
import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_settings import NoDecode
from torch import Tensor, nn
from tqdm import tqdm

from pcae_serve.errors import PcaeError
from pcae_serve.preprocess import Preprocess
from pcae_serve.tokens import REDUCTION_POINTS, exact
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages, Split, hold_out, load
from pcae_training.evaluate import Top1, evaluate, normalise
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.schedule import cosine, ramped


class FinetuneSettings(BaseModel):
    """Fine-tune on labelled images; without --init the model starts from random weights."""

    data: str = Field(description="class folders, folder of parquet, .parquet file or hub name")
    out: Path = Field(description="checkpoint folder to write; written after every epoch")
    init: Path | None = Field(None, description="checkpoint folder to start from")
    resume: bool = Field(False, description="go on from the last epoch saved in --out")

    image_size: int = Field(224, ge=1, description="side of the square the model sees")
    patch_size: int | None = Field(None, ge=1, description="16, or as --init; another resizes it")
    width: int = Field(192, ge=4, description="token width; 192 is DeiT-Ti, 384 ViT-S, 768 ViT-B")
    depth: int = Field(12, ge=max(REDUCTION_POINTS) + 1, description="blocks")
    heads: int = Field(3, ge=1, description="attention heads")

    budgets: Annotated[tuple[float, ...], NoDecode] = Field(
        (1.0, 0.9, 0.8, 0.7, 0.6), description="keep ratios, as 1.0,0.8,.6; every step draws one"
    )
    ramp_start: float = Field(0.10, ge=0, le=1, description="share of the run before any dropping")
    ramp_length: float = Field(0.25, ge=0, le=1, description="share over which dropping rises")

    epochs: int = Field(100, ge=1, description="passes over the training rows")
    stop_after: int | None = Field(
        None, ge=1, description="stop after so many epochs, to go on with --resume another time"
    )
    batch_size: int = Field(64, ge=1, description="images a step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the run before the peak")
    weight_decay: float = Field(0.05, ge=0, description="on matrices; none on biases and norms")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="0 = off")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    flip: bool = Field(True, description="mirror half of the images")
    shift: int = Field(2, ge=0, description="pixels an image may move each way; 0 = off")
    erase: float = Field(0.0, ge=0, le=1, description="share of images partly erased; 0 = off")

    holdout: int = Field(5000, ge=1, description="training images held out for every choice")
    seed: int = Field(0, description="of the weights, the order, the budgets and the hold-out")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs under autocast")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = torch's choice")
    workers: int = Field(0, ge=0, description="loader processes for data too large for memory")

    @field_validator("budgets", mode="before")
    @classmethod
    def _exact(cls, budgets: object) -> tuple[float, ...]:
        """One text with commas, or numbers: each once, from the largest to the smallest."""
        if isinstance(budgets, str):
            budgets = budgets.strip("[]()").split(",")
        if not isinstance(budgets, Sequence) or not budgets:
            raise ValueError(f"keep ratios are numbers with commas between, not {budgets!r}")
        return tuple(sorted({float(exact(budget)) for budget in budgets}, reverse=True))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """What flags together cannot mean is told before any data is read."""
        if self.ramp_start + self.ramp_length > 1:
            raise ValueError("--ramp-start and --ramp-length together reach beyond the run")
        if self.init is None:
            config = self.config(classes=1)
            for budget in self.budgets:
                config.geometry.counts(budget)
        elif fixed := self.model_fields_set & {"image_size", "width", "depth", "heads"}:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(fixed))
            raise ValueError(f"--init decides the model's sizes: leave out {flags}")
        return self

    def config(self, classes: int) -> ViTConfig:
        """The model to start from without --init."""
        return ViTConfig(
            image_size=self.image_size,
            patch_size=self.patch_size or 16,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            classes=classes,
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Epoch(TypedDict):
    """What an epoch came to, as training.json keeps it."""

    epoch: int  # from 1
    train_loss: float
    train_s: float
    holdout_top1: dict[str, float]  # keep ratio → share


#: Settings that say where or when a run happens, not what comes of it: free when it is resumed.
PLACE = {"resume", "stop_after", "out", "device", "threads", "workers"}


def finetune(settings: FinetuneSettings) -> dict[float, Top1]:
    """Train, save after every epoch, and return held-out top-1 per budget at the end."""
    checkpoints.check_place(settings.out)
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise PcaeError(f"there is no {settings.device} on this machine: use --device cpu")
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    checkpoint, images = prepare(settings)
    split = hold_out(images, settings.holdout, settings.seed)
    trainer = Trainer(settings, checkpoint, images, split)
    first = trainer.resume() if settings.resume else 0
    images.in_memory()
    last = max(first, min(settings.epochs, settings.stop_after or settings.epochs))
    for epoch in range(first, last):
        trainer.epoch(epoch)
    return trainer.report(last)


def prepare(settings: FinetuneSettings) -> tuple[Checkpoint, LabelledImages]:
    """The model to train, and its data decoded the way that model wants it."""
    if settings.init is not None:
        checkpoint = checkpoints.load(settings.init, settings.patch_size)
        try:
            for budget in settings.budgets:
                checkpoint.model.config.geometry.counts(budget)
        except ValueError as error:
            raise PcaeError(f"{settings.init}: {error}") from None
        images = load(settings.data, "train", checkpoint.preprocess)
        if images.classes != checkpoint.labels:
            raise PcaeError(
                f"{settings.init} was trained on labels {checkpoint.labels[:3]}…,"
                f" but {settings.data} has {images.classes[:3]}…:"
                " start without --init, or use the same labels"
            )
        return checkpoint, images
    size = settings.image_size
    preprocess = Preprocess(
        image_size=size,
        resize=size if size < 64 else round(size / 0.875),  # ImageNet's 256 for 224
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    images = load(settings.data, "train", preprocess)
    model = VisionTransformer(settings.config(len(images.classes)))
    return Checkpoint(model, preprocess, images.classes), images


class Trainer:
    """One run: its model, optimiser and random draws, an epoch at a time."""

    def __init__(
        self,
        settings: FinetuneSettings,
        checkpoint: Checkpoint,
        images: LabelledImages,
        split: Split,
    ) -> None:
        self.settings, self.checkpoint, self.images, self.split = (
            settings,
            checkpoint,
            images,
            split,
        )
        self.device = torch.device(settings.device)
        self.model = checkpoint.model.to(self.device).train()
        self.steps_per_epoch = math.ceil(len(split.train) / settings.batch_size)
        self.steps = settings.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay), lr=settings.lr, fused=True
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self.augment = augmentation(settings, images.preprocess.image_size)
        self.history: list[Epoch] = []
        self.final: dict[str, dict[str, float]] = {}  # by keep ratio: top1 and n
        self.init_training = checkpoint.training

    def epoch(self, number: int) -> None:
        """Train on every row once, evaluate at both ends of the budgets, and save."""
        # seeded by the epoch, so that a resumed run draws what an unbroken one would
        torch.manual_seed(self.settings.seed * 100_003 + number)
        order = torch.tensor(self.split.train)[torch.randperm(len(self.split.train))].tolist()
        batches = self.images.batches(order, self.settings.batch_size, self.settings.workers)
        start, total = time.monotonic(), torch.zeros((), dtype=torch.float64, device=self.device)
        bar = tqdm(batches, total=self.steps_per_epoch, desc=f"epoch {number + 1}", unit="step")
        for i, (pixels, labels) in enumerate(bar):
            step = number * self.steps_per_epoch + i
            loss, keep_ratio = self.step(step, pixels.to(self.device), labels.to(self.device))
            total += loss
            if i % 10 == 0:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{total.item() / (i + 1):.3f}", keep=f"{keep_ratio:.2f}")
        train_loss = total.item() / self.steps_per_epoch
        train_s = time.monotonic() - start
        if not math.isfinite(train_loss):
            raise PcaeError(f"the loss in epoch {number + 1} is {train_loss}: try a smaller --lr")
        accuracy = self.evaluate((self.settings.budgets[0], self.settings.budgets[-1]))
        for budget, top1 in accuracy.items():
            tqdm.write(f"epoch {number + 1}  keep {budget:<4}  held-out top-1 {top1}")
        self.history.append(
            {
                "epoch": number + 1,
                "train_loss": round(train_loss, 4),
                "train_s": round(train_s, 1),
                "holdout_top1": {str(budget): top1.value for budget, top1 in accuracy.items()},
            }
        )
        self.save(number + 1)

    def step(self, step: int, pixels: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """One optimiser step at a keep ratio drawn for it; the loss, and the ratio in force."""
        settings = self.settings
        # from the step alone, so that a resumed run needs no state; its middle, where it is never 0
        rate = settings.lr * cosine((step + 0.5) / self.steps, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        draw = int(torch.randint(len(settings.budgets), ()))
        keep_ratio = ramped(
            settings.budgets[draw], step / self.steps, settings.ramp_start, settings.ramp_length
        )
        images = self.augment(normalise(pixels, self.images.preprocess))
        with torch.autocast(self.device.type, settings.dtype, enabled=settings.precision != "fp32"):
            logits = self.model(images, self.model.config.geometry.counts(keep_ratio))
            loss = self.loss(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        return loss.detach(), keep_ratio

    def evaluate(self, budgets: Sequence[float]) -> dict[float, Top1]:
        """Held-out top-1 at each of `budgets`."""
        return evaluate(
            self.model,
            self.images,
            self.split.holdout,
            budgets,
            precision=self.settings.dtype,
        )

    def report(self, epochs_done: int) -> dict[float, Top1]:
        """Held-out top-1 at every budget, kept in the checkpoint too."""
        accuracy = self.evaluate(self.settings.budgets)
        self.final = {str(b): {"top1": t.value, "n": t.n} for b, t in accuracy.items()}
        self.save(epochs_done)
        return accuracy

    def save(self, epochs_done: int) -> None:
        """Write the checkpoint with the state to go on from."""
        self.checkpoint.training = {
            "settings": self.settings.model_dump(mode="json", exclude={"resume"}),
            "epochs_done": epochs_done,
            "history": self.history,
            "final": self.final,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "init": self.init_training or None,
        }
        state = {
            f"{key}/{name}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        checkpoints.save(self.checkpoint, self.settings.out, state)

    def resume(self) -> int:
        """Load weights and optimiser from --out; the number of epochs already done."""
        out = self.settings.out
        saved, state = checkpoints.load(out), checkpoints.load_state(out)
        if state is None:
            raise PcaeError(f"cannot resume {out}: it was saved without its optimiser's state")
        before = saved.training.get("settings", {})
        now = self.settings.model_dump(mode="json")
        if changed := [name for name in now if name not in PLACE and before.get(name) != now[name]]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise PcaeError(f"cannot resume {out}: it was written with another {flags}")
        try:
            self.model.load_state_dict(saved.model.state_dict())
            for name, parameter in self.model.named_parameters():
                self.optimizer.state[parameter] = {
                    key: state[f"{key}/{name}"].to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise PcaeError(f"cannot resume {out}: another model was saved: {reason}") from None
        self.history = [entry for entry in saved.training["history"] if "epoch" in entry]
        return int(saved.training["epochs_done"])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay on matrices and kernels, none on biases, norms, CLS and positions (as MAE)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name in ("cls_token", "pos_embed")
        (free if plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def augmentation(settings: FinetuneSettings, image_size: int) -> nn.Module:
    """Flip, shift and erase as asked, on normalised batches [B, 3, H, W]."""
    size, steps = (image_size, image_size), []
    if settings.shift:
        steps.append(K.RandomCrop(size, padding=settings.shift, padding_mode="reflect"))
    if settings.flip:
        steps.append(K.RandomHorizontalFlip())
    if settings.erase:
        steps.append(K.RandomErasing(p=settings.erase, scale=(0.02, 0.2)))
    return K.AugmentationSequential(*steps, data_keys=["input"]) if steps else nn.Identity()
