"""Run `pcae-serve classify` in this process."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path

from pcae_serve.bundle.reader import Bundle
from pcae_serve.commands.classify import CACHE_VARIABLE, STDIN, Classify
from pcae_serve.errors import BudgetTooSmall
from pcae_serve.local.image_source import ImageLike
from pcae_serve.local.progress import duration
from pcae_serve.local.run_output import RunOutput, report
from pcae_serve.local.runner import Answered, Outcome, Runner, open_runner
from pcae_serve.local.time_plan import TimePlan, parse_duration
from pcae_serve.runtime.requests import InferenceRequest
from pcae_serve.runtime.results import classification
from pcae_serve.runtime.tiers import tier_table
from pcae_serve.settings import CACHE_DIR

#: Images from which on each core has a batch of its own.
MANY = 16


def classify_here(
    options: Classify, bundle: Bundle, names: Sequence[str], output: RunOutput
) -> None:
    """Classify images, and pass on what became of them, in their order."""
    start_s = time.monotonic()
    with open_runner(
        bundle,
        device=options.device,
        backend=options.backend,
        threads=options.threads,
        cache_dir=Path(os.environ.get(CACHE_VARIABLE) or CACHE_DIR),
        parallel=options.budget_ms is None and len(names) >= MANY,
    ) as runner:
        request = InferenceRequest(0.0, options.budget_ms or inf, options.tier, options.min_tier)
        outcomes = _outcomes(options, runner, names, start_s)
        for name, outcome in zip(names, outcomes, strict=True):
            if isinstance(outcome, Answered):
                output.explained(name, outcome)
                answer = classification(outcome.result, request, options.top_k, explain=False)
                output.answered(name, answer, outcome.result.total_s * 1e3)
            else:
                output.failed(name, outcome)


def _outcomes(
    options: Classify, runner: Runner, names: Sequence[str], start_s: float
) -> Iterator[Outcome]:
    """Yield what became of each image."""
    tiers = runner.bundle.allowed_tiers(options.tier, options.min_tier)
    pinned = options.tier != "auto"
    images = (sys.stdin.buffer.read() if name == STDIN else Path(name) for name in names)
    if options.budget_ms is not None:
        runner.measure()
        for image in images:
            try:
                yield from runner.run_in_time([image], tiers, pinned, options.budget_ms)
            except BudgetTooSmall as error:
                yield error
    elif options.total_time is not None:
        end_s = start_s + parse_duration(options.total_time)
        yield from _planned(runner, images, len(names), tiers, end_s)
    else:
        yield from runner.run(images, tiers, pinned, count=len(names))


def _planned(
    runner: Runner, images: Iterator[ImageLike], left: int, tiers: Sequence[int], end_s: float
) -> Iterator[Outcome]:
    """Yield what became of `left` images, each batch on the tier that the plan chooses."""
    forecast, batch = runner.measure().forecast(), runner.max_batch
    image_s = {tier: forecast.p50(tier, batch) / batch / runner.parallel for tier in tiers}
    accuracy = tier_table(runner.bundle.tiers).accuracy
    plan = TimePlan(tiers, accuracy, image_s, end_s, runner.parallel)
    if late_s := plan.late_s(time.monotonic(), left):
        fastest = runner.bundle.tiers[tiers[0]].name
        report(
            f"--total-time is too short even for tier {fastest}, which may take"
            f" {duration(late_s)} longer"
        )

    def choose(done: int) -> tuple[int, str]:
        return plan.choose(time.monotonic(), left - done), "chosen for --total-time"

    for outcomes in runner.batches(images, choose, count=left):
        yield from outcomes
