"""Fine-tune a ViT so that one set of weights serves every budget.

Every step draws a keep ratio from `budgets`; the paper's ramp holds reduction back at first. It
knows nothing of export or of tiers: it reports accuracy per budget and leaves the choice open.
"""

import math
import platform
import time
from pathlib import Path
from typing import Literal

import kornia.augmentation as K
import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor, nn
from tqdm import tqdm

from pcae_serve.errors import PcaeError
from pcae_serve.preprocess import Preprocess
from pcae_serve.tokens import exact
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages, Split, hold_out, load
from pcae_training.evaluate import Top1, evaluate, normalise
from pcae_training.model import ViTConfig, VisionTransformer
from pcae_training.schedule import cosine, ramped


class FinetuneSettings(BaseModel):
    """Fine-tune on labelled images; without --init the model starts from random weights."""

    data: str = Field(description="class folders, a folder of parquet, a .parquet file or a hub name")
    out: Path = Field(description="checkpoint folder to write; written after every epoch")
    init: Path | None = Field(None, description="checkpoint folder to start from")
    resume: bool = Field(False, description="go on from the last epoch saved in --out")

    image_size: int = Field(224, ge=1, description="side of the square the model sees")
    patch_size: int | None = Field(None, ge=1, description="16, or as --init; another resizes it")
    width: int = Field(192, description="token width; 192 is DeiT-Ti, 384 ViT-S, 768 ViT-B")
    depth: int = Field(12, ge=1, description="blocks")
    heads: int = Field(3, ge=1, description="attention heads")

    budgets: tuple[float, ...] = Field(
        (1.0, 0.9, 0.8, 0.7, 0.6), description="keep ratios; every step draws one of them"
    )
    ramp_start: float = Field(0.10, ge=0, le=1, description="share of the run before any dropping")
    ramp_length: float = Field(0.25, ge=0, le=1, description="share over which the drop ratio rises")

    epochs: int = Field(100, ge=1, description="passes over the training rows")
    batch_size: int = Field(64, ge=1, description="images a step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the run with rising learning rate")
    weight_decay: float = Field(0.05, ge=0, description="on matrices; none on biases and norms")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="0 = off")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    flip: bool = Field(True, description="mirror half of the images")
    shift: int = Field(2, ge=0, description="pixels an image may move each way; 0 = off")
    erase: float = Field(0.0, ge=0, le=1, description="share of images with a patch erased; 0 = off")

    holdout: int = Field(5000, ge=1, description="training images held out for every choice")
    seed: int = Field(0, description="of the weights, the order, the budgets and the hold-out")
    device: str = Field("cpu", description="cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs under autocast")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = torch's choice")
    workers: int = Field(0, ge=0, description="loader processes for data too large for memory")

    @field_validator("budgets")
    @classmethod
    def _exact(cls, budgets: tuple[float, ...]) -> tuple[float, ...]:
        for budget in budgets:
            exact(budget)
        if not budgets:
            raise ValueError("at least one keep ratio is needed")
        return tuple(sorted(budgets, reverse=True))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def finetune(settings: FinetuneSettings) -> dict[float, Top1]:
    """Train, save after every epoch, and return held-out top-1 per budget at the end."""
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    checkpoint, images = prepare(settings)
    split = hold_out(images, settings.holdout, settings.seed)
    trainer = Trainer(settings, checkpoint, images.in_memory(), split)
    first = trainer.resume() if settings.resume else 0
    for epoch in range(first, settings.epochs):
        trainer.epoch(epoch)
    return trainer.report(settings.budgets)


def prepare(settings: FinetuneSettings) -> tuple[Checkpoint, LabelledImages]:
    """The model to train, and its data decoded the way that model wants it."""
    if settings.init is not None:
        checkpoint = checkpoints.load(settings.init, settings.patch_size)
        images = load(settings.data, "train", checkpoint.preprocess)
        if images.classes != checkpoint.labels:
            raise PcaeError(
                f"{settings.init} was trained on labels {checkpoint.labels[:3]}…, but {settings.data}"
                f" has {images.classes[:3]}…: start without --init, or use the same labels"
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
    config = ViTConfig(
        image_size=size,
        patch_size=settings.patch_size or 16,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        classes=len(images.classes),
    )
    return Checkpoint(VisionTransformer(config), preprocess, images.classes), images


class Trainer:
    """One run: its model, optimiser and random draws, an epoch at a time."""

    def __init__(
        self,
        settings: FinetuneSettings,
        checkpoint: Checkpoint,
        images: LabelledImages,
        split: Split,
    ) -> None:
        self.settings, self.checkpoint, self.images, self.split = settings, checkpoint, images, split
        self.device = torch.device(settings.device)
        self.model = checkpoint.model.to(self.device).train()
        self.steps_per_epoch = math.ceil(len(split.train) / settings.batch_size)
        self.steps = settings.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay), lr=settings.lr, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine((step + 1) / self.steps, settings.warmup)
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self.augment = augmentation(settings, images.preprocess.image_size)
        self.history: list[dict[str, object]] = []
        self.init_training = checkpoint.training

    def epoch(self, number: int) -> None:
        """Train on every row once, evaluate at both ends of the budgets, and save."""
        # seeded by the epoch, so that a resumed run draws what an unbroken one would
        torch.manual_seed(self.settings.seed * 100_003 + number)
        order = torch.tensor(self.split.train)[torch.randperm(len(self.split.train))].tolist()
        batches = self.images.batches(order, self.settings.batch_size, self.settings.workers)
        start, total = time.monotonic(), 0.0
        bar = tqdm(batches, total=self.steps_per_epoch, desc=f"epoch {number + 1}", unit="step")
        for i, (pixels, labels) in enumerate(bar):
            step = number * self.steps_per_epoch + i
            loss, keep_ratio = self.step(step, pixels.to(self.device), labels.to(self.device))
            total += loss
            bar.set_postfix(loss=f"{total / (i + 1):.3f}", keep=f"{keep_ratio:.2f}")
        ends = sorted({self.settings.budgets[0], self.settings.budgets[-1]}, reverse=True)
        train_s = time.monotonic() - start
        accuracy = self.evaluate(ends)
        for budget, top1 in accuracy.items():
            tqdm.write(f"epoch {number + 1}  keep {budget:<4}  held-out top-1 {top1}")
        self.history.append(
            {
                "epoch": number + 1,
                "train_loss": round(total / self.steps_per_epoch, 4),
                "train_s": round(train_s, 1),
                "holdout_top1": {str(budget): top1.value for budget, top1 in accuracy.items()},
            }
        )
        self.save(number + 1)

    def step(self, step: int, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
        """One optimiser step at a keep ratio drawn for it; the loss, and the ratio in force."""
        settings = self.settings
        draw = int(torch.randint(len(settings.budgets), ()))
        keep_ratio = ramped(
            settings.budgets[draw], step / self.steps, settings.ramp_start, settings.ramp_length
        )
        images = self.augment(normalise(pixels, self.images.preprocess))
        with torch.autocast(
            self.device.type, settings.dtype, enabled=settings.precision != "fp32"
        ):
            logits = self.model(images, self.model.config.geometry.counts(keep_ratio))
            loss = self.loss(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.schedule.step()
        return loss.item(), keep_ratio

    def evaluate(self, budgets: tuple[float, ...] | list[float]) -> dict[float, Top1]:
        """Held-out top-1 at each of `budgets`."""
        return evaluate(
            self.model,
            self.images,
            self.split.holdout,
            budgets,
            precision=self.settings.dtype,
        )

    def report(self, budgets: tuple[float, ...]) -> dict[float, Top1]:
        """Held-out top-1 at every budget, kept in the checkpoint too."""
        accuracy = self.evaluate(budgets)
        self.history.append(
            {"final": {str(b): {"top1": t.value, "n": t.n} for b, t in accuracy.items()}}
        )
        self.save(self.settings.epochs)
        return accuracy

    def save(self, epochs_done: int) -> None:
        """Write the checkpoint with the state to go on from."""
        self.checkpoint.training = {
            "settings": self.settings.model_dump(mode="json", exclude={"resume"}),
            "epochs_done": epochs_done,
            "history": self.history,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "init": self.init_training or None,
        }
        names = [name for name, _ in self.model.named_parameters()]
        by_parameter = {p: n for n, p in self.model.named_parameters()}
        state = {
            f"{key}/{by_parameter[p]}": value
            for p, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        assert len(names) == len(by_parameter)
        checkpoints.save(self.checkpoint, self.settings.out, state)

    def resume(self) -> int:
        """Load weights and optimiser from --out; the number of epochs already done."""
        saved = checkpoints.load(self.settings.out)
        state = checkpoints.load_state(self.settings.out)
        wanted = self.settings.model_dump(mode="json", exclude={"resume"})
        if state is None or saved.training.get("settings") != wanted:
            raise PcaeError(f"{self.settings.out} was not written by a run with these settings")
        self.model.load_state_dict(saved.model.state_dict())
        self.history = saved.training["history"]
        done = int(saved.training["epochs_done"])
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                key: state[f"{key}/{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.schedule.last_epoch = done * self.steps_per_epoch
        return done


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay on matrices and kernels, none on biases, norms, CLS and positions (as MAE)."""
    decayed, free = [], []
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
