"""Cost of scheduling decisions: microseconds of `choose` and of events, by policy and queue length.

    python benchmarks/decisions.py [--waiting 0 10 100 1000] [--rounds 300]

Medians and p99 over the rounds, on one thread. The policies decide in random order on the same
queues, so that disturbances on a shared machine affect all of them.
"""

import argparse
import random
from time import perf_counter

import numpy as np

from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.events import Arrived, ClientLeft, Decoded
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.policies.base import SchedulerView
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE
from pcae_serve.scheduling.request_queue import Queue, Request
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable

SHARES = (0.286, 0.364, 0.45, 0.54, 0.755, 1.0)  # of the MACs of keep ratio 1.0
TIER_TABLE = TierTable(tuple("abcdef"), (0.795, 0.841, 0.8565, 0.8611, 0.8638, 0.8639))
POINTS = [
    {b: Seconds(0.0018 + 0.00045 * b * share, 0.0019 + 0.00048 * b * share) for b in (1, 32)}
    for share in SHARES
]
BUDGETS_S = (0.007, 0.018, 0.112)
SPECS = ("pace", "greedy", "conservative", "slackfit", "infaas", "model-switching", "nexus:a")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--waiting", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    print("microseconds       waiting   median      p99")
    for waiting in options.waiting:
        taken = decisions(waiting, options.rounds)
        for what, seconds in taken.items():
            median, p99 = np.percentile(np.array(seconds) * 1e6, [50, 99])
            print(f"{what:18s} {waiting:7d} {median:8.1f} {p99:8.1f}")


def decisions(waiting: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds of every decision and event at this queue length."""
    draw = random.Random(0)
    policies = {spec: registry.create(spec, TIER_TABLE, DEFAULT_PRICE) for spec in SPECS}
    latency, taken = Latency(POINTS, 32), {spec: list[float]() for spec in SPECS}
    taken |= {"arrival": [], "arrival + queue": [], "leaving": []}
    scheduler = Scheduler(policies["pace"], Latency(POINTS, 32), max_batch=32, queue_limit=10**9)
    arrivals, now_s = Arrivals(), 0.0
    for _ in range(600):
        now_s += draw.expovariate(3000)
        arrivals.observe(now_s, draw.choice(BUDGETS_S))
    loose_s = max(3.0, waiting / 100)  # so that all are admitted
    for i in range(waiting):
        scheduler.handle(Arrived(now_s, Request(i, now_s, now_s + loose_s + i / 1e3, (0, 1, 2))))
        scheduler.handle(Decoded(now_s, i))
    for round_ in range(rounds):
        queue = Queue()
        for i in range(waiting):
            age_s = draw.random() * 0.003
            deadline_s = now_s - age_s + draw.choice(BUDGETS_S)
            tiers = draw.choice([range(6), range(6), range(6), range(2, 6), range(3, 4)])
            queue.add(Request(i, now_s - age_s, deadline_s, tuple(tiers)))
        view = SchedulerView(now_s, queue, latency.forecast(now_s), arrivals, 32)
        for spec in draw.sample(SPECS, len(SPECS)):
            start_s = perf_counter()
            policies[spec].choose(view)
            taken[spec].append(perf_counter() - start_s)
        id_ = waiting + round_
        request = Request(id_, now_s, now_s + loose_s / 2, (0, 1, 2))
        events = {
            "arrival": Arrived(now_s, request),
            "arrival + queue": Decoded(now_s, id_),
            "leaving": ClientLeft(now_s, id_),
        }
        for what, event in events.items():
            start_s = perf_counter()
            scheduler.handle(event)
            taken[what].append(perf_counter() - start_s)
    return taken


if __name__ == "__main__":
    main()
