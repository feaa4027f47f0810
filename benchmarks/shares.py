"""Callers that share a busy server: what each gets, with caller shares and without.

    python benchmarks/shares.py [--scenario NAME …] [--profile cpu gpu] [--seeds N] [--json FILE]

The scheduler alone on a virtual clock; service times are drawn from a built-in profile. "Without"
is the same scheduler, which knows no callers. Every client is closed-loop (so many connections,
each sends its next request once the last one is answered, or RETRY_S after a refusal) or open-loop
(a Poisson process). Rates are in parts of the machine's capacity on the cheapest tier, in batches
of useful size; budgets in multiples of the last tier's latency at batch 1.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from random import Random
from statistics import fmean

from pcae_serve.loadtest import platforms
from pcae_serve.loadtest.platforms import Platform
from pcae_serve.loadtest.simulator import draw
from pcae_serve.scheduling.events import (
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
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler

MAX_BATCH, QUEUE_LIMIT = 32, 256
#: Length of a run, and its first part, which is not counted, in multiples of the longest budget or
#: of 20 ordinary ones.
RUN, WARM_UP = 12, 2
#: Requests of one run at most, about: the run is cut short.
REQUESTS = 8_000
#: A closed-loop client sends its next request PAUSE after an answer, and after a refusal so that
#: all its connections together send one in RETRY; in multiples of the last tier's latency at
#: batch 1.
PAUSE, RETRY = 0.1, 0.05


@dataclass(frozen=True)
class Client:
    """A caller and how it sends."""

    name: str
    budget: float  # in multiples of the last tier's latency at batch 1
    rate: float = 0.0  # open loop, in parts of the machine's capacity
    connections: int = 0  # closed loop
    batch: int = 1  # images per request
    weight: float = 1.0
    tier: int | None = None  # the only one allowed
    on: tuple[float, float] = (1.0, 0.0)  # active and silent times in turn, in parts of the run
    fair: float = 0.0  # a polite client: its part of its fair share, for the report


def polite(budget: float, rate: float = 0.25, fair: float = 0.5, **changes: float) -> Client:
    return Client("polite", budget, rate, fair=fair, **changes)  # type: ignore[arg-type]


SCENARIOS: dict[str, tuple[Client, ...]] = {
    "10 connections": (Client("greedy", 8, connections=10), polite(8)),
    "100 connections": (Client("greedy", 8, connections=100), polite(8)),
    "batches of 64": (Client("greedy", 50, connections=4, batch=64), polite(8)),
    "batches of 64, polite batches of 16": (
        Client("greedy", 50, connections=4, batch=64),
        polite(20, batch=16),
    ),
    "long budgets": (Client("greedy", 1000, connections=300), polite(8)),
    "long budgets, pinned to the last tier": (
        Client("greedy", 1000, connections=300, tier=-1),
        polite(8),
    ),
    "short budgets": (Client("greedy", 4, connections=50), polite(50)),
    "open loop at 2 times the capacity": (Client("greedy", 8, rate=2.0), polite(8)),
    "open loop at 2, five polite clients": (
        Client("greedy", 8, rate=2.0),
        *(Client(f"polite{i}", 8, rate=0.5 / 6, fair=0.5) for i in range(5)),
    ),
    "weights 1, 2 and 4": tuple(
        Client(f"weight{w}", 8, connections=60, weight=w) for w in (1, 2, 4)
    ),
    "weights 1, 2 and 4, open loop at 1 each": tuple(
        Client(f"weight{w}", 8, rate=1.0, weight=w) for w in (1, 2, 4)
    ),
    "greedy on and off": (Client("greedy", 8, rate=2.0, on=(0.1, 0.1)), polite(8)),
    "polite on and off": (
        Client("greedy", 8, rate=2.0),
        Client("polite", 8, rate=0.25, on=(0.1, 0.1), fair=0.5),
    ),
    "tiny requests": (Client("greedy", 50, connections=300, tier=0), polite(8)),
    "a greedy client alone": (Client("greedy", 8, rate=2.0),),
    "a greedy client, and one that sends little": (
        Client("greedy", 8, connections=100),
        polite(8, rate=0.02, fair=0.04),
    ),
    "20 callers that send little, and a greedy one": (
        Client("greedy", 8, connections=100),
        *(Client(f"polite{i}", 8, rate=0.01, fair=0.21) for i in range(20)),
    ),
    "no overload: 0.4 and 0.4": (Client("one", 8, rate=0.4), Client("two", 8, rate=0.4)),
}


@dataclass
class Counts:
    """How one client's requests ended: those that arrived after the warm-up."""

    span_s: float
    offered: int = 0
    in_time: int = 0
    accuracy: float = 0.0  # sum over the answers in time
    ends: Counter[str] = field(default_factory=Counter)

    @property
    def attainment(self) -> float:
        return self.in_time / max(1, self.offered)

    @property
    def per_s(self) -> float:
        """Answers in time per second."""
        return self.in_time / self.span_s


#: Counts by client, one of each seed.
Runs = dict[str, list[Counts]]


class World:
    """The scheduler, its devices and the clients."""

    def __init__(
        self,
        platform: Platform,
        policy: str,
        clients: tuple[Client, ...],
        *,
        shares: bool,
        seed: int,
    ) -> None:
        self.clients, self.shares = clients, shares
        self.unit_s = platform.full_s
        latency = platform.latency(MAX_BATCH)
        forecast = latency.forecast(0.0)
        useful = min(MAX_BATCH, forecast.useful_batch(0))
        self.per_s = useful / forecast.p50(0, useful)
        self.tiers = tuple(range(len(platform.tiers)))
        weights = {client.name: client.weight for client in clients}
        self.scheduler = Scheduler(
            create(policy, platform.tier_table, DEFAULT_PRICE),
            latency,
            max_batch=MAX_BATCH,
            queue_limit=QUEUE_LIMIT,
            weights=weights,
        )
        self.seconds = draw(platform.seconds(MAX_BATCH), MAX_BATCH, seed + 1)
        self.random = Random(seed)
        longest = max(20 * 8.0, *(client.budget for client in clients))
        self.span_s = RUN * longest * self.unit_s
        self.span_s = min(self.span_s, max(REQUESTS / self.per_s / 2, 4 * longest * self.unit_s))
        self.count_from_s = self.span_s * WARM_UP / RUN
        self.accuracy = platform.tier_table.accuracy
        span_s = self.span_s - self.count_from_s
        self.counts = {client.name: Counts(span_s) for client in clients}
        self.requests: list[Request] = []
        self.of: list[tuple[Client, int]] = []  # by request: its client and its group
        self.left: list[int] = []  # images left, by group
        self.agenda: list[tuple[float, int, Event | Callable[[float], None]]] = []
        self.order, self.timer_s = 0, float("inf")

    def run(self) -> dict[str, Counts]:
        for client in self.clients:
            for _ in range(client.connections):
                self.at(
                    self.random.uniform(0, client.budget * self.unit_s / 4), self.sender(client)
                )
            if client.rate:
                self.at(self.gap_s(client), self.sender(client))
        while self.agenda:
            if self.timer_s < self.agenda[0][0]:
                now_s, self.timer_s = self.timer_s, float("inf")
                self.handle(Timer(now_s))
                continue
            now_s, _, event = heappop(self.agenda)
            if now_s > self.span_s:
                break
            if callable(event):
                event(now_s)
            else:
                self.handle(event)
        return self.counts

    def at(self, time_s: float, event: Event | Callable[[float], None]) -> None:
        self.order += 1
        heappush(self.agenda, (time_s, self.order, event))

    def gap_s(self, client: Client) -> float:
        return self.random.expovariate(client.rate * self.per_s / client.batch)

    def sender(self, client: Client) -> Callable[[float], None]:
        def send(now_s: float) -> None:
            if client.rate:
                self.at(now_s + self.gap_s(client), send)
            on, off = (part * self.span_s for part in client.on)
            if off and now_s % (on + off) > on:
                if not client.rate:
                    self.at(now_s + on, send)
                return
            self.left.append(client.batch)
            for _ in range(client.batch):
                id_ = len(self.requests)
                tiers = self.tiers if client.tier is None else (self.tiers[client.tier],)
                caller = client.name if self.shares else ""
                deadline_s = now_s + client.budget * self.unit_s
                self.requests.append(Request(id_, now_s, deadline_s, tiers, caller=caller))
                self.of.append((client, len(self.left) - 1))
                if now_s >= self.count_from_s and deadline_s < self.span_s:
                    self.counts[client.name].offered += 1
            for request in self.requests[-client.batch :]:
                self.handle(Arrived(now_s, request))

        return send

    def end(self, id_: int, now_s: float, how: str, accuracy: float = 0.0) -> None:
        client, group = self.of[id_]
        request = self.requests[id_]
        if request.arrival_s >= self.count_from_s and request.deadline_s < self.span_s:
            counts = self.counts[client.name]
            counts.ends[how] += 1
            if how == "in_time":
                counts.in_time += 1
                counts.accuracy += accuracy
        self.left[group] -= 1
        if client.connections and not self.left[group]:
            retry = RETRY * client.connections * client.batch
            pause = max(PAUSE, retry) if how.startswith("rejected") else PAUSE
            self.at(now_s + pause * self.unit_s, self.sender(client))

    def handle(self, event: Event) -> None:
        now_s, rejected = event.now_s, False
        for action in self.scheduler.handle(event):
            match action:
                case Dispatch(device=device, tier=tier, ids=ids):
                    took_s = self.seconds(tier, len(ids))
                    self.at(now_s + took_s, self.done(ids, self.accuracy[tier]))
                    self.at(now_s + took_s, Done(now_s + took_s, device, took_s))
                case Reject(id=id_, why=why):
                    rejected = True
                    self.end(id_, now_s, f"rejected_{why}")
                case Remove(id=id_, why=why):
                    self.end(id_, now_s, why)
                case SetTimer(at_s=at_s):
                    self.timer_s = max(at_s, now_s)
        if isinstance(event, Arrived) and not rejected:
            self.handle(Decoded(now_s, event.request.id))

    def done(self, ids: tuple[int, ...], accuracy: float) -> Callable[[float], None]:
        def end(now_s: float) -> None:
            for id_ in ids:
                late = now_s > self.requests[id_].deadline_s
                self.end(id_, now_s, "late" if late else "in_time", accuracy)

        return end


def compare(name: str, platform: Platform, policy: str, seeds: int) -> dict[str, Runs]:
    """Return the counts of each client, without shares and with them."""
    results: dict[str, Runs] = {}
    for label, shares in (("without", False), ("with", True)):
        runs: Runs = {}
        for seed in range(seeds):
            world = World(platform, policy, SCENARIOS[name], shares=shares, seed=seed)
            for client, counts in world.run().items():
                runs.setdefault(client, []).append(counts)
        results[label] = runs
    return results


def report(results: dict[str, Runs]) -> list[str]:
    """Return a line per client, and one of all: means over the seeds, without shares and with."""
    lines = []
    for client in results["with"]:
        cells = [
            f"{100 * fmean(c.attainment for c in runs[client]):5.1f} %"
            f" {fmean(c.per_s for c in runs[client]):8.1f}/s"
            for runs in (results["without"], results["with"])
        ]
        lines.append(f"  {client:12} {'   '.join(cells)}")
    every = {
        label: [c for runs in result.values() for c in runs] for label, result in results.items()
    }
    answers = {label: sum(c.in_time for c in counts) for label, counts in every.items()}
    accuracy = {
        label: sum(c.accuracy for c in counts) / max(1, answers[label])
        for label, counts in every.items()
    }
    kept = 100 * answers["with"] / answers["without"]
    right = kept * accuracy["with"] / accuracy["without"]
    lines.append(
        f"  with shares {kept:.1f} % of the answers in time; accuracy {accuracy['without']:.4f} ->"
        f" {accuracy['with']:.4f}, {right:.1f} % of the right answers"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", nargs="+", default=list(SCENARIOS))
    parser.add_argument("--profile", nargs="+", default=["cpu"])
    parser.add_argument("--policy", default="pace")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every: dict[str, dict[str, Runs]] = {}
    for profile in options.profile:
        print(f"profile {profile}: attainment and answers in time, without shares and with")
        for name in options.scenario:
            results = compare(name, platforms.read(profile), options.policy, options.seeds)
            every[f"{profile}: {name}"] = results
            print("\n".join([name, *report(results)]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(every, default=vars) + "\n")


if __name__ == "__main__":
    main()
