"""Run the images of one call: each once, then those whose answer is unsure again, if time is left.

As on a server, a first answer is never lost: it counts if the second look fails, or does not end in
time.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.probabilities import margin
from pcae_serve.bundle.reader import Bundle
from pcae_serve.errors import EngineFailed, RequestError, one_line
from pcae_serve.local.device import Batch, Device
from pcae_serve.runtime import refusals
from pcae_serve.runtime.reasons import explain_first_look, explain_second_look, explain_tier
from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.event_log import Setup
from pcae_serve.scheduling.latency import Latency
from pcae_serve.scheduling.policies.base import Policy, Run, SchedulerView
from pcae_serve.scheduling.policies.waiting_price import ACCURACY_PER_S
from pcae_serve.scheduling.request_queue import Queue, Request
from pcae_serve.scheduling.second_looks import SecondLooks, answer_by_s

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planner:
    """What chooses tiers and batches, the same for all calls."""

    bundle: Bundle
    setup: Setup
    policy: Policy
    latency: Latency
    escalations: Escalations


@dataclass(frozen=True)
class Look:
    """The answer to an image: a row of a batch. Times are on the monotonic clock."""

    tier: int
    batch: Batch
    row: int
    reason: str
    compute_s: float  # of all looks
    end_s: float  # when the answer became final
    looks: int = 1


#: Answers by the caller's number of the image; or images that are too late, and their error.
Answers = Mapping[int, Look] | tuple[tuple[int, ...], RequestError]


class Group:
    """The images of one call, which share a deadline."""

    def __init__(
        self,
        planner: Planner,
        device: Device,
        requests: Sequence[Request],
        pixels: Mapping[int, NDArray[np.uint8]],
        pinned: bool,
        dense: bool,
    ) -> None:
        """requests: at least one. pixels: by their ids. pinned: the caller named the tier."""
        self._planner, self._device, self._pixels = planner, device, pixels
        self._pinned, self._dense = pinned, dense
        self._example = example = requests[0]
        may_look = example.max_looks > 1 and bool(planner.escalations)
        self._escalations = planner.escalations if may_look else Escalations(())
        price_per_s = planner.setup.waiting_price * ACCURACY_PER_S
        self._looks = SecondLooks(self._escalations, price_per_s)
        self._held = dict[int, Look]()  # first answers that a second look may improve
        self._queue, self._arrivals = Queue(), Arrivals()
        for request in requests:
            self._queue.add(request)
        self._arrivals.observe(example.arrival_s, example.budget_s)

    def first_looks(self) -> Iterator[Answers]:
        """Run every image once; keep the answers that a second look may improve."""
        while self._queue:
            answers = self._device.call(self._first_look)
            if answers is None:
                error, _ = refusals.expired_in_queue(self._example.budget_s * 1e3)
                yield tuple(request.id for request in self._queue), error
                return
            yield answers

    def second_looks(self) -> Iterator[Answers]:
        """Run unsure images again while that is worth its time; then yield the first answers left.

        They are yielded shortly before the deadline, even if a second look is still running.
        """
        until_s = answer_by_s(self._example)
        while len(self._looks):
            running = self._device.submit(self._second_look)
            if not wait([running], max(0.0, until_s - time.monotonic())).done:
                running.cancel()
                break
            try:
                answers = running.result()
            except (EngineFailed, MemoryError) as error:
                log.warning("a second look failed, so the first answer counts: %s", one_line(error))
                break
            if not answers:
                break
            for id_ in answers:
                del self._held[id_]
            yield answers
        now_s = time.monotonic()
        yield {id_: replace(first, end_s=now_s) for id_, first in self._held.items()}

    def _first_look(self) -> dict[int, Look] | None:
        """Run the batch that the policy chooses, and return its final answers. None: too late."""
        now_s, planner, example = time.monotonic(), self._planner, self._example
        view = self._view(now_s)
        if example.deadline_s < now_s + view.forecast.p50(example.tiers[0], 1):
            return None
        run = planner.policy.choose(view)
        assert isinstance(run, Run)  # this policy does not wait
        reason = "the caller names this tier"
        if not self._pinned:
            reason = explain_tier(
                run.requests[0],
                run.tier,
                len(run.requests),
                view.forecast,
                now_s,
                planner.setup,
                planner.policy.name,
                planner.bundle.dominated_above(example.tiers),
            )
        batch = self._compute(run)
        for request in run.requests:
            self._queue.remove(request.id)
        took_s = batch.end_s - batch.start_s
        answers = dict[int, Look]()
        for row, request in enumerate(run.requests):
            look = Look(run.tier, batch, row, reason, took_s, batch.end_s)
            if request.max_looks > 1 and self._escalations:
                look = self._keep_if_unsure(look, request, run)
            if request.id not in self._held:
                answers[request.id] = look
        return answers

    def _keep_if_unsure(self, look: Look, request: Request, run: Run) -> Look:
        """Hold an answer that a second look may improve. Return it with its reason if it counts."""
        tier, found = self._planner.bundle.tiers[look.tier], self._margin(look)
        gains = self._escalations.gains(look.tier, found, request.tiers)
        if look.tier < request.tiers[-1]:  # else the reason of the best tier says it
            reason = explain_first_look(tier.name, max(gains.values(), default=0.0))
            look = replace(look, reason=reason)
        view = self._view(time.monotonic())
        if self._looks.offer(request, look.tier, found, view, len(run.requests)):
            self._held[request.id] = look
        return look

    def _second_look(self) -> dict[int, Look]:
        """Run the unsure images that gain most again; none if it is not worth their time."""
        view = self._view(time.monotonic())
        run = self._looks.choose(view, 0)
        if run is None:
            return {}
        self._looks.take([request.id for request in run.requests])
        batch, answers = self._compute(run), dict[int, Look]()
        for row, request in enumerate(run.requests):
            first = self._held[request.id]
            tier = self._planner.bundle.tiers[first.tier]
            reason = explain_second_look(tier.name, self._margin(first))
            compute_s = first.compute_s + batch.end_s - batch.start_s
            answers[request.id] = Look(run.tier, batch, row, reason, compute_s, batch.end_s, 2)
        return answers

    def _compute(self, run: Run) -> Batch:
        """Run a batch, and learn how long it took."""
        tier, size = self._planner.bundle.tiers[run.tier], len(run.requests)
        pixels = [self._pixels[request.id] for request in run.requests]
        batch = self._device.compute(tier, pixels, self._dense)
        took_s = batch.end_s - batch.start_s
        self._planner.latency.observe(run.tier, size, took_s, batch.end_s)
        return batch

    def _margin(self, look: Look) -> float:
        bundle = self._planner.bundle
        temperature = bundle.temperature(bundle.tiers[look.tier])
        return float(margin(look.batch.output.vectors[look.row], temperature))

    def _view(self, now_s: float) -> SchedulerView:
        return SchedulerView(
            now_s,
            self._queue,
            self._planner.latency.forecast(now_s),
            self._arrivals,
            self._planner.setup.max_batch,
            escalations=self._escalations or None,
        )
