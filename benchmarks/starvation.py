"""Requests pinned to `full` and a client pinned to `fast`: how many of the client's are in time.

    python benchmarks/starvation.py [--policy pace greedy] [--noise 0 0.3 1] [--budget-s 3 0.3]

The scheduler alone on a virtual clock: 200 bulk requests pinned to `full` with a budget of 10
minutes, each replaced once it is answered, and every 0.5 s a request pinned to `fast`, 60 in all.
A batch takes its predicted time, or that times 1 + noise * |normal|, by one seed.
"""

import argparse
import random
from collections import Counter
from heapq import heappop, heappush

from pcae_serve.scheduling.events import (
    Action,
    Arrived,
    Decoded,
    Dispatch,
    Done,
    Event,
    Reject,
    Remove,
    SetTimer,
    Timer,
)
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable

TIER_TABLE = TierTable(("fast", "mid", "full"), (0.9, 0.95, 1.0))
IMAGE_S, OVERHEAD_S, TAIL = (0.01, 0.03, 0.06), 0.002, 1.2
BULK, BULK_BUDGET_S = 200, 600.0
CLIENT, INTERVAL_S, FIRST_S = 60, 0.5, 1.0
END_S = 40.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", nargs="+", default=["pace", "greedy", "fixed:full"])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.3, 1.0])
    parser.add_argument("--budget-s", type=float, nargs="+", default=[3.0, 0.3])
    options = parser.parse_args()
    print(f"of {CLIENT} requests pinned to fast")
    for policy in options.policy:
        for budget_s in options.budget_s:
            for noise in options.noise:
                ends = dict(sorted(run(policy, noise, budget_s).items()))
                print(f"{policy}, budget {budget_s:g} s, noise {noise:g}: {ends}")


def run(policy: str, noise: float, budget_s: float) -> Counter[str]:
    """Return how the client's requests ended."""
    draw = random.Random(1)
    points = [
        {n: Seconds(each * n + OVERHEAD_S, (each * n + OVERHEAD_S) * TAIL) for n in (1, 4, 8)}
        for each in IMAGE_S
    ]
    scheduler = Scheduler(create(policy, TIER_TABLE, DEFAULT_PRICE), Latency(points, 32))
    requests, ends = list[Request](), dict[int, str]()
    agenda: list[tuple[float, int, Event]] = []
    order, timer_s = 0, END_S

    def push(event: Event) -> None:
        nonlocal order
        order += 1
        heappush(agenda, (event.now_s, order, event))

    def offer(now_s: float, deadline_s: float, tier: int) -> None:
        requests.append(Request(len(requests), now_s, deadline_s, (tier,)))
        push(Arrived(now_s, requests[-1]))

    for _ in range(BULK):
        offer(0.0, BULK_BUDGET_S, 2)
    for i in range(CLIENT):
        now_s = FIRST_S + i * INTERVAL_S
        offer(now_s, now_s + budget_s, 0)
    while agenda and min(timer_s, agenda[0][0]) < END_S:
        if timer_s < agenda[0][0]:
            event: Event = Timer(timer_s)
            timer_s = END_S
        else:
            _, _, event = heappop(agenda)
        now_s = event.now_s
        actions: list[Action] = scheduler.handle(event)
        if isinstance(event, Arrived) and not actions:
            push(Decoded(now_s, event.request.id))
        for action in actions:
            match action:
                case Dispatch(device=device, tier=tier, ids=ids):
                    took_s = IMAGE_S[tier] * len(ids) + OVERHEAD_S
                    took_s *= 1 + noise * abs(draw.gauss(0, 1))
                    push(Done(now_s + took_s, device, took_s))
                    for id_ in ids:
                        in_time = now_s + took_s <= requests[id_].deadline_s
                        ends[id_] = "in time" if in_time else "late"
                        if requests[id_].tiers == (2,):
                            offer(now_s + took_s, now_s + took_s + BULK_BUDGET_S, 2)
                case Reject(id=id_):
                    ends[id_] = "rejected"
                case Remove(id=id_, why=why):
                    ends[id_] = why
                case SetTimer(at_s=at_s):
                    timer_s = max(at_s, now_s)
    return Counter(ends.get(r.id, "unfinished") for r in requests if r.tiers == (0,))


if __name__ == "__main__":
    main()
