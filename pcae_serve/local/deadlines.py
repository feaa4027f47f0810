"""Choose tier and batch under a budget, with the server's policy, as an idle server would.

The choice is made on the device's thread, when it is free: time that was spent waiting for batches
of other threads has passed by then.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.reader import Bundle
from pcae_serve.local.device import Device
from pcae_serve.local.looks import Answers, Group, Planner
from pcae_serve.runtime import refusals
from pcae_serve.runtime.latency_profile import Profile
from pcae_serve.runtime.tiers import tier_table
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.event_log import Setup
from pcae_serve.scheduling.events import Reject
from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE
from pcae_serve.scheduling.request_queue import Request

#: The server's default policy. It has no state, and never waits for further requests.
POLICY = "pace"


class Deadlines:
    """Runs images that share a deadline in batches that the policy chooses."""

    def __init__(self, bundle: Bundle, profile: Profile, max_batch: int) -> None:
        table = tier_table(bundle.tiers, bundle.manifest.calibration)
        setup = Setup(
            policy=POLICY,
            waiting_price=DEFAULT_PRICE,
            tier_table=table,
            seconds=profile.seconds(),
            max_batch=max_batch,
            queue_limit=1,
            devices=1,
        )
        self._bundle, self._latency = bundle, setup.latency()
        self._planner = Planner(
            bundle,
            setup,
            create(POLICY, table, DEFAULT_PRICE),
            self._latency,
            Escalations(table.escalations),
        )

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
        max_looks: int = 2,
    ) -> Iterator[Answers]:
        """Run images, numbered by the caller, before a deadline.

        tiers: allowed, the cheapest first. pinned: the caller named the tier, and images run once.
        dense: with patch grids. max_looks: how often an image may run. Yields answers as they
        become final, and the images that are too late.
        """
        looks = 1 if pinned else max_looks
        requests = [
            Request(id_, arrival_s, deadline_s, tuple(tiers), max_looks=looks) for id_ in pixels
        ]
        if requests:
            group = Group(self._planner, device, requests, pixels, pinned, dense)
            yield from group.first_looks()
            yield from group.second_looks()
