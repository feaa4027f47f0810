"""Probe a frozen model: how well simple readouts of its features classify, by keep ratio.

k-nearest neighbours, ridge and logistic regression are trained on the features of the images of
--data and measured on images held out. The same readouts of small pixels are the trivial baseline.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from pydantic_settings import CliPositionalArg, NoDecode
from torch import Tensor
from torch.nn import functional as F

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import Geometry
from pcae_serve.errors import PcaeError
from pcae_serve.flags import Metavar
from pcae_serve.sources.locate import locate_checkpoint
from pcae_serve.sources.names import ModelName, public_name
from pcae_training.data import LabelledImages, load
from pcae_training.data_settings import DataSettings
from pcae_training.evaluate import Ratios, choose_ratios
from pcae_training.frozen_features import compute_features
from pcae_training.holdout_settings import HoldoutSettings, divide
from pcae_training.import_weights import WeightsChoice, build_checkpoint, load_checkpoint
from pcae_training.interval_text import percent
from pcae_training.inventory import print_inventory, print_lines
from pcae_training.number_format import (
    PRECISION_HELP,
    Precision,
    describe_slow,
)
from pcae_training.output import check_writable, write_whole
from pcae_training.readouts import Method, predict
from pcae_training.score import Difference, Score, Top1
from pcae_training.text_table import align_columns
from pcae_training.world import join

METHODS: tuple[Method, ...] = get_args(Method)
#: Side of the pixels that are the baseline.
BASELINE_SIZE = 16


def _split_methods(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


class ProbeSettings(HoldoutSettings, DataSettings):
    """Measure what a frozen model's features hold, without training it.

    Readouts are trained on --data and measured on images held out of it, or on --eval-data.
    """

    model_config: ClassVar[Any] = {"validate_by_name": True, "validate_by_alias": True}

    checkpoint: Annotated[CliPositionalArg[ModelName], Metavar("CHECKPOINT")] = Field(
        description="run or checkpoint of pcae-train, a Hugging Face or timm folder, or a name on"
        " the hub"
    )
    data: str = Field(description="class folders, parquet files or a name on the Hugging Face hub")
    split: str = Field("train", description="split of --data")
    weights: WeightsChoice | None = Field(
        None,
        description="which weights to take from a file with raw and averaged ones; default:"
        " the averaged ones, ema",
    )
    budgets: Ratios = Field(
        None, description="keep ratios separated by commas; default: those trained for"
    )
    methods: Annotated[tuple[Method, ...], NoDecode, BeforeValidator(_split_methods)] = Field(
        METHODS, min_length=1, description="readouts, separated by commas"
    )
    neighbours: int = Field(20, ge=1, description="for knn: number of neighbours")
    json_file: Path | None = Field(
        None, alias="json", description="also write the figures to this JSON file"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="random seed of the hold-out")
    batch_size: int = Field(250, ge=1, description="images per batch")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    precision: Precision = Field("fp32", description=PRECISION_HELP)
    threads: int = Field(0, ge=0, description="CPU threads; 0 = torch's default")
    workers: int = Field(
        0, ge=0, description="loader processes, for data that do not fit into memory"
    )


@dataclass(frozen=True)
class Features:
    """What a readout is trained on and measured on; tensors of features and labels."""

    train: Tensor  # float32 [n, D]
    labels: Tensor  # int64 [n]
    held: Tensor  # float32 [m, D]
    held_labels: Tensor  # int64 [m]

    def score(self, method: Method, neighbours: int) -> Score:
        """Train a readout and return which held-out images it classifies correctly."""
        predicted = predict(
            method, self.train.numpy(), self.labels.numpy(), self.held.numpy(), neighbours
        )
        answers = torch.from_numpy(np.asarray(predicted))
        return Score(self.held_labels, answers, None, torch.ones(len(answers)))


@dataclass(frozen=True)
class Probe:
    """Held-out top-1 of each readout, by keep ratio; as text, a table with a line per ratio."""

    data: str
    trained_on: int
    geometry: Geometry
    scores: dict[float, dict[Method, Score]]  # from the largest keep ratio
    baseline: dict[Method, Score]  # of small pixels

    @property
    def n(self) -> int:
        return next(iter(self.baseline.values())).n

    def difference(self, ratio: float, method: Method) -> Difference:
        """Return top-1 minus that of the same readout at the largest keep ratio."""
        largest = next(iter(self.scores.values()))
        return self.scores[ratio][method].against(largest[method])

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON: shares and differences in [0, 1]."""
        return {
            "data": self.data,
            "trained_on": self.trained_on,
            "n": self.n,
            "baseline_pixels": {m: _share(score.top1) for m, score in self.baseline.items()},
            "budgets": [
                {
                    "keep_ratio": ratio,
                    "patches": self.geometry.counts(ratio),
                    "macs": self.geometry.macs(self.geometry.counts(ratio)),
                    "top1": {m: _share(score.top1) for m, score in scores.items()},
                    "top1_difference": {m: _share(self.difference(ratio, m)) for m in scores},
                }
                for ratio, scores in self.scores.items()
            ],
        }

    def __str__(self) -> str:
        methods = list(self.baseline)
        rows = [("keep", "GMACs", *(f"{method} top-1 % [95 %]" for method in methods))]
        for ratio, scores in self.scores.items():
            macs = self.geometry.macs(self.geometry.counts(ratio))
            cells = (_text(scores[method]) for method in methods)
            rows.append((f"{ratio:g}", f"{macs / 1e9:.3f}", *cells))
        cells = (_text(self.baseline[method]) for method in methods)
        rows.append(("pixels", "-", *cells))
        title = f"{self.n:,} held-out images of {self.data}, readouts of {self.trained_on:,}"
        return "\n".join([title, *align_columns(rows)])


def run_probe(settings: ProbeSettings) -> Probe:
    """Probe a checkpoint. Raise PcaeError if it and the data do not fit together."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if slow := describe_slow(settings.precision, settings.device):
        print_lines(slow)
    if settings.json_file is not None:
        check_writable(settings.json_file)
    path = locate_checkpoint(settings.checkpoint, print_lines)
    found = load_checkpoint(path, weights=settings.weights)
    print_lines(*(f"note: {note}" for note in found.notes))
    checkpoint = build_checkpoint(found.drop_head(), path)
    budgets = choose_ratios(checkpoint, settings.budgets)
    train, held = _images(settings, checkpoint.preprocess)
    scores: dict[float, dict[Method, Score]] = {ratio: {} for ratio in budgets}
    with join(settings.device) as world:
        checkpoint.model.to(world.device)
        both = [
            compute_features(
                checkpoint,
                images,
                budgets,
                batch_size=settings.batch_size,
                precision=settings.precision,
                workers=settings.workers,
            )
            for images in (train, held)
        ]
    for ratio in budgets:
        features = Features(both[0][ratio], train.labels, both[1][ratio], held.labels)
        for method in settings.methods:
            scores[ratio][method] = features.score(method, settings.neighbours)
    pixels = Features(_pixels(train), train.labels, _pixels(held), held.labels)
    baseline = {method: pixels.score(method, settings.neighbours) for method in settings.methods}
    probe = Probe(held.name, len(train), checkpoint.model.config.geometry, scores, baseline)
    if settings.json_file is not None:
        content = {"checkpoint": public_name(settings.checkpoint)} | probe.to_json()
        write_whole(settings.json_file, (json.dumps(content, indent=2) + "\n").encode())
    return probe


def _images(
    settings: ProbeSettings, preprocess: Preprocess
) -> tuple[LabelledImages, LabelledImages]:
    """Return the images to train readouts on and those to measure them on."""
    options: dict[str, Any] = {"max_unreadable": settings.max_unreadable, **settings.columns}
    images = load(settings.data, settings.split, preprocess, **options)
    if images.several:
        raise PcaeError(f"{images.name} has lists of labels; probe needs one class an image")
    print_inventory(images.inventory)
    if settings.eval_data is None:
        split = divide(settings, images, settings.seed)
        return images.subset(split.train).readable(), images.subset(split.holdout).readable()
    held = load(settings.eval_data, settings.eval_split, preprocess, **options)
    held.align(images.classes)
    print_inventory(held.inventory)
    return images.readable(), held.readable()


def _pixels(images: LabelledImages) -> Tensor:
    """Return all images as small pixels, float32 [n, 3 * BASELINE_SIZE^2] in [0, 1]."""
    size = (BASELINE_SIZE, BASELINE_SIZE)
    small = [
        F.interpolate(pixels.float() / 255, size=size, mode="area").flatten(1)
        for pixels, _ in images.batches(range(len(images)), 250)
    ]
    return torch.cat(small)


def _text(score: Score) -> str:
    return percent(score.top1.value, score.top1.interval)


def _share(share: Top1 | Difference) -> dict[str, Any]:
    return {"value": share.value, "interval": share.interval}
