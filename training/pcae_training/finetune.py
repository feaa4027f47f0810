"""Fine-tune a ViT on labels: at one keep ratio as in the paper, or one set of weights for all.

Elastic training (not in the paper): every step runs the largest and the smallest budget and some in
between. All are trained on the labels, the smaller ones also on the largest one's output (the
sandwich rule and in-place distillation of slimmable networks, arXiv 1903.05134).
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode
from torch import Tensor, nn
from torch.nn import functional as F

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import REDUCTION_POINTS, Rule
from pcae_serve.errors import PcaeError, one_line
from pcae_training.augment import Augmentation, Mixing
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages, TrainingData, load
from pcae_training.duplicates import find_duplicates
from pcae_training.evaluate import evaluate, join_scores, normalise, read_ratios
from pcae_training.holdout import default_holdout, hold_out
from pcae_training.import_weights import (
    LoadedCheckpoint,
    WeightsChoice,
    initialise,
    load_checkpoint,
)
from pcae_training.inventory import print_inventory, print_lines
from pcae_training.model import VisionTransformer
from pcae_training.plan import describe, fit_batch_size
from pcae_training.sample_rng import SampleRng, drop_path_factors, to_device
from pcae_training.schedule import keep_ratio_ramp, lowest_keep_ratio
from pcae_training.score import Score, Top1
from pcae_training.settings import RunSettings
from pcae_training.trainer import Trainer, check_out, parameter_groups, training_data
from pcae_training.world import World, join

#: Pixel statistics assumed for weights that come without their preprocessing.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


#: Images held out by default, of large data sets.
DEFAULT_HOLDOUT = 5000


class FinetuneSettings(RunSettings):
    """Fine-tune on labelled images, for one keep ratio or for all budgets.

    The defaults are MAE's recipe and the paper's ramp.
    """

    flag_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **RunSettings.flag_groups,
        "run": ("init", "weights", *RunSettings.flag_groups["run"]),
        "evaluation": ("eval_data", "eval_split", "holdout"),
        "token reduction": (
            "keep", "budgets", "sampling", "between", "distil", "ramp_start", "ramp_length",
            "reduction",
        ),
        "model": (*RunSettings.flag_groups["model"], "pooling"),
        "augmentation": (
            *RunSettings.flag_groups["augmentation"], "randaugment", "erase", "mixup", "cutmix",
            "label_smoothing",
        ),
        "optimiser": (*RunSettings.flag_groups["optimiser"], "layer_decay"),
    }  # fmt: skip

    init: Path | None = Field(
        None,
        description="weights to start from: a run or checkpoint of pcae-train, a Hugging Face or"
        " timm folder, a .pth or .safetensors file",
    )
    weights: WeightsChoice | None = Field(
        None,
        description="which weights to take from an --init with raw and averaged ones; default: the"
        " averaged ones, ema",
    )
    pooling: Literal["mean", "cls"] | None = Field(
        None,
        description="input of the head: mean of the patches or CLS; default: mean, or as --init",
    )
    eval_data: str | None = Field(
        None, description="evaluate on these images instead of images held out of --data"
    )
    eval_split: str = Field("validation", description="split of --eval-data")
    holdout: int | None = Field(
        None,
        ge=1,
        description="number of training images held out for evaluation, from each class by its"
        f" share; default: {DEFAULT_HOLDOUT:,}, or a fifth of the images if that is less",
    )

    keep: float | None = Field(
        None, gt=0, le=1, description="train for one keep ratio, as in the paper"
    )
    budgets: Annotated[tuple[float, ...], NoDecode, BeforeValidator(read_ratios)] = Field(
        (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
        description="keep ratios to train for, separated by commas",
    )
    sampling: Literal["sandwich", "one"] = Field(
        "sandwich",
        description="budgets per step; sandwich: the largest, the smallest and some between; one: a"
        " random one",
    )
    between: int = Field(
        1, ge=0, description="for sandwich: number of random budgets between the ends"
    )
    distil: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the smaller budgets' loss that is distilled from the largest budget's"
        " output; the rest is from the labels",
    )
    ramp_start: float = Field(
        0.10, ge=0, le=1, description="share of the run before anything is dropped"
    )
    ramp_length: float = Field(
        0.25, ge=0, le=1, description="share of the run over which the drop ratio rises"
    )
    reduction: Rule = Field("ptr", description="rule that ranks the patches")

    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the run")
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="learning rate of a layer over that of the layer above; default: 0.65 with"
        " --init, else 1",
    )
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth: drop rate of the last block; 0 = off"
    )
    crop: float = Field(
        0.08, ge=0, le=1, description="smallest share of the area a random crop keeps; 0 = off"
    )
    randaugment: float = Field(9, ge=0, le=10, description="magnitude of RandAugment; 0 = off")
    erase: float = Field(
        0.25, ge=0, le=1, description="share of images with a random rectangle erased; 0 = off"
    )
    mixup: float = Field(0.8, ge=0, description="alpha of mixup; 0 = off")
    cutmix: float = Field(1.0, ge=0, description="alpha of CutMix; 0 = off")
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of a target spread over all classes; 0 = off"
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.ramp_start + self.ramp_length > 1:
            raise ValueError("--ramp-start and --ramp-length together exceed the run (1.0)")
        if self.keep is not None and "budgets" in self.model_fields_set:
            raise ValueError("--keep trains for one keep ratio, --budgets for several; omit one")
        if self.init is None:
            if self.depth <= max(REDUCTION_POINTS):
                last = max(REDUCTION_POINTS)
                raise ValueError(
                    f"--depth {self.depth} is too small: the last reduction point is after block"
                    f" {last}, counted from 0"
                )
            config = self.config(classes=1)
            for budget in self.ratios:
                config.geometry.counts(budget)
        elif fixed := self.model_fields_set & {"width", "depth"}:
            flags = ", ".join(f"--{name}" for name in sorted(fixed))
            raise ValueError(f"--init determines the model's sizes; omit {flags}")
        if self.stream and self.eval_data is None:
            raise ValueError("--stream cannot hold images out; give --eval-data")
        return self

    @property
    def ratios(self) -> tuple[float, ...]:
        """The keep ratios to train for, from the largest."""
        return self.budgets if self.keep is None else (self.keep,)

    @property
    def ramp(self) -> tuple[float, ...]:
        """All keep ratios that occur in training, from 1.0 down."""
        if self.keep is not None:
            return keep_ratio_ramp(self.keep)
        return self.budgets if self.budgets[0] == 1.0 else (1.0, *self.budgets)


class Finetuning(nn.Module):
    """Mean cross-entropy over the budgets of a step, and held-out evaluation."""

    def __init__(
        self, start: Checkpoint, settings: FinetuneSettings, holdout: LabelledImages
    ) -> None:
        """start: the model to train. holdout: the images to evaluate on."""
        super().__init__()
        self.model, self.start, self.settings = start.model, start, settings
        self.holdout = holdout
        self.final: dict[str, dict[str, float]] = {}  # by keep ratio: top1 and n
        self.augment = Augmentation(
            size=start.model.config.image_size,
            crop=settings.crop,
            shift=settings.shift,
            flip=settings.flip,
            randaugment=settings.randaugment,
            erase=settings.erase,
        )
        self.mix = Mixing(
            mixup=settings.mixup, cutmix=settings.cutmix, smoothing=settings.label_smoothing
        )

    def forward(self, pixels: Tensor, labels: Tensor, rng: SampleRng, progress: float) -> Tensor:
        """Return the mean loss of uint8 pixels [b, 3, S, S] and labels [b], over the budgets."""
        config, device = self.model.config, pixels.device
        with torch.no_grad():
            images = self.augment(pixels.float() / 255, rng)
            images = self.augment.erase_rectangles(
                normalise(images * 255, self.start.preprocess), rng
            )
            images, targets = self.mix(images, labels, config.classes, rng)
        drop_path = drop_path_factors(rng, config.depth, self.settings.drop_path, device)
        noise = None
        if config.reduction == "random":
            noise = to_device(rng.uniform("reduction", config.geometry.patches), device)
        largest, losses = None, []
        for keep_ratio in self.choose_ratios(rng, progress):
            counts = config.geometry.counts(keep_ratio)
            logits = self.model(images, counts, drop_path=drop_path, noise=noise).float()
            loss = F.cross_entropy(logits, targets)
            if largest is None:
                largest = logits.detach().softmax(dim=-1)
            elif self.settings.distil:
                distilled = F.cross_entropy(logits, largest)
                loss = torch.lerp(loss, distilled, self.settings.distil)
            losses.append(loss)
        return torch.stack(losses).mean()

    def choose_ratios(self, rng: SampleRng, progress: float) -> list[float]:
        """Return the keep ratios of a step, from the largest; the same in every process."""
        settings = self.settings
        allowed = self._allowed_ratios(progress)
        if settings.sampling == "one":
            return [allowed[int(rng.draw_shared("budget") * len(allowed))]]
        inner = allowed[1:-1]
        chosen = {allowed[0], allowed[-1]}
        for i in range(min(settings.between, len(inner))):
            chosen.add(inner.pop(int(rng.draw_shared(f"budget {i}") * len(inner))))
        return sorted(chosen, reverse=True)

    def _allowed_ratios(self, progress: float) -> list[float]:
        """Return the keep ratios that a step may run, from the largest."""
        settings, ramp = self.settings, self.settings.ramp
        lowest = lowest_keep_ratio(ramp, progress, settings.ramp_start, settings.ramp_length)
        if settings.keep is not None:
            return [lowest]
        allowed = [ratio for ratio in ramp if ratio >= lowest and ratio in settings.budgets]
        return allowed or [lowest]

    def macs(self, progress: float) -> float:
        """Return the expected multiply-adds of a training step for one image.

        Forward and backward count as three forward passes.
        """
        geometry, settings = self.model.config.geometry, self.settings
        costs = [geometry.macs(geometry.counts(k)) for k in self._allowed_ratios(progress)]
        if settings.sampling == "one" or len(costs) == 1:
            return 3 * fmean(costs)
        inner = costs[1:-1]
        between = min(settings.between, len(inner)) * fmean(inner) if inner else 0.0
        return 3 * (costs[0] + costs[-1] + between)

    def after_step(self) -> None:
        """Do nothing: there is no moving average to update."""

    def after_epoch(self, world: World) -> Mapping[str, Mapping[str, float]]:
        """Return held-out top-1 at the largest and the smallest budget."""
        ends = dict.fromkeys((self.settings.ratios[0], self.settings.ratios[-1]))
        scores = self.measure(ends, world)
        return {"holdout_top1": {str(ratio): score.top1.value for ratio, score in scores.items()}}

    def measure(self, ratios: Iterable[float], world: World) -> dict[float, Score]:
        """Return held-out scores; every process evaluates its share of the rows."""
        rows = range(world.rank, len(self.holdout), world.size)
        own = evaluate(self.model, self.holdout, rows, ratios, precision=self.settings.dtype)
        return join_scores(world.gather(own))

    def checkpoint(self) -> Checkpoint:
        """Return the classifier, with the record of its training."""
        training = {"final": self.final, "init": self.start.training or None}
        return replace(self.start, training=training)


def finetune(settings: FinetuneSettings) -> dict[float, Top1] | None:
    """Fine-tune, and return held-out top-1 by budget; an empty dict for a dry run.

    Return None if a signal stopped the run, with a checkpoint to resume from.
    """
    check_out(settings)
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with join(settings.device) as world:
        start, data, holdout = prepare(settings, report=world.main)
        if (note := fit_batch_size(settings, world, len(data))) is not None:
            print_lines(note)
        try:
            objective = Finetuning(start, settings, holdout).to(world.device)
        except ValueError as error:  # flags that only fit larger images
            raise PcaeError(one_line(error)) from None
        decay = settings.layer_decay or (0.65 if settings.init else 1.0)
        groups = parameter_groups(objective, objective.model, settings.weight_decay, decay)
        used = [data.inventory, *([holdout.inventory] if settings.eval_data else [])]
        trainer = Trainer(settings, objective, groups, (0.9, 0.999), data, world, used)
        if settings.mixup or settings.cutmix:
            trainer.plan.check_pairs()
        if settings.dry_run:
            estimate = trainer.estimate()
            if world.main:
                print(*describe(trainer.plan, objective, settings.ratios), sep="\n")
                print(f"time       {estimate}, for the training steps alone")
            return {}
        if not trainer.run():
            return None
        scores = objective.measure(settings.ratios, world)
        top1 = {ratio: score.top1 for ratio, score in scores.items()}
        objective.final = {str(r): {"top1": t.value, "n": t.n} for r, t in top1.items()}
        trainer.save()
        return top1


def prepare(
    settings: FinetuneSettings, report: bool = True
) -> tuple[Checkpoint, TrainingData, LabelledImages]:
    """Return the model to train, the training images and the held-out images."""
    found = None
    if settings.init is not None:
        heads = settings.heads if "heads" in settings.model_fields_set else None
        found = load_checkpoint(settings.init, heads=heads, weights=settings.weights)
    if found is None:
        preprocess = settings.preprocess(settings.image_size or 224)
    else:
        preprocess = _choose_preprocess(found, settings)
    source = settings.decoding(preprocess)
    images: TrainingData
    if settings.eval_data is not None:
        limit = settings.max_unreadable
        holdout = load(
            settings.eval_data,
            settings.eval_split,
            preprocess,
            max_unreadable=limit,
            **settings.columns,
        )
        images = training_data(settings, source)
        holdout.align(images.classes)
        print_inventory(images.inventory)
        print_inventory(holdout.inventory)
        if isinstance(images, LabelledImages) and settings.eval_data != settings.data:
            _report_shared(images, holdout)
    else:
        labelled = load_labelled(settings, source)
        print_inventory(labelled.inventory)
        count = settings.holdout or default_holdout(labelled.labels, DEFAULT_HOLDOUT)
        split = hold_out(labelled.labels, count, labelled.name, settings.seed)
        if settings.holdout is None and report:
            print_lines(f"held out: {count:,} of {len(labelled):,} images (--holdout)")
        images = labelled.subset(split.train)
        holdout = labelled.decoded_by(preprocess).subset(split.holdout)
    model = _build_model(settings, found, images.classes, report)
    training = {} if found is None else found.training
    return Checkpoint(model, preprocess, images.classes, training), images, holdout.readable()


def _report_shared(images: LabelledImages, holdout: LabelledImages) -> None:
    """Report files of the training data that are also among the images to evaluate on."""
    found = find_duplicates([*images.files("--data"), *holdout.files("--eval-data")], "--data")
    if found.across:
        print_lines(f"  note: {found.notes[0]}")


def load_labelled(settings: FinetuneSettings, preprocess: Preprocess) -> LabelledImages:
    """Open all of --data, decoded by `preprocess`."""
    images = training_data(settings, preprocess)
    assert isinstance(images, LabelledImages)  # --stream requires --eval-data
    return images


def _choose_preprocess(found: LoadedCheckpoint, settings: FinetuneSettings) -> Preprocess:
    """Return the checkpoint's preprocessing at the size asked for, or ImageNet's if unknown."""
    size = settings.image_size or found.config.image_size
    own = found.preprocess
    if own is None:
        return replace(settings.preprocess(size), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if size == own.image_size:
        return own
    return replace(own, image_size=size, resize=round(own.resize * size / own.image_size))


def _build_model(
    settings: FinetuneSettings,
    found: LoadedCheckpoint | None,
    labels: list[str],
    report: bool,
) -> VisionTransformer:
    """Build the model and load the weights of --init that fit it."""
    classes = len(labels)
    if found is None:
        pooling = settings.pooling or "mean"
        config = settings.config(classes, pooling=pooling, reduction=settings.reduction)
        return VisionTransformer(config)
    if found.labels is not None and found.labels != labels:
        found = found.drop_head()
    try:
        config = replace(
            found.config,
            image_size=settings.image_size or found.config.image_size,
            patch_size=settings.patch_size or found.config.patch_size,
            classes=classes,
            pooling=settings.pooling or (found.config.pooling if found.config.classes else "mean"),
            reduction=settings.reduction,
        )
        for ratio in settings.ratios:
            config.geometry.counts(ratio)
    except ValueError as error:
        raise PcaeError(f"{settings.init}: {error}") from None
    if not config.reduction_points and settings.ratios[-1] < 1:
        raise PcaeError(
            f"{settings.init} has {config.depth} blocks; dropping patches needs at least 11"
        )
    model = VisionTransformer(config)
    fitted = initialise(model, found)
    if isinstance(model.head, nn.Linear) and "head.weight" in fitted.missing:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # as MAE: near zero at first
    if report:
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        unused = [*fitted.unused, *found.ignored]
        print(f"{settings.init}: {len(fitted.weights)} tensors loaded", file=sys.stderr)
        for what, names in (("newly initialised", fitted.missing), ("not used", unused)):
            if names:
                print(f"  {what}: {_shorten(names)}", file=sys.stderr)
    return model


def _shorten(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
