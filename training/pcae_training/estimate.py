"""Estimate how long a run takes from the time of a few steps."""

import statistics
import time
from collections.abc import Callable

import torch

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.plan import Plan
from pcae_training.progress import format_duration
from pcae_training.sample_rng import SampleRng

#: Steps timed after the first one, which loads kernels and allocates memory.
TIMED_STEPS = 3

#: No further step is timed after this time.
TIME_LIMIT_S = 10.0

#: On a CPU, time is proportional to the number of images from this number on.
CPU_IMAGES = 16


def measure_step(
    objective: torch.nn.Module, plan: Plan, preprocess: Preprocess, classes: int
) -> float:
    """Return the seconds of a training step late in the run, on random pixels.

    preprocess: of the decoded images. The weights are not changed.
    """
    device, settings = plan.world.device, plan.settings
    part = plan.micro_batches[0]
    size = part.stop - part.start
    count = min(size, CPU_IMAGES) if device.type == "cpu" else size
    side = preprocess.image_size
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8).to(device)
    labels = torch.randint(0, max(1, classes), (count,)).to(device)

    def step(images: int) -> float:
        began = time.monotonic()
        rng = SampleRng(settings.seed, 0, images)
        with torch.autocast(device.type, settings.dtype, enabled=settings.dtype != torch.float32):
            loss = objective(pixels[:images], labels[:images], rng, 1.0)
        loss.backward()
        wait_for(device)
        return time.monotonic() - began

    step(count if device.type == "cuda" else min(count, 2))  # loads kernels, allocates memory
    seconds = [step(count)]
    while len(seconds) < TIMED_STEPS and sum(seconds) < TIME_LIMIT_S:
        seconds.append(step(count))
    objective.zero_grad()
    part_s: float = min(seconds) * size / count
    return part_s * len(plan.micro_batches)


def describe_time(
    plan: Plan,
    macs: Callable[[float], float],
    step_s: float,
    *,
    progress: float,
    first_step: int = 0,
    shortest_s: float = 0.0,
) -> str | None:
    """Return a text such as "about 3 h 20 min for 100 epochs on this machine".

    The cost of a step changes as the keep ratios fall: `step_s`, measured at `progress`, is scaled
    by `macs`, the multiply-adds of a step at any progress. Return None below `shortest_s`.
    """
    steps = plan.last_step - first_step
    points = [(first_step + steps * (i + 0.5) / 100) / plan.steps for i in range(100)]
    seconds = step_s * steps * statistics.fmean(map(macs, points)) / macs(progress)
    if seconds < shortest_s:
        return None
    epochs = plan.last_step // plan.steps_per_epoch
    part = f"{epochs} epoch{'s' * (epochs > 1)}" if first_step == 0 else f"{steps:,} steps"
    return f"about {format_duration(seconds)} for {part} on this machine"


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work, so that it can be timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
