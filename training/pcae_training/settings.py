"""What every training run is told, as flags and in run.json.

It knows names, ranges and defaults; nothing of how a run goes about it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.checkpoint import find_checkpoint
from pcae_training.columns import ColumnChoice
from pcae_training.model import ViTConfig

#: Settings that say where or how a run is computed, not what comes of it: free when it is resumed.
PLACE = {
    "resume", "resume_or_begin", "dry_run", "out", "stop_after", "save_every_s", "log_every",
    "device", "threads", "workers", "compile", "accumulate", "max_unreadable",
}  # fmt: skip


class RunSettings(BaseModel):
    """What every training run is told."""

    data: str = Field(description="class folders, parquet, .tar shards or a hub name")
    out: Path = Field(description="folder of the run: checkpoint, metrics, configuration")
    resume: bool = Field(False, description="go on from the checkpoint in --out")
    resume_or_begin: bool = Field(
        False, description="go on where --out has a checkpoint; for launchers that start anew"
    )
    dry_run: bool = Field(False, description="print model, budgets, cost and plan, train nothing")

    split: str = Field("train", description="split of --data to train on")
    stream: bool = Field(False, description="read shards as they come, never all at once")
    epoch_size: int | None = Field(None, ge=1, description="images an epoch; needed with --stream")
    image_column: str | None = Field(None, description="column of images, where there are several")
    label_column: str | None = Field(None, description="column of labels, where there are several")
    classes: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None, description="class names with commas between, where --data has numbers"
    )
    max_unreadable: float = Field(
        0.01, ge=0, le=1, description="share of images that may be unreadable; they are skipped"
    )

    image_size: int | None = Field(
        None, ge=1, description="side of the square the model sees; 224, or as --init"
    )
    patch_size: int | None = Field(None, ge=1, description="16, or as --init; another resizes it")
    width: int = Field(192, ge=4, description="token width; 192 is DeiT-Ti, 384 ViT-S, 768 ViT-B")
    depth: int = Field(12, ge=1, description="blocks")
    heads: int = Field(3, ge=1, description="attention heads; of --init, if its file tells not")

    crop: float = Field(
        0.0, ge=0, le=1, description="least share of the image a random crop takes; 0 = off"
    )
    flip: bool = Field(True, description="mirror half of the images")
    shift: int = Field(0, ge=0, description="pixels an image may move each way; 0 = off")
    drop_path: float = Field(0.0, ge=0, lt=1, description="rate in the last block; 0 = off")

    epochs: int = Field(100, ge=1, description="passes over the training images")
    stop_after: int | None = Field(
        None, ge=1, description="stop after so many epochs, to go on with --resume another time"
    )
    batch_size: int = Field(64, ge=1, description="images a step, over all processes")
    accumulate: int = Field(1, ge=1, description="micro-batches that a process splits its share in")
    lr: float | None = Field(None, gt=0, description="peak learning rate; default from --blr")
    blr: float = Field(5e-4, gt=0, description="peak learning rate for 256 images a step")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the run before the peak")
    weight_decay: float = Field(0.05, ge=0, description="on matrices; none on biases and norms")
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 = any")

    seed: int = Field(
        0, ge=0, lt=2**63, description="of weights, order, crops, masks, budgets and hold-out"
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs under autocast")
    compile: bool = Field(False, description="compile the blocks with torch.compile")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = torch's choice")
    workers: int = Field(0, ge=0, description="loader processes for data too large for memory")
    save_every_s: float = Field(600, gt=0, description="seconds between checkpoints in an epoch")
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, classes: object) -> object:
        return classes.split(",") if isinstance(classes, str) else classes

    @model_validator(mode="after")
    def _goes_on(self) -> Self:
        """Known before the first process saves, which none does before all have started."""
        if self.resume_or_begin and (find_checkpoint(self.out) / "config.json").exists():
            self.resume = True
        return self

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.stream and self.epoch_size is None:
            raise ValueError("--stream has no end: say how long an epoch is with --epoch-size")
        if self.epoch_size is not None and not self.stream:
            raise ValueError("--epoch-size is for --stream: other data have a size of their own")
        if self.min_lr > self.peak_lr:
            raise ValueError(f"--min-lr {self.min_lr} is above the peak, {self.peak_lr:.3g}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size {self.batch_size} does not divide into --accumulate"
                f" {self.accumulate} micro-batches"
            )
        return self

    def config(self, classes: int, **changes: Any) -> ViTConfig:
        """The model that the sizes describe."""
        return ViTConfig(
            image_size=self.image_size or 224,
            patch_size=self.patch_size or 16,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            classes=classes,
            **changes,
        )

    def preprocess(self, size: int) -> Preprocess:
        """How images become pixels for a model that starts from random weights."""
        return Preprocess(
            image_size=size,
            resize=size if size < 64 else round(size / 0.875),  # ImageNet's 256 for 224
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )

    def source(self, preprocess: Preprocess) -> Preprocess:
        """What is decoded to train on: with random crops, all of the resized image's square."""
        if not self.crop:
            return preprocess
        return replace(preprocess, image_size=preprocess.resize)

    @property
    def columns(self) -> ColumnChoice:
        """What is said about the columns of the data."""
        return ColumnChoice(
            image_column=self.image_column, label_column=self.label_column, classes=self.classes
        )

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else self.blr * self.batch_size / 256

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32
