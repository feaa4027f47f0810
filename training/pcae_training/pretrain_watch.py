"""What is watched in a pretraining run: which images, how often, and the advice of the warning."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pcae_training.data import TrainingData
from pcae_training.feature_watch import FeatureWatch, WatchTimes
from pcae_training.model import VisionTransformer
from pcae_training.plan import Plan
from pcae_training.watch_settings import Sample, draw_labelled, draw_training

if TYPE_CHECKING:
    from pcae_training.pretrain import Pretraining


@dataclass(frozen=True)
class Untrained:
    """An encoder with random weights."""

    model: VisionTransformer

    def views(self, images: Tensor) -> dict[str, Tensor]:
        """See `feature_watch.Watched`."""
        return {"features": self.model.patch_features(images)}


def watch_features(objective: "Pretraining", images: TrainingData, plan: Plan) -> FeatureWatch:
    """Return what measures the features of a run on `images`.

    Raise PcaeError if --eval-data cannot be read or does not have one label an image.
    """
    settings = objective.settings
    sample = _sample(objective, images, plan)
    warmup = math.ceil(settings.warmup * plan.steps)
    return FeatureWatch(
        objective,
        sample,
        objective.preprocess,
        plan.world.device,
        WatchTimes(plan.steps_per_epoch, settings.epochs, _cost(objective, sample)),
        first_warning=warmup,
        advice=_advice(objective),
        untrained=None if settings.init is None else _untrained(objective, plan.world.device),
    )


def _untrained(objective: "Pretraining", device: torch.device) -> Untrained:
    """Return a new encoder of the same sizes; the run's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(objective.settings.seed)
        return Untrained(VisionTransformer(objective.model.config).to(device))


def _sample(objective: "Pretraining", images: TrainingData, plan: Plan) -> Sample:
    settings, device = objective.settings, plan.world.device
    if settings.eval_data is not None:
        return draw_labelled(
            settings,
            objective.preprocess,
            settings.seed,
            settings.columns,
            settings.max_unreadable,
        )
    count, size = settings.watch_images, objective.model.config.image_size
    return draw_training(images, count, size, settings.seed, device, settings.workers)


def _cost(objective: "Pretraining", sample: Sample) -> float:
    """Return what one measurement costs, in training steps."""
    settings, geometry = objective.settings, objective.model.config.geometry
    passes = 2 if settings.predicts_teacher else 1  # encoder and teacher, all patches, forward
    macs = passes * geometry.macs(geometry.counts(1.0))
    return len(sample.pixels) * macs / (settings.batch_size * objective.macs())


def _advice(objective: "Pretraining") -> str:
    settings, teacher = objective.settings, objective.teacher
    now = f"now --lr {settings.peak_lr:.2g} --warmup {settings.warmup:g}"
    if teacher is None or not settings.predicts_teacher:
        return f"try a lower learning rate and a longer warm-up ({now}); see docs/training.md"
    return (
        "try a slower teacher, a lower learning rate and a longer warm-up together, such as"
        " --ema 0.9995 --lr 4e-4 --warmup 0.3 --batch-size 128"
        f" ({now} --ema {teacher.ema:.5g} --batch-size {settings.batch_size}); see"
        " docs/training.md"
    )
