"""How a run is divided into steps, micro-batches and processes, and the text of --dry-run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pcae_serve.errors import PcaeError
from pcae_training.settings import RunSettings
from pcae_training.world import World

#: With fewer steps per epoch, the default batch size is lowered.
MIN_STEPS_PER_EPOCH = 4


def fit_batch_size(settings: RunSettings, world: World, images: int) -> str | None:
    """Lower the batch size in `settings`, if it is the default and too large for `images`.

    The result is a power of two, if the number of micro-batches is one. Return a note on it.
    """
    default, parts = settings.batch_size, world.size * settings.accumulate
    if "batch_size" in settings.model_fields_set or images >= MIN_STEPS_PER_EPOCH * default:
        return None
    smallest = 2 if parts > 1 else 1  # mixing needs pairs
    each = max(smallest, images // MIN_STEPS_PER_EPOCH // parts)
    size = parts * 2 ** (each.bit_length() - 1)
    if size >= default:
        return None
    settings.batch_size = size
    return f"--batch-size is {size} instead of {default}: there are only {images:,} images to train"


@dataclass(frozen=True)
class Plan:
    """The steps of a run, and this process's part of each."""

    settings: RunSettings
    world: World
    images: int  # per epoch

    def __post_init__(self) -> None:
        parts = self.world.size * self.settings.accumulate
        if self.settings.batch_size % parts:
            raise PcaeError(
                f"--batch-size {self.settings.batch_size} cannot be divided into"
                f" {self.world.size} processes x {self.settings.accumulate} micro-batches"
            )
        if self.images < self.settings.batch_size:
            raise PcaeError(
                f"{self.images} images are fewer than one step of --batch-size"
                f" {self.settings.batch_size}; it can be at most {self.images // parts * parts}"
                if self.images >= parts
                else f"{self.images} images are fewer than the {parts} micro-batches of a step"
            )

    def check_pairs(self) -> None:
        """Raise PcaeError if a pair of neighbours, to be mixed, would be split over processes."""
        parts = self.world.size * self.settings.accumulate
        if parts > 1 and self.settings.batch_size // parts % 2:
            raise PcaeError(
                f"--batch-size {self.settings.batch_size} gives {parts} micro-batches of an odd"
                " number of images, but --mixup and --cutmix mix pairs; use a multiple of"
                f" {2 * parts}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full steps per epoch; the images left over differ from epoch to epoch."""
        return self.images // self.settings.batch_size

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """The step that this start of the run ends at."""
        return self.steps_per_epoch * min(
            self.settings.epochs, self.settings.stop_after or self.settings.epochs
        )

    @property
    def micro_batches(self) -> list[slice]:
        """This process's micro-batches, as slices of the global batch."""
        size = self.settings.batch_size // (self.world.size * self.settings.accumulate)
        first = self.world.rank * self.settings.accumulate * size
        return [slice(at, at + size) for at in range(first, first + self.share, size)]

    @property
    def share(self) -> int:
        """Images per step in this process."""
        return self.settings.batch_size // self.world.size

    def slices(self, first_step: int) -> list[slice]:
        """Return this process's micro-batches from step `first_step`, as slices of the epoch."""
        size = self.settings.batch_size
        return [
            slice(step * size + part.start, step * size + part.stop)
            for step in range(first_step, self.steps_per_epoch)
            for part in self.micro_batches
        ]


def describe(plan: Plan, objective: Any, budgets: tuple[float, ...] = ()) -> Iterator[str]:
    """Yield lines of text on an Objective's model, the cost of each budget, and the plan."""
    config, geometry = objective.model.config, objective.model.config.geometry
    settings = plan.settings
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    own = sum(p.numel() for p in objective.checkpoint().model.parameters())
    yield (
        f"model      ViT, {config.image_size} px in patches of {config.patch_size}"
        f" ({geometry.patches} patches), width {config.width}, depth {config.depth},"
        f" {config.heads} heads, {config.classes or 'no'} classes"
    )
    yield f"parameters {own:,} in the model, {trained:,} trained in this run"
    if budgets:
        full = geometry.macs(geometry.counts(1))
        points = ", ".join(map(str, config.reduction_points))
        yield f"reduction  {config.reduction}, after blocks {points}"
        for ratio in budgets:
            counts = geometry.counts(ratio)
            left = " → ".join(map(str, (geometry.patches, *counts)))
            macs = geometry.macs(counts)
            cost = f"{macs / 1e9:.3f} GMACs, {full / macs:.2f} times fewer"
            yield f"  keep {ratio:<5g} {left} patches, {cost}"
    yield (
        f"plan       {settings.epochs} epochs x {plan.steps_per_epoch:,} steps of"
        f" {settings.batch_size} images ({plan.images:,} images per epoch)"
        f" = {plan.steps:,} steps, {plan.steps * settings.batch_size:,} images"
    )
    yield (
        f"           {plan.world.size} process{'es' if plan.world.size > 1 else ''} on"
        f" {plan.world.device}, {settings.accumulate} micro-batch"
        f"{'es' if settings.accumulate > 1 else ''} per step,"
        f" {str(settings.dtype).removeprefix('torch.')},"
        f" {torch.get_num_threads()} threads"
    )
    yield (
        f"           AdamW, learning rate {settings.peak_lr:.3g} after {settings.warmup:.0%}"
        " warm-up,"
        f" cosine to {settings.min_lr:.3g}; seed {settings.seed}"
    )
    yield f"writes     {settings.out or 'nothing: there is no --out'}"
