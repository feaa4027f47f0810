"""Settings that all training runs share: flags of the command line, recorded in run.json."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import reduction_points
from pcae_training.checkpoint import find_checkpoint
from pcae_training.data_settings import DataSettings
from pcae_training.model import ViTConfig
from pcae_training.number_format import PRECISION_HELP, Precision, choose_dtype

#: Settings of where and how a run is computed, which do not change its result: a resumed run may
#: have other values.
PLACE = {
    "resume", "resume_or_begin", "dry_run", "out", "stop_after", "save_every_s", "log_every",
    "device", "threads", "workers", "compile", "checkpoint_gradients", "accumulate",
    "max_unreadable",
}  # fmt: skip


class RunSettings(DataSettings):
    """Settings of a training run."""

    #: Sections of --help: title to fields.
    flag_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "run": (
            "data", "out", "resume", "resume_or_begin", "dry_run", "epochs", "stop_after", "seed",
        ),
        "data": (
            "split", "layout", "stream", "epoch_size", "image_column", "label_column", "classes",
            "max_unreadable",
        ),
        "model": ("image_size", "patch_size", "width", "depth", "heads"),
        "augmentation": ("crop", "flip", "shift", "drop_path"),
        "optimiser": (
            "batch_size", "accumulate", "lr", "blr", "min_lr", "warmup", "weight_decay", "clip",
        ),
        "machine": (
            "device", "precision", "compile", "checkpoint_gradients", "threads", "workers",
            "save_every_s", "log_every",
        ),
    }  # fmt: skip

    data: str = Field(
        description="class folders, parquet files, .tar shards, or a name on the Hugging Face hub"
    )
    out: Path | None = Field(
        None, description="folder to write the run to; required, except with --dry-run"
    )
    resume: bool = Field(False, description="continue from the checkpoint in --out")
    resume_or_begin: bool = Field(
        False,
        description="continue if --out has a checkpoint, else begin; for launchers that restart"
        " the same command",
    )
    dry_run: bool = Field(
        False, description="print model, budgets, cost and an estimate of the time; do not train"
    )

    split: str = Field("train", description="split of --data to train on")
    stream: bool = Field(False, description="read the data sequentially, without loading it whole")
    epoch_size: int | None = Field(
        None, ge=1, description="images per epoch; required with --stream"
    )

    image_size: int | None = Field(
        None,
        ge=1,
        description="side of the model's square input, in pixels; default: 224, or as --init",
    )
    patch_size: int | None = Field(
        None,
        ge=1,
        description="side of a patch, in pixels; default: 16, or as --init; another size resizes"
        " the kernel of --init",
    )
    width: int = Field(192, ge=4, description="token width: DeiT-Ti 192, ViT-S 384, ViT-B 768")
    depth: int = Field(12, ge=1, description="number of blocks")
    heads: int = Field(
        3, ge=1, description="attention heads; with --init, only if its files do not state them"
    )

    crop: float = Field(
        0.0, ge=0, le=1, description="smallest share of the area a random crop keeps; 0 = off"
    )
    flip: bool = Field(True, description="mirror half of the images")
    shift: int = Field(
        0, ge=0, description="largest random shift in each direction, in pixels; 0 = off"
    )
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth: drop rate of the last block; 0 = off"
    )

    epochs: int = Field(100, ge=1, description="passes over the training images")
    stop_after: int | None = Field(
        None, ge=1, description="stop after this many epochs, to be continued with --resume"
    )
    batch_size: int = Field(64, ge=1, description="images per step, over all processes")
    accumulate: int = Field(
        1, ge=1, description="micro-batches per step and process; more need less memory"
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate; default: from --blr")
    blr: float = Field(5e-4, gt=0, description="peak learning rate per 256 images of a step")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the run")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the run spent on warm-up")
    weight_decay: float = Field(
        0.05,
        ge=0,
        description="weight decay of matrices; biases, norms and single tokens have none",
    )
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 = unlimited")

    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="random seed of weights, order, crops, masks, budgets and hold-out",
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    precision: Precision = Field("fp32", description=PRECISION_HELP)
    compile: bool = Field(False, description="compile the blocks with torch.compile")
    checkpoint_gradients: bool = Field(
        False,
        description="keep less in memory: compute each block again in the backward pass, one more"
        " forward pass a step",
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0 = torch's default")
    workers: int = Field(
        0, ge=0, description="loader processes, for data that do not fit into memory"
    )
    save_every_s: float = Field(
        600, gt=0, description="seconds between checkpoints within an epoch"
    )
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")

    @model_validator(mode="after")
    def _decide_whether_to_resume(self) -> Self:
        """Resume if there is a checkpoint; before any process can have written one in this run."""
        if self.resume_or_begin and self.out is not None:
            self.resume = self.resume or (find_checkpoint(self.out) / "config.json").exists()
        return self

    @model_validator(mode="after")
    def _check_flags(self) -> Self:
        if self.out is None and not self.dry_run:
            raise ValueError("--out: Field required (except with --dry-run)")
        if self.stream and self.epoch_size is None:
            raise ValueError("--stream needs --epoch-size: a stream has no length of its own")
        if self.epoch_size is not None and not self.stream:
            raise ValueError("--epoch-size is only for --stream: other data have their own length")
        if self.min_lr > self.peak_lr:
            raise ValueError(f"--min-lr {self.min_lr} is above the peak, {self.peak_lr:.3g}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size {self.batch_size} cannot be divided into --accumulate"
                f" {self.accumulate} micro-batches"
            )
        return self

    @property
    def folder(self) -> Path:
        """The folder of the run; only a dry run may lack one."""
        assert self.out is not None
        return self.out

    def config(self, classes: int, **changes: Any) -> ViTConfig:
        """Return the configuration of a new model with these sizes."""
        changes.setdefault("reduction_points", reduction_points(self.depth))
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
        """Return the preprocessing of a model that starts from random weights."""
        return Preprocess(
            image_size=size,
            resize=size if size < 64 else round(size / 0.875),  # ImageNet's 256 for 224
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )

    def decoding(self, preprocess: Preprocess) -> Preprocess:
        """Return how training images are decoded: with random crops, the whole resized square."""
        if not self.crop:
            return preprocess
        return replace(preprocess, image_size=preprocess.resize)

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of warm-up."""
        return self.lr if self.lr is not None else self.blr * self.batch_size / 256

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the arithmetic on this device."""
        return choose_dtype(self.precision, self.device)
