"""Random scheduler views from a seed, for decisions that are compared with recorded ones."""

from random import Random

from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.policies.base import SchedulerView
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.tiers import TierTable
from tests.support.scheduler_views import linear, view


def random_view(seed: int) -> tuple[TierTable, SchedulerView]:
    """Return 1 to 5 tiers and a view with up to 60 requests; do not change what a seed gives."""
    draw = Random(seed)
    tiers = draw.randint(1, 5)
    image_s = sorted(draw.uniform(0.002, 0.06) for _ in range(tiers))
    latency = linear(*((draw.uniform(0, s), s) for s in image_s), tail=draw.uniform(1.0, 1.5))
    accuracy = tuple(sorted(draw.uniform(0.3, 1) for _ in range(tiers)))
    table = TierTable(tuple(f"t{i}" for i in range(tiers)), accuracy)
    arrivals, now_s = Arrivals(), 0.0
    rate = draw.uniform(1, 200)
    for _ in range(draw.randint(0, 200)):
        now_s += draw.expovariate(rate)
        arrivals.observe(now_s, draw.choice((0.1, 0.3, 1.0, 5.0)))
    requests = []
    for i in range(draw.randint(1, 60)):
        low = draw.randint(0, tiers - 1)
        high = draw.choice((low, tiers - 1, tiers - 1))
        deadline_s = now_s + draw.uniform(0.01, draw.choice((0.3, 1, 5)))
        requests.append(Request(i, now_s - 0.05, deadline_s, tuple(range(low, high + 1))))
    devices = draw.choice((1, 1, 2, 3))
    return table, view(requests, latency=latency, now_s=now_s, arrivals=arrivals, devices=devices)
