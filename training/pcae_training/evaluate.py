"""Evaluate a model at several budgets on labelled images.

All budgets classify the same images, so their accuracies are compared image by image: a difference
can be significant even if the intervals of the two accuracies overlap. The `random` rule's draws
depend on an image's row alone.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_settings import CliPositionalArg, NoDecode
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import parse_keep_ratio
from pcae_serve.errors import PcaeError
from pcae_serve.flags import Metavar
from pcae_serve.sources.locate import locate_checkpoint
from pcae_serve.sources.names import ModelName, public_name
from pcae_training.checkpoint import Checkpoint
from pcae_training.class_report import ClassReport
from pcae_training.confusion_image import draw_confusion
from pcae_training.data import LabelledImages, load
from pcae_training.data_settings import DataSettings
from pcae_training.evaluation import Evaluation
from pcae_training.import_weights import WeightsChoice, build_checkpoint, load_checkpoint
from pcae_training.inventory import print_inventory, print_lines
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.number_format import (
    PRECISION_HELP,
    Precision,
    choose_dtype,
    describe_slow,
)
from pcae_training.output import check_writable, write_whole
from pcae_training.predictions import check_predictions, write_predictions
from pcae_training.progress import Progress
from pcae_training.sample_rng import generator
from pcae_training.score import Score
from pcae_training.task import AnyScore, choose_task, join_parts
from pcae_training.world import World, join

#: The keep ratios of the paper's tables.
PAPER_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return the float32 model input of uint8 pixels [B, 3, H, W]."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1).to(pixels.device, non_blocking=True)
        for values in (preprocess.mean, preprocess.std)
    )
    return (pixels.float() / 255 - mean) / std


def row_noise(config: ViTConfig, rows: Iterable[int], device: torch.device) -> Tensor | None:
    """Return the `random` rule's ranking noise [B, patches], which depends on the row alone.

    Return None for other rules.
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
) -> dict[float, AnyScore]:
    """Return the scores of `model` at every keep ratio in `budgets` on the given rows of `images`.

    Each image is decoded once. workers: loader processes for images that are not in memory.
    """
    config, device, task = model.config, model.device, choose_task(images.several)
    none = task.score(torch.empty(0, config.classes).to(device), images.labels[:0].to(device))
    parts = {budget: [none] for budget in budgets}  # a process may have no rows
    was_training, done = model.training, 0
    model.eval()
    try:
        with Progress("evaluating", len(rows)) as progress:
            for pixels, labels in images.batches(rows, batch_size, workers):
                batch = normalise(pixels.to(device, non_blocking=True), images.preprocess)
                labels = labels.to(device, non_blocking=True)
                used = [images.row(index) for index in rows[done : done + len(labels)]]
                noise = row_noise(config, used, device)
                for budget, scores in parts.items():
                    counts = config.geometry.counts(budget)
                    with torch.autocast(device.type, precision, precision != torch.float32):
                        logits = model(batch, counts, noise=noise)
                    scores.append(task.score(logits, labels))
                done += len(labels)
                progress.update(len(labels))
    finally:
        model.train(was_training)
    return {budget: join_parts(scores) for budget, scores in parts.items()}


def join_scores(parts: Sequence[dict[float, AnyScore]]) -> dict[float, AnyScore]:
    """Concatenate the scores of several processes, by budget, in the order of `parts`."""
    return {budget: join_parts([part[budget] for part in parts]) for budget in parts[0]}


def read_ratios(value: object) -> tuple[float, ...]:
    """Parse keep ratios, a comma-separated text or numbers; return each once, from the largest.

    Raise ValueError unless each is in (0, 1].
    """
    if isinstance(value, str):
        value = value.strip("[]()").split(",")
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"keep ratios must be numbers separated by commas, not {value!r}")
    return tuple(sorted({float(parse_keep_ratio(ratio)) for ratio in value}, reverse=True))


#: Keep ratios of a flag; None for those that the checkpoint was trained for.
Ratios = Annotated[tuple[float, ...] | None, NoDecode, BeforeValidator(read_ratios)]


class EvaluateSettings(DataSettings):
    """Evaluate a checkpoint at several token budgets on labelled images."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    checkpoint: Annotated[CliPositionalArg[ModelName], Metavar("CHECKPOINT")] = Field(
        description="run or checkpoint of pcae-train, a Hugging Face or timm folder, or a name on"
        " the hub"
    )
    data: str = Field(description="class folders, parquet files or a name on the Hugging Face hub")
    weights: WeightsChoice | None = Field(
        None,
        description="which weights to take from a file with raw and averaged ones; default:"
        " the averaged ones, ema",
    )
    split: str = Field("test", description="split of --data")
    budgets: Ratios = Field(
        None, description="keep ratios separated by commas; default: those trained for"
    )
    json_file: Path | None = Field(
        None, alias="json", description="also write the figures to this JSON file"
    )
    confusion: Path | None = Field(
        None,
        description="also draw the confusion matrix of the largest budget into this .png file",
    )
    predictions: Path | None = Field(
        None,
        description="also write the answer to each image into this .parquet or .csv file",
    )
    batch_size: int = Field(250, ge=1, description="images per batch")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    precision: Precision = Field("fp32", description=PRECISION_HELP)
    threads: int = Field(0, ge=0, description="CPU threads; 0 = torch's default")
    workers: int = Field(
        0, ge=0, description="loader processes, for data that do not fit into memory"
    )

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the arithmetic on this device."""
        return choose_dtype(self.precision, self.device)


def run_evaluation(settings: EvaluateSettings) -> Evaluation | None:
    """Evaluate a checkpoint. Return None in processes of torchrun other than the main one.

    Raise PcaeError if checkpoint, data and budgets do not fit together, before evaluating.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if slow := describe_slow(settings.precision, settings.device):
        print_lines(slow)
    path = locate_checkpoint(settings.checkpoint, print_lines)
    checkpoint = open_checkpoint(path, settings.weights)
    budgets = choose_ratios(checkpoint, settings.budgets)
    for file in (settings.json_file, settings.confusion):
        if file is not None:
            check_writable(file)
    if settings.confusion is not None and settings.confusion.suffix.lower() != ".png":
        raise PcaeError(f"--confusion {settings.confusion} must end with .png")
    if settings.predictions is not None:
        check_predictions(settings.predictions)
    images = load(
        settings.data,
        settings.split,
        checkpoint.preprocess,
        max_unreadable=settings.max_unreadable,
        **settings.columns,
    )
    check_labels(checkpoint, images)
    if images.several and settings.confusion is not None:
        raise PcaeError(f"{images.name} has lists of labels, which --confusion cannot draw")
    print_inventory(images.inventory)
    images = images.readable()
    with join(settings.device) as world:
        precision = describe_precision(checkpoint.model, settings.dtype)
        scores = _measure(checkpoint, images, budgets, settings, world)
        if not world.main:
            return None
    rows = [images.row(index) for index in range(len(images))]
    names = checkpoint.labels
    geometry = checkpoint.model.config.geometry
    evaluation = Evaluation(images.name, geometry, scores, precision, rows, names)
    if settings.predictions is not None:
        places = [images.place(index) for index in range(len(images))]
        write_predictions(settings.predictions, scores, names, rows, places)
    if settings.confusion is not None:
        ratio, score = next(iter(scores.items()))
        assert isinstance(score, Score)  # checked above
        title = f"{images.name}, keep {ratio:g}"
        write_whole(settings.confusion, draw_confusion(ClassReport.of(score, names), title))
    if settings.json_file is not None:
        content = {"checkpoint": public_name(settings.checkpoint)} | evaluation.to_json()
        content["inventory"] = images.inventory.to_json()
        write_whole(settings.json_file, (json.dumps(content, indent=2) + "\n").encode())
    return evaluation


def open_checkpoint(path: Path, weights: WeightsChoice | None) -> Checkpoint:
    """Load a checkpoint of any format, and print what was chosen in it.

    Raise CheckpointError if it cannot be used.
    """
    found = load_checkpoint(path, weights=weights)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return build_checkpoint(found, path)


def describe_precision(model: VisionTransformer, precision: torch.dtype) -> str:
    """Return a line on number formats if they make a difference to the exported bundle, else ""."""
    exact_in_half = all(torch.equal(w, w.half().float()) for w in model.state_dict().values())
    if exact_in_half and precision == torch.float32:
        return ""
    arithmetic = "float32" if precision == torch.float32 else "bfloat16 (autocast)"
    return (
        f"computed in {arithmetic} with float32 weights; a bundle stores float16 weights, so its"
        " accuracy can differ by the images closest to a decision boundary"
    )


def choose_ratios(checkpoint: Checkpoint, requested: tuple[float, ...] | None) -> tuple[float, ...]:
    """Return the requested keep ratios, else those trained for, else the paper's; largest first.

    Raise PcaeError if one of them leaves no patch.
    """
    trained = checkpoint.training.get("settings", {})
    ratios = requested
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
    """Number the images' classes as the checkpoint does. Raise PcaeError if it lacks one."""
    wanted = checkpoint.labels
    if not wanted and checkpoint.model.config.classes:
        raise PcaeError("the checkpoint does not name its classes (id2label in its config.json)")
    if not wanted:
        raise PcaeError("the checkpoint has no classes; fine-tune it before evaluating it")
    if checkpoint.multi_label != images.several:
        kinds = ("one class", "any number of labels")
        own, theirs = kinds if images.several else reversed(kinds)
        raise PcaeError(f"the checkpoint gives {own} an image, and {images.name} has {theirs}")
    images.align(wanted)


def _measure(
    checkpoint: Checkpoint,
    images: LabelledImages,
    budgets: Sequence[float],
    settings: EvaluateSettings,
    world: World,
) -> dict[float, AnyScore]:
    """Return the scores on all images in order; every process evaluates a contiguous part."""
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
    return join_scores(world.gather(own))
