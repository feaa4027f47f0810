"""Fine-tune a ViT on labels: at one keep ratio as in the paper, or one set of weights for all.

Elastic training (not in the paper): every step runs the largest and the smallest budget and some in
between. All are trained on the labels, the smaller ones also on the largest one's output (the
sandwich rule and in-place distillation of slimmable networks, arXiv 1903.05134).
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pcae_serve.errors import PcaeError, one_line
from pcae_training import checkpoint as checkpoints
from pcae_training.adapters import (
    adapt,
    describe_adapters,
    load_merged,
    merge,
    merged_parameters,
)
from pcae_training.augment import Augmentation, Mixing
from pcae_training.average import WeightAverage
from pcae_training.best_epoch import BestEpoch
from pcae_training.checkpoint import Checkpoint
from pcae_training.class_weights import weigh_images
from pcae_training.data import LabelledImages
from pcae_training.evaluate import evaluate, join_scores, normalise
from pcae_training.evaluation import report_classes
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.finetune_start import prepare
from pcae_training.inventory import print_lines
from pcae_training.model import VisionTransformer
from pcae_training.output import write_whole
from pcae_training.plan import describe, fit_batch_size
from pcae_training.sample_rng import SampleRng, drop_path_factors, to_device
from pcae_training.task import AnyScore, Headline, choose_task
from pcae_training.teacher import Teachers, load_teachers
from pcae_training.trainer import BEST, Trainer, check_out, parameter_groups
from pcae_training.world import World, join

#: File in a run's folder: precision, recall and confusion of the held-out images by class.
CLASSES = "classes.json"


class Finetuning(nn.Module):
    """Mean cross-entropy over the budgets of a step, and held-out evaluation."""

    def __init__(
        self,
        start: Checkpoint,
        settings: FinetuneSettings,
        holdout: LabelledImages,
        teachers: Teachers | None = None,
        new: Collection[str] = (),
        class_weights: Tensor | None = None,
    ) -> None:
        """start: the model to train. holdout: the images to evaluate on.

        new: names of the parameters that --init does not provide, which are never frozen.
        class_weights: float32 [classes], of the loss.
        """
        super().__init__()
        self.model, self.start, self.settings = start.model, start, settings
        self.holdout, self.teachers = holdout, teachers
        self.budgets, self.weights = settings.budget_choice, dict(settings.budget_weights)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        if settings.lora is not None:
            alpha = settings.lora_alpha or settings.lora
            adapt(self.model, settings.lora, alpha, settings.lora_targets, new)
        self.average: WeightAverage | None = None
        if settings.weight_ema:
            self.average = WeightAverage(self._plain, settings.weight_ema)
        self.frozen = self._find_frozen(new) if settings.frozen_share else []
        if settings.freeze:
            self._set_frozen(progress=0.0)
        self.task = choose_task(start.multi_label)
        self.final: dict[str, dict[str, float]] = {}  # by keep ratio: top1 or map, and n
        self.selected: int | None = None  # the epoch whose weights were chosen
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

    @property
    def _plain(self) -> VisionTransformer:
        """The model that is trained, its adapters merged."""
        return self.model if self.settings.lora is None else merge(self.model)

    @property
    def kept(self) -> VisionTransformer:
        """The model that is evaluated, saved and exported: the average, if there is one."""
        if self.average is None:
            return self._plain
        model = self.average.module
        assert isinstance(model, VisionTransformer)
        return model

    @property
    def kept_prefix(self) -> str:
        """The prefix, in the state dict, of what the checkpoint holds, if it is the same there."""
        return "model." if self.average is None else "average.module."

    @property
    def has_unused(self) -> bool:
        """Whether a step may leave parameters without a gradient."""
        return self.settings.freeze_first > 0

    def forward(self, pixels: Tensor, labels: Tensor, rng: SampleRng, progress: float) -> Tensor:
        """Return the mean loss of uint8 pixels [b, 3, S, S] and labels, over the budgets.

        labels: int64 [b], or sets of labels bool [b, classes].
        """
        config, device, settings = self.model.config, pixels.device, self.settings
        self._set_frozen(progress)
        with torch.no_grad():
            images = self.augment(pixels.float() / 255, rng)
            images = self.augment.erase_rectangles(
                normalise(images * 255, self.start.preprocess), rng
            )
            images, targets = self.mix(images, labels, config.classes, rng)
            weights = None
            if self.class_weights is not None:
                weights = weigh_images(targets, settings.label_smoothing, self.class_weights)
            if self.teachers is not None:
                targets = torch.lerp(targets, self.teachers(images), settings.teacher_share)
        drop_path = drop_path_factors(rng, config.depth, settings.drop_path, device)
        noise = None
        if config.reduction == "random":
            noise = to_device(rng.uniform("reduction", config.geometry.patches), device)
        ratios = self.budgets.draw(rng, progress)
        largest, losses = self._learn_from_average(images, ratios, noise), []
        for keep_ratio in ratios:
            counts = config.geometry.counts(keep_ratio)
            logits = self.model(images, counts, drop_path=drop_path, noise=noise).float()
            loss = self.task.loss(logits, targets, weights)
            if settings.distil and largest is not None and keep_ratio < settings.ratios[0]:
                distilled = self.task.loss(logits, largest, weights)
                loss = torch.lerp(loss, distilled, settings.distil)
            if largest is None:
                largest = self.task.probabilities(logits.detach())
            losses.append(self.weights.get(keep_ratio, 1.0) * loss)
        return torch.stack(losses).mean()

    def _find_frozen(self, new: Collection[str]) -> list[nn.Parameter]:
        """Return the parameters that --init provides and that may be trained, without the head."""
        parameters = dict(self.model.named_parameters())
        trained = [name for name in parameters if name in new or name.startswith("head")]
        return [p for name, p in parameters.items() if name not in trained and p.requires_grad]

    def _set_frozen(self, progress: float) -> None:
        """Freeze or release the weights of --init; the same at any progress of a resumed run."""
        trained = progress >= self.settings.frozen_share
        for parameter in self.frozen:
            parameter.requires_grad_(trained and not self.settings.freeze)

    @torch.no_grad()
    def _learn_from_average(
        self, images: Tensor, ratios: list[float], noise: Tensor | None
    ) -> Tensor | None:
        """Return the average's probabilities at the largest budget, if smaller ones need them."""
        settings, config = self.settings, self.model.config
        needed = settings.distil and ratios[-1] < settings.ratios[0]
        if settings.distil_from != "average" or not needed:
            return None
        counts = config.geometry.counts(settings.ratios[0])
        return self.task.probabilities(self.kept(images, counts, noise=noise).float())

    def macs(self, progress: float) -> float:
        """Return the expected multiply-adds of a training step for one image.

        Forward and backward count as three forward passes, with adapters as two, of frozen weights
        as one. Teachers are not counted, nor are the adapters themselves.
        """
        geometry, settings = self.model.config.geometry, self.settings
        costs = {k: float(geometry.macs(geometry.counts(k))) for k in settings.ramp}
        passes = 1 if progress < settings.frozen_share else 3 if settings.lora is None else 2
        macs = passes * self.budgets.macs(costs, progress)
        if settings.distil and settings.distil_from == "average":
            allowed = self.budgets.allowed(progress)
            odds = dict(zip(allowed, self.budgets.odds(allowed), strict=True))
            smaller = 1.0 if settings.sampling == "sandwich" else 1 - odds.get(1.0, 0.0)
            macs += costs[settings.ramp[0]] * (smaller if len(allowed) > 1 else 0)
        return macs

    def after_step(self) -> None:
        """Update the moving average, if there is one."""
        if self.average is None:
            return
        merged = None
        if self.settings.lora is not None:
            merged = list(merged_parameters(self.model).values())
        self.average.update(self.model, merged)

    def after_epoch(self, world: World) -> Mapping[str, Mapping[str, float]]:
        """Return the held-out score at the largest and the smallest budget."""
        ends = dict.fromkeys((self.settings.ratios[0], self.settings.ratios[-1]))
        scores = self.measure(ends, world)
        key = next(iter(scores.values())).key
        values = {str(ratio): score.headline.value for ratio, score in scores.items()}
        return {f"holdout_{key}": values}

    def measure(self, ratios: Iterable[float], world: World) -> dict[float, AnyScore]:
        """Return held-out scores; every process evaluates its share of the rows."""
        rows = range(world.rank, len(self.holdout), world.size)
        own = evaluate(
            self.kept,
            self.holdout,
            rows,
            ratios,
            precision=self.settings.dtype,
            workers=self.settings.workers,
        )
        return join_scores(world.gather(own))

    def checkpoint(self) -> Checkpoint:
        """Return the classifier, with the record of its training."""
        weights = "average" if self.average is not None else "raw"
        training: dict[str, Any] = {
            "final": self.final,
            "init": self.start.training or None,
            "weights": weights,
        }
        if self.selected is not None:
            training["selected_epoch"] = self.selected
        return replace(self.start, model=self.kept, training=training)

    def take(self, epoch: int, best: VisionTransformer) -> None:
        """Replace the weights to keep by those of an epoch."""
        if self.average is None:
            load_merged(self.model, best)
        else:
            self.kept.load_state_dict(best.state_dict())
        self.selected = epoch


def finetune(settings: FinetuneSettings) -> dict[float, Headline] | None:
    """Fine-tune, and return the held-out score by budget; an empty dict for a dry run.

    Return None if a signal stopped the run, with a checkpoint to resume from.
    """
    check_out(settings)
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with join(settings.device) as world:
        start, data, holdout, held_out, new, weights = prepare(settings, report=world.main)
        if (note := fit_batch_size(settings, world, len(data))) is not None:
            print_lines(note)
        try:
            teachers = load_teachers(settings.teacher, start, world.device)
            objective = Finetuning(start, settings, holdout, teachers, new, weights)
            objective.to(world.device)
        except ValueError as error:  # flags that only fit larger images
            raise PcaeError(one_line(error)) from None
        decay, of_layers = settings.weight_decay, settings.decay_of_layers
        groups = parameter_groups(objective, objective.model, decay, of_layers)
        used = [data.inventory, *([holdout.inventory] if settings.eval_data else [])]
        best = BestEpoch(settings.patience) if settings.select == "best" else None
        trainer = Trainer(settings, objective, groups, (0.9, 0.999), data, world, used, best)
        trainer.at_start = held_out.write
        if settings.mixup or settings.cutmix:
            trainer.plan.check_pairs()
        if settings.dry_run:
            estimate = trainer.estimate()
            if world.main:
                print(*describe(trainer.plan, objective, settings.ratios), sep="\n")
                if settings.lora is not None:
                    print(f"adapters   {describe_adapters(objective.model)}")
                print(f"time       {estimate}, for the training steps alone")
            return {}
        if not trainer.run():
            return None
        if best is not None and trainer.finished:
            epoch = best.find(trainer.history)
            assert epoch is not None
            world.any(False)  # waits until the main process has written it
            objective.take(epoch, checkpoints.load(settings.folder / BEST).model)
            if world.main:
                print_lines(f"kept the weights of epoch {epoch}, the best on the held-out images")
        scores = objective.measure(settings.ratios, world)
        reports = {str(r): report_classes(s, start.labels).to_json() for r, s in scores.items()}
        if world.main:
            content = {"data": holdout.name, "by_keep_ratio": reports}
            write_whole(settings.folder / CLASSES, (json.dumps(content) + "\n").encode())
        objective.final = {
            str(ratio): {score.key: score.headline.value, "n": score.n}
            for ratio, score in scores.items()
        }
        trainer.save()
        return {ratio: score.headline for ratio, score in scores.items()}
