"""A model's scores per budget on labelled images: what tiers are chosen by.

Budgets answer the same images, so that their accuracies are compared image by image: a difference
may be certain where the two accuracies' own intervals overlap. It knows a model, pixels and labels,
not what answers are worth (`score`); it changes nothing, and what the `random` rule draws depends
on an image's row alone.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import CliPositionalArg, NoDecode
from torch import Tensor
from tqdm import tqdm

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import Geometry, exact
from pcae_serve.errors import PcaeError
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages, load
from pcae_training.import_weights import load_checkpoint
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.output import check_place, write_whole
from pcae_training.sample_rng import generator
from pcae_training.score import LEAST_CLASSES_FOR_TOP5, Difference, Score, Top1
from pcae_training.world import World, join

#: The keep ratios of the paper's tables.
PAPER_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 pixels [B, 3, H, W] to the float32 images a model takes."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1).to(pixels.device, non_blocking=True)
        for values in (preprocess.mean, preprocess.std)
    )
    return (pixels.float() / 255 - mean) / std


def row_noise(config: ViTConfig, rows: Iterable[int], device: torch.device) -> Tensor | None:
    """What the `random` rule ranks by, [B, patches]: by an image's row, whatever its batch.

    None under other rules.
    """
    if config.reduction != "random":
        return None
    patches = config.geometry.patches
    noise = [torch.rand(patches, generator=generator("evaluate", row)) for row in rows]
    return torch.stack(noise).to(device, non_blocking=True)


@torch.inference_mode()
def evaluate(
    model: VisionTransformer,
    images: LabelledImages,
    rows: Sequence[int],
    budgets: Iterable[float],
    *,
    batch_size: int = 250,
    precision: torch.dtype = torch.float32,
    workers: int = 0,
) -> dict[float, Score]:
    """Scores of `model` at every keep ratio in `budgets`, on the given rows of `images`.

    Each image is decoded once. workers: loader processes for images that are not in memory.
    """
    config, device = model.config, model.pos_embed.device
    none = Score.of(torch.empty(0, config.classes, device=device), torch.empty(0, device=device))
    parts = {budget: [none] for budget in budgets}  # a process may have no row to itself
    was_training, done = model.training, 0
    model.eval()
    try:
        with tqdm(total=len(rows), desc="evaluating", unit="img", leave=False) as bar:
            for pixels, labels in images.batches(rows, batch_size, workers):
                batch = normalise(pixels.to(device, non_blocking=True), images.preprocess)
                labels = labels.to(device, non_blocking=True)
                noise = row_noise(config, rows[done : done + len(labels)], device)
                for budget, scores in parts.items():
                    counts = config.geometry.counts(budget)
                    with torch.autocast(device.type, precision, precision != torch.float32):
                        logits = model(batch, counts, noise=noise)
                    scores.append(Score.of(logits, labels))
                done += len(labels)
                bar.update(len(labels))
    finally:
        model.train(was_training)
    return {budget: Score.joined(scores) for budget, scores in parts.items()}


def together(parts: Sequence[dict[float, Score]]) -> dict[float, Score]:
    """The scores of several processes as one's, in the order of the parts."""
    return {budget: Score.joined([part[budget] for part in parts]) for budget in parts[0]}


def read_ratios(value: object) -> tuple[float, ...]:
    """Keep ratios written as one text with commas, or as numbers: each once, from the largest.

    Raises ValueError on what is no keep ratio in (0, 1].
    """
    if isinstance(value, str):
        value = value.strip("[]()").split(",")
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"keep ratios are numbers with commas between, not {value!r}")
    return tuple(sorted({float(exact(ratio)) for ratio in value}, reverse=True))


#: Keep ratios as a flag takes them; None: what the checkpoint was trained for.
Ratios = Annotated[tuple[float, ...] | None, NoDecode, BeforeValidator(read_ratios)]


class EvaluateSettings(BaseModel):
    """Measure a checkpoint at several token budgets, on labelled images."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    checkpoint: CliPositionalArg[Path] = Field(description="folder written by pcae-train")
    data: str = Field(description="class folders, parquet or a hub name")
    split: str = Field("test", description="split of --data")
    budgets: Ratios = Field(
        None, description="keep ratios, as 1.0,0.8,.6; default: those trained for"
    )
    json_file: Path | None = Field(
        None, alias="json", description="also write the numbers to this file"
    )
    batch_size: int = Field(250, ge=1, description="images at a time")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs under autocast")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = torch's choice")
    workers: int = Field(0, ge=0, description="loader processes")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Evaluation:
    """Scores with what they are of; as text it is a table with a line per budget."""

    data: str
    geometry: Geometry
    scores: dict[float, Score]  # from the largest keep ratio, with which the others are compared

    @property
    def n(self) -> int:
        return next(iter(self.scores.values())).n

    def differences(self) -> dict[float, Difference]:
        """Top-1 of every smaller budget less that of the largest."""
        largest, *smaller = self.scores
        return {ratio: self.scores[ratio].against(self.scores[largest]) for ratio in smaller}

    def macs(self, ratio: float) -> int:
        return self.geometry.macs(self.geometry.counts(ratio))

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON: shares and differences in [0, 1], a list entry per budget.

        `wrong` are the images whose answer was wrong, by their place in the data.
        """
        differences = self.differences()
        return {
            "data": self.data,
            "n": self.n,
            "budgets": [
                {
                    "keep_ratio": ratio,
                    "patches": self.geometry.counts(ratio),
                    "macs": self.macs(ratio),
                    "top1": _share(score.top1),
                    "top5": _share(score.top5),
                    "calibration_error": score.calibration_error,
                    "top1_difference": _share(differences.get(ratio)),
                    "wrong": (~score.correct).nonzero().flatten().tolist(),
                }
                for ratio, score in self.scores.items()
            ],
        }

    def __str__(self) -> str:
        largest, differences = next(iter(self.scores)), self.differences()
        rows = [
            (
                "keep",
                "patches left",
                "GMACs",
                "top-1 % [95 %]",
                "top-5 %",
                "ECE %",
                f"top-1 against keep {largest:g} [95 %]",
            )
        ]
        for ratio, score in self.scores.items():
            low, high = (100 * bound for bound in score.top1.interval)
            rows.append(
                (
                    f"{ratio:g}",
                    ", ".join(map(str, self.geometry.counts(ratio))),
                    f"{self.macs(ratio) / 1e9:.3f}",
                    f"{100 * score.top1.value:.2f} [{low:.2f}, {high:.2f}]",
                    "-" if score.top5 is None else f"{100 * score.top5.value:.2f}",
                    f"{100 * score.calibration_error:.2f}",
                    str(differences.get(ratio, "-")),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if self.geometry.classes < LEAST_CLASSES_FOR_TOP5:
            lines.append(f"top-5 says nothing about {self.geometry.classes} classes")
        return "\n".join([f"{self.n:,} images of {self.data}", *lines])


def run_evaluation(settings: EvaluateSettings) -> Evaluation | None:
    """Measure a checkpoint; None in all processes but the main one, where torchrun started several.

    Raises PcaeError where checkpoint, data and budgets do not fit, before anything is measured.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    checkpoint = load_checkpoint(settings.checkpoint).build(settings.checkpoint)
    budgets = ratios_for(checkpoint, settings.budgets)
    if settings.json_file is not None:
        check_place(settings.json_file)
    images = load(settings.data, settings.split, checkpoint.preprocess)
    check_labels(checkpoint, images)
    with join(settings.device) as world:
        scores = _measured(checkpoint, images, budgets, settings, world)
        if not world.main:
            return None
    evaluation = Evaluation(images.name, checkpoint.model.config.geometry, scores)
    if settings.json_file is not None:
        content = {"checkpoint": str(settings.checkpoint)} | evaluation.to_json()
        write_whole(settings.json_file, (json.dumps(content, indent=2) + "\n").encode())
    return evaluation


def ratios_for(checkpoint: Checkpoint, asked: tuple[float, ...] | None) -> tuple[float, ...]:
    """The keep ratios asked for, else those of the training, else the paper's; largest first.

    Raises PcaeError where one of them leaves this model no patch.
    """
    trained = checkpoint.training.get("settings", {})
    ratios = asked
    if ratios is None and trained.get("keep") is not None:
        ratios = (trained["keep"],)
    ratios = ratios or tuple(sorted(trained.get("budgets") or PAPER_RATIOS, reverse=True))
    try:
        for ratio in ratios:
            checkpoint.model.config.geometry.counts(ratio)
    except ValueError as error:
        raise PcaeError(f"--budgets: {error}") from None
    return ratios


def check_labels(checkpoint: Checkpoint, images: LabelledImages) -> None:
    """Raise PcaeError unless the images' classes are the checkpoint's, in the same order."""
    found, wanted = images.classes, checkpoint.labels
    if not wanted:
        raise PcaeError("the checkpoint has no classes: fine-tune it before it is evaluated")
    if len(found) != len(wanted):
        raise PcaeError(
            f"{images.name} has {len(found)} classes, the checkpoint {len(wanted)}: give data with"
            " the classes it was trained on"
        )
    for i, (label, other) in enumerate(zip(found, wanted, strict=True)):
        if label != other:
            raise PcaeError(
                f"class {i} of {images.name} is {label!r}, but {other!r} in the checkpoint: give"
                " data with the classes it was trained on, in the same order"
            )


def _measured(
    checkpoint: Checkpoint,
    images: LabelledImages,
    budgets: Sequence[float],
    settings: EvaluateSettings,
    world: World,
) -> dict[float, Score]:
    """Scores on all images in their order, of which every process measures a stretch."""
    first, end = (len(images) * rank // world.size for rank in (world.rank, world.rank + 1))
    own = evaluate(
        checkpoint.model.to(world.device),
        images,
        range(first, end),
        budgets,
        batch_size=settings.batch_size,
        precision=settings.dtype,
        workers=settings.workers,
    )
    return together(world.gather(own))


def _share(share: Top1 | Difference | None) -> dict[str, Any] | None:
    return None if share is None else {"value": share.value, "interval": share.interval}
