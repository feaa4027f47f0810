"""Choose tier and batch under a budget, with the server's policy, as an idle server would.

The choice is made on the device's thread, when it is free: time that was spent waiting for batches
of other threads has passed by then.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.reader import Bundle
from pcae_serve.errors import RequestError
from pcae_serve.local.device import Batch, Device
from pcae_serve.runtime import refusals
from pcae_serve.runtime.latency_profile import Profile
from pcae_serve.runtime.reasons import explain_tier
from pcae_serve.runtime.tiers import tier_table
from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.event_log import Setup
from pcae_serve.scheduling.events import Reject
from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE
from pcae_serve.scheduling.request_queue import Queue, Request

#: The server's default policy. It has no state, and never waits for further requests.
POLICY = "pace"


class Step:
    """A batch that ran, and the requests that were in it."""

    def __init__(self, tier: int, ids: tuple[int, ...], reason: str, batch: Batch) -> None:
        self.tier, self.ids, self.reason, self.batch = tier, ids, reason, batch


class Deadlines:
    """Runs images that share a deadline in batches that the policy chooses."""

    def __init__(self, bundle: Bundle, profile: Profile, max_batch: int) -> None:
        self._bundle, self._max_batch = bundle, max_batch
        table = tier_table(bundle.tiers)
        self._setup = Setup(
            policy=POLICY,
            waiting_price=DEFAULT_PRICE,
            tier_table=table,
            seconds=profile.seconds(),
            max_batch=max_batch,
            queue_limit=1,
            devices=1,
        )
        self._policy = create(POLICY, table, DEFAULT_PRICE)
        self._latency = self._setup.latency()

    def forecast(self) -> Forecast:
        """Return the latencies that are expected now."""
        return self._latency.forecast(time.monotonic())

    def check_budget(self, arrival_s: float, deadline_s: float, tiers: Sequence[int]) -> None:
        """Raise BudgetTooSmall if no allowed tier meets the budget on an idle machine."""
        request = Request(0, arrival_s, deadline_s, tuple(tiers))
        needed_s = self._latency.idle(tiers[0])
        if request.budget_s < needed_s:
            fastest = self._bundle.tiers[tiers[0]].name
            reject = Reject(0, "budget", needed_s, 0.0)
            raise refusals.rejected(reject, request, fastest, 1).error

    def run(
        self,
        device: Device,
        pixels: Mapping[int, NDArray[np.uint8]],
        arrival_s: float,
        deadline_s: float,
        tiers: Sequence[int],
        pinned: bool,
        dense: bool = False,
    ) -> Iterator[Step | tuple[tuple[int, ...], RequestError]]:
        """Run images, numbered by the caller, before a deadline.

        tiers: allowed, the cheapest first. pinned: the caller named the tier. dense: with patch
        grids. Yields each batch,
        and the numbers of images that are too late with their error.
        """
        queue, arrivals = Queue(), Arrivals()
        for id_ in pixels:
            queue.add(Request(id_, arrival_s, deadline_s, tuple(tiers)))
        arrivals.observe(arrival_s, deadline_s - arrival_s)

        def step() -> Step | None:
            now_s = time.monotonic()
            forecast = self._latency.forecast(now_s)
            if deadline_s < now_s + forecast.p50(tiers[0], 1):
                return None
            choice = self._policy.choose(
                SchedulerView(now_s, queue, forecast, arrivals, self._max_batch)
            )
            assert isinstance(choice, Run)  # this policy does not wait
            reason = "the caller names this tier"
            if not pinned:
                reason = explain_tier(
                    choice.requests[0],
                    choice.tier,
                    len(choice.requests),
                    forecast,
                    now_s,
                    self._setup,
                    POLICY,
                    self._bundle.dominated_above(tiers),
                )
            ids = tuple(request.id for request in choice.requests)
            tier = self._bundle.tiers[choice.tier]
            batch = device.compute(tier, [pixels[id_] for id_ in ids], dense)
            self._latency.observe(choice.tier, len(ids), batch.end_s - batch.start_s, batch.end_s)
            return Step(choice.tier, ids, reason, batch)

        while queue:
            done = device.call(step)
            if done is None:
                rest = tuple(request.id for request in queue)
                error, _ = refusals.expired_in_queue((deadline_s - arrival_s) * 1e3)
                yield rest, error
                return
            for id_ in done.ids:
                queue.remove(id_)
            yield done
