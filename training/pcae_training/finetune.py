"""Fine-tune a ViT on labels: at one keep ratio as the paper, or one set of weights for all.

Elastic training, which is this project's own: every step runs both ends of the budgets and some
between; all learn the labels, and the smaller ones what the largest says as well (the sandwich rule
and in-place distillation of slimmable networks, arXiv 1903.05134). It knows losses and budgets;
`trainer` has the loop.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

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
from pcae_training.data import LabelledImages, TrainingData, hold_out, load
from pcae_training.evaluate import evaluate, normalise, read_ratios, together
from pcae_training.import_weights import LoadedCheckpoint, initialise, load_checkpoint
from pcae_training.model import VisionTransformer
from pcae_training.plan import describe
from pcae_training.sample_rng import SampleRng, drop_path_factors, to_device
from pcae_training.schedule import keep_ratio_ramp, lowest_keep_ratio
from pcae_training.score import Score, Top1
from pcae_training.settings import RunSettings
from pcae_training.trainer import Trainer, check_out, parameter_groups, training_data
from pcae_training.world import World, join

#: What a model without statistics of its own was most likely trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FinetuneSettings(RunSettings):
    """Fine-tune on labelled images; the defaults are MAE's recipe and the paper's ramp."""

    init: Path | None = Field(
        None, description="weights to start from: checkpoint, .pth, .safetensors, Hugging Face"
    )
    pooling: Literal["mean", "cls"] | None = Field(
        None, description="what the head reads: mean of the patches or CLS; mean, or as --init"
    )
    eval_data: str | None = Field(
        None, description="measure on these images, not on some held out of --data"
    )
    eval_split: str = Field("validation", description="split of --eval-data")
    holdout: int = Field(5000, ge=1, description="training images held out for every choice")

    keep: float | None = Field(None, gt=0, le=1, description="one keep ratio, as the paper trains")
    budgets: Annotated[tuple[float, ...], NoDecode, BeforeValidator(read_ratios)] = Field(
        (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), description="keep ratios, as 1.0,0.8,.6"
    )
    sampling: Literal["sandwich", "one"] = Field(
        "sandwich", description="budgets of a step: both ends and some between, or one drawn"
    )
    between: int = Field(1, ge=0, description="sandwich: budgets drawn between the ends")
    distil: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a small budget's loss that comes from the largest's"
        " answer instead of the labels",
    )
    ramp_start: float = Field(0.10, ge=0, le=1, description="share of the run before any dropping")
    ramp_length: float = Field(0.25, ge=0, le=1, description="share over which dropping rises")
    reduction: Rule = Field("ptr", description="how patches are ranked")

    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="learning rate of a layer over that above; 0.65 with --init"
    )
    drop_path: float = Field(0.1, ge=0, lt=1, description="rate in the last block; 0 = off")
    crop: float = Field(
        0.08, ge=0, le=1, description="least share of the image a random crop takes; 0 = off"
    )
    randaugment: float = Field(9, ge=0, le=10, description="magnitude of RandAugment; 0 = off")
    erase: float = Field(0.25, ge=0, le=1, description="share of images partly erased; 0 = off")
    mixup: float = Field(0.8, ge=0, description="alpha of mixup; 0 = off")
    cutmix: float = Field(1.0, ge=0, description="alpha of CutMix; 0 = off")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="0 = off")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """What flags together cannot mean is told before any data is read."""
        if self.ramp_start + self.ramp_length > 1:
            raise ValueError("--ramp-start and --ramp-length together reach beyond the run")
        if self.keep is not None and "budgets" in self.model_fields_set:
            raise ValueError("--keep trains one keep ratio, --budgets several: leave out one")
        if self.init is None:
            if self.depth <= max(REDUCTION_POINTS):
                raise ValueError(f"--depth {self.depth} ends before the last reduction point, 10")
            config = self.config(classes=1)
            for budget in self.ratios:
                config.geometry.counts(budget)
        elif fixed := self.model_fields_set & {"width", "depth"}:
            flags = ", ".join(f"--{name}" for name in sorted(fixed))
            raise ValueError(f"--init decides the model's sizes: leave out {flags}")
        if self.stream and self.eval_data is None:
            raise ValueError("--stream cannot hold images out: name some with --eval-data")
        return self

    @property
    def ratios(self) -> tuple[float, ...]:
        """The keep ratios that the run is for, from the largest."""
        return self.budgets if self.keep is None else (self.keep,)

    @property
    def ramp(self) -> tuple[float, ...]:
        """The few keep ratios that training ever meets, from 1.0 down."""
        if self.keep is not None:
            return keep_ratio_ramp(self.keep)
        return self.budgets if self.budgets[0] == 1.0 else (1.0, *self.budgets)


class Finetuning(nn.Module):
    """Cross-entropy at the budgets that a step visits, and what the run leaves behind."""

    def __init__(
        self, start: Checkpoint, settings: FinetuneSettings, judge: LabelledImages
    ) -> None:
        """judge: the images that accuracy is measured on."""
        super().__init__()
        self.model, self.start, self.settings = start.model, start, settings
        self.judge = judge
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
        """Mean loss of uint8 pixels [b, 3, S, S] and labels [b], over the budgets of the step."""
        config, device = self.model.config, pixels.device
        with torch.no_grad():
            images = self.augment(pixels.float() / 255, rng)
            images = self.augment.erased(normalise(images * 255, self.start.preprocess), rng)
            images, targets = self.mix(images, labels, config.classes, rng)
        drop_path = drop_path_factors(rng, config.depth, self.settings.drop_path, device)
        noise = None
        if config.reduction == "random":
            noise = to_device(rng.uniform("reduction", config.geometry.patches), device)
        first, losses = None, []
        for keep_ratio in self.visited(rng, progress):
            counts = config.geometry.counts(keep_ratio)
            logits = self.model(images, counts, drop_path=drop_path, noise=noise).float()
            loss = F.cross_entropy(logits, targets)
            if first is None:
                first = logits.detach().softmax(dim=-1)
            elif self.settings.distil:
                taught = F.cross_entropy(logits, first)
                loss = torch.lerp(loss, taught, self.settings.distil)
            losses.append(loss)
        return torch.stack(losses).mean()

    def visited(self, rng: SampleRng, progress: float) -> list[float]:
        """The keep ratios of a step, from the largest: the same in every process."""
        settings = self.settings
        ramp = settings.ramp
        lowest = lowest_keep_ratio(ramp, progress, settings.ramp_start, settings.ramp_length)
        if settings.keep is not None:
            return [lowest]
        allowed = [ratio for ratio in ramp if ratio >= lowest and ratio in settings.budgets]
        allowed = allowed or [lowest]
        if settings.sampling == "one":
            return [allowed[int(rng.draw_shared("budget") * len(allowed))]]
        inner = allowed[1:-1]
        chosen = {allowed[0], allowed[-1]}
        for i in range(min(settings.between, len(inner))):
            chosen.add(inner.pop(int(rng.draw_shared(f"budget {i}") * len(inner))))
        return sorted(chosen, reverse=True)

    def stepped(self) -> None:
        """Nothing follows the weights."""

    def epoch_ended(self, world: World) -> Mapping[str, Mapping[str, float]]:
        """Held-out top-1 at both ends of the budgets."""
        ends = dict.fromkeys((self.settings.ratios[0], self.settings.ratios[-1]))
        scores = self.measure(ends, world)
        return {"holdout_top1": {str(ratio): score.top1.value for ratio, score in scores.items()}}

    def measure(self, ratios: Iterable[float], world: World) -> dict[float, Score]:
        """Held-out scores; every process measures its share of the rows."""
        rows = range(world.rank, len(self.judge), world.size)
        own = evaluate(self.model, self.judge, rows, ratios, precision=self.settings.dtype)
        return together(world.gather(own))

    def checkpoint(self) -> Checkpoint:
        """The classifier, and how it came about."""
        training = {"final": self.final, "init": self.start.training or None}
        return replace(self.start, training=training)


def finetune(settings: FinetuneSettings) -> dict[float, Top1] | None:
    """Train to the end, and return held-out top-1 per budget; of a dry run, nothing.

    None where a signal stopped the run before, with a checkpoint to resume from.
    """
    check_out(settings)
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with join(settings.device) as world:
        start, data, judge = prepare(settings, report=world.main)
        try:
            objective = Finetuning(start, settings, judge).to(world.device)
        except ValueError as error:  # of flags that only fit larger images
            raise PcaeError(one_line(error)) from None
        decay = settings.layer_decay or (0.65 if settings.init else 1.0)
        groups = parameter_groups(objective, objective.model, settings.weight_decay, decay)
        trainer = Trainer(settings, objective, groups, (0.9, 0.999), data, world)
        if settings.mixup or settings.cutmix:
            trainer.plan.check_pairs()
        if settings.dry_run:
            if world.main:
                print(*describe(trainer.plan, objective, settings.ratios), sep="\n")
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
    """The model to train, what to train it on, and the images to measure it on."""
    found = None
    if settings.init is not None:
        heads = settings.heads if "heads" in settings.model_fields_set else None
        found = load_checkpoint(settings.init, heads=heads)
    if found is None:
        preprocess = settings.preprocess(settings.image_size or 224)
    else:
        preprocess = _preprocess(found, settings)
    source = settings.source(preprocess)
    if settings.eval_data is not None:
        limit = settings.max_unreadable
        judge = load(
            settings.eval_data,
            settings.eval_split,
            preprocess,
            max_unreadable=limit,
            **settings.columns,
        )
        images: TrainingData = training_data(settings, source, classes=judge.classes)
    else:
        whole = load_labelled(settings, source)
        split = hold_out(whole, settings.holdout, settings.seed)
        images = whole.subset(split.train)
        same = whole if source == preprocess else load_labelled(settings, preprocess)
        judge = same.subset(split.holdout)
    model = _model(settings, found, images.classes, report)
    training = {} if found is None else found.training
    return Checkpoint(model, preprocess, images.classes, training), images, judge.readable()


def load_labelled(settings: FinetuneSettings, preprocess: Preprocess) -> LabelledImages:
    """All of --data, as `preprocess` makes it."""
    images = training_data(settings, preprocess)
    assert isinstance(images, LabelledImages)  # --stream asks for --eval-data
    return images


def _preprocess(found: LoadedCheckpoint, settings: FinetuneSettings) -> Preprocess:
    """The source's own, at the size asked for; ImageNet's statistics where it has none."""
    size = settings.image_size or found.config.image_size
    own = found.preprocess
    if own is None:
        return replace(settings.preprocess(size), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if size == own.image_size:
        return own
    return replace(own, image_size=size, resize=round(own.resize * size / own.image_size))


def _model(
    settings: FinetuneSettings,
    found: LoadedCheckpoint | None,
    labels: list[str],
    report: bool,
) -> VisionTransformer:
    """A new model, with what the source has for it."""
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
        raise PcaeError(f"{settings.init} has {config.depth} blocks: to drop patches takes 11")
    model = VisionTransformer(config)
    fitted = initialise(model, found)
    if isinstance(model.head, nn.Linear) and "head.weight" in fitted.missing:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # as MAE: it does not disturb at first
    if report:
        unused = [*fitted.unused, *found.ignored]
        print(f"{settings.init}: {len(fitted.weights)} tensors taken", file=sys.stderr)
        for what, names in (("new, untrained", fitted.missing), ("not used", unused)):
            if names:
                print(f"  {what}: {_shortened(names)}", file=sys.stderr)
    return model


def _shortened(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
