"""What a run is going to do, and what one is split in: steps, micro-batches, processes.

It computes; it trains nothing, reads no data and writes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pcae_serve.errors import PcaeError
from pcae_training.settings import RunSettings
from pcae_training.world import World


@dataclass(frozen=True)
class Plan:
    """How many steps there are, and which part of them is this process's."""

    settings: RunSettings
    world: World
    images: int  # an epoch

    def __post_init__(self) -> None:
        parts = self.world.size * self.settings.accumulate
        if self.settings.batch_size % parts:
            raise PcaeError(
                f"--batch-size {self.settings.batch_size} does not divide into"
                f" {self.world.size} processes x {self.settings.accumulate} micro-batches"
            )
        if self.images < self.settings.batch_size:
            raise PcaeError(
                f"{self.images} images do not fill one step of --batch-size"
                f" {self.settings.batch_size}"
            )

    def check_pairs(self) -> None:
        """Raise PcaeError where two processes would share a pair of neighbours, to be mixed."""
        parts = self.world.size * self.settings.accumulate
        if parts > 1 and self.settings.batch_size // parts % 2:
            raise PcaeError(
                f"--batch-size {self.settings.batch_size} leaves {parts} micro-batches of an odd"
                " number of images, and --mixup and --cutmix mix pairs: make it even"
            )

    @property
    def steps_per_epoch(self) -> int:
        """An epoch leaves out what does not fill a step: other images in each epoch."""
        return self.images // self.settings.batch_size

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Where this start of the run ends."""
        return self.steps_per_epoch * min(
            self.settings.epochs, self.settings.stop_after or self.settings.epochs
        )

    @property
    def micro_batches(self) -> list[slice]:
        """This process's parts of a global batch."""
        size = self.settings.batch_size // (self.world.size * self.settings.accumulate)
        first = self.world.rank * self.settings.accumulate * size
        return [slice(at, at + size) for at in range(first, first + self.share, size)]

    @property
    def share(self) -> int:
        """Images a step in this process."""
        return self.settings.batch_size // self.world.size

    def slices(self, first_step: int) -> list[slice]:
        """This process's micro-batches of an epoch from its step `first_step` on."""
        size = self.settings.batch_size
        return [
            slice(step * size + part.start, step * size + part.stop)
            for step in range(first_step, self.steps_per_epoch)
            for part in self.micro_batches
        ]


def describe(plan: Plan, objective: Any, budgets: tuple[float, ...] = ()) -> Iterator[str]:
    """Lines for people on the model of an Objective, each budget's cost, and the steps to come."""
    config, geometry = objective.model.config, objective.model.config.geometry
    settings = plan.settings
    learnt = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    own = sum(p.numel() for p in objective.model.parameters())
    yield (
        f"model      ViT, {config.image_size} px in patches of {config.patch_size}"
        f" ({geometry.patches} patches), width {config.width}, depth {config.depth},"
        f" {config.heads} heads, {config.classes or 'no'} classes"
    )
    yield f"parameters {own:,} in the model, {learnt:,} learnt in this run"
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
        f" {settings.batch_size} images ({plan.images:,} images an epoch)"
        f" = {plan.steps:,} steps, {plan.steps * settings.batch_size:,} images"
    )
    yield (
        f"           {plan.world.size} process{'es' if plan.world.size > 1 else ''} on"
        f" {plan.world.device}, {settings.accumulate} micro-batch"
        f"{'es' if settings.accumulate > 1 else ''} a step, {settings.precision},"
        f" {torch.get_num_threads()} threads"
    )
    yield (
        f"           AdamW, learning rate {settings.peak_lr:.3g} after {settings.warmup:.0%}"
        " warm-up,"
        f" cosine to {settings.min_lr:.3g}; seed {settings.seed}"
    )
    yield f"writes     {settings.out}"
