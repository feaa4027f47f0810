"""Accuracy and calibration per budget, with intervals: what tiers are chosen by.

Budgets answer the same images, so that their accuracies are compared image by image: a difference
may be certain where the two accuracies' own intervals overlap. It knows a model, pixels and labels;
it changes nothing, and what the `random` rule draws depends on an image's row alone.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import CliPositionalArg, NoDecode
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from pcae_serve.errors import PcaeError
from pcae_serve.preprocess import Preprocess
from pcae_serve.tokens import Geometry, exact
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages, load
from pcae_training.draws import generator
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.world import World, join

#: Confidence bins of the calibration error, of equal width (Guo et al. 2017).
BINS = 15

#: Below so many classes the label is among the five highest logits whatever the model says.
LEAST_CLASSES_FOR_TOP5 = 6

#: The keep ratios of the paper's tables.
PAPER_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)

_Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Top1:
    """Share of images answered rightly, with a 95 % Wilson interval."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        bounds = binomtest(self.correct, self.n).proportion_ci(0.95, method="wilson")
        return float(bounds.low), float(bounds.high)

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        return f"{100 * self.value:.2f} % [{low:.2f}, {high:.2f}] of {self.n:,}"


@dataclass(frozen=True)
class Difference:
    """One budget's top-1 less another's, on the same n images, with a 95 % interval."""

    gained: int  # images that only the one answers rightly
    lost: int  # images that only the other does
    n: int

    @property
    def value(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wald's for paired proportions after one more image either way (Bonett and Price 2012).

        Without the two images it would be of no width where both answer alike, and too narrow
        where nearly so.
        """
        n = self.n + 2
        centre = (self.gained - self.lost) / n
        variance = (self.gained + self.lost + 2) / n - centre**2
        half = _Z_95 * (variance / n) ** 0.5
        return max(-1.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        return f"{100 * self.value:+.2f} [{low:+.2f}, {high:+.2f}] points"


@dataclass(frozen=True, eq=False)
class Score:
    """One budget's answers, image by image; scores of other images add up with `+`."""

    correct: Tensor  # [n] bool: the label has the highest logit
    among_five: Tensor | None  # [n] bool: one of the five highest; None below six classes
    confidence: Tensor  # [n] float32: the answer's probability

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Score":
        """Of logits [n, classes] and labels [n], on their device: nothing waits for it."""
        among_five = None
        if logits.shape[1] >= LEAST_CLASSES_FOR_TOP5:
            among_five = (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1)
        confidence = logits.float().softmax(dim=1).amax(dim=1)
        return cls(logits.argmax(dim=1) == labels, among_five, confidence)

    @classmethod
    def joined(cls, parts: Sequence["Score"]) -> "Score":
        """The parts' images one after the other, on the CPU. Raises ValueError on no part."""
        if not parts:
            raise ValueError("no scores to join")
        five = [part.among_five for part in parts if part.among_five is not None]
        return cls(
            torch.cat([part.correct for part in parts]).cpu(),
            torch.cat(five).cpu() if five else None,
            torch.cat([part.confidence for part in parts]).cpu(),
        )

    def __add__(self, other: "Score") -> "Score":
        return Score.joined([self, other])

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def top1(self) -> Top1:
        return Top1(int(self.correct.sum()), self.n)

    @property
    def top5(self) -> Top1 | None:
        """Share of images whose label is among the five highest logits; None below six classes."""
        if self.among_five is None:
            return None
        return Top1(int(self.among_five.sum()), self.n)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in [0, 1] (Guo et al., arXiv 1706.04599, equation 3).

        The mean distance between confidence and accuracy, over BINS bins that hold confidences
        above their lower edge, up to and with their upper one.
        """
        edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
        confidence = self.confidence.double()
        bins = torch.bucketize(confidence, edges)
        gaps = torch.bincount(bins, weights=confidence - self.correct.double(), minlength=BINS)
        return float(gaps.abs().sum()) / self.n

    def against(self, other: "Score") -> Difference:
        """Top-1 less that of `other` on the same images. Raises ValueError on fewer or more."""
        if self.n != other.n:
            raise ValueError(f"{self.n} answers cannot be paired with {other.n}")
        return Difference(
            gained=int((self.correct & ~other.correct).sum()),
            lost=int((other.correct & ~self.correct).sum()),
            n=self.n,
        )


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


def _ratios(value: object) -> object:
    """Keep ratios written as one text with commas, or as numbers: each once, from the largest."""
    if isinstance(value, str):
        value = value.strip("[]()").split(",")
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"keep ratios are numbers with commas between, not {value!r}")
    return tuple(sorted({float(exact(ratio)) for ratio in value}, reverse=True))


#: Keep ratios as a flag takes them; None: what the checkpoint was trained for.
Ratios = Annotated[tuple[float, ...] | None, NoDecode, BeforeValidator(_ratios)]


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
    checkpoint = checkpoints.load(settings.checkpoint)
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


def check_place(file: Path) -> None:
    """Raise PcaeError where `write_whole` could not write `file`, as far as can be told before."""
    there = next(parent for parent in file.absolute().parents if parent.exists())
    if file.is_dir():
        raise PcaeError(f"cannot write {file}: it is a folder")
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PcaeError(f"cannot write {file}: {there} is no folder that can be written to")


def write_whole(file: Path, content: bytes) -> None:
    """Write `file` beside its place, then put it there: never half. Raises PcaeError."""
    fresh = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_bytes(content)
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise PcaeError(f"cannot write {file}: {error.strerror or error}") from None


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
