"""Replay a workload against a live server over HTTP, open loop, and collect the responses.

    workload -> requests at their times (`load_generator`) -> responses -> rows of the report

All times count from when a request was due, not from when it was sent, so that a slow server does
not reduce its own load. How far the load generator lagged its schedule is reported; a run is
invalid if it lagged by more than MAX_LAG_S at p99.
"""

import csv
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any, Literal, Self
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray

from pcae_serve.errors import (
    TYPE_PREFIX,
    BudgetTooSmall,
    DeadlineExceeded,
    Dropped,
    Overloaded,
    OverShare,
    PcaeError,
    RateLimited,
    StartError,
    UploadTimeout,
    one_line,
)
from pcae_serve.loadtest import progress, report, workload
from pcae_serve.loadtest.load_generator import Responses, send
from pcae_serve.loadtest.payloads import Payloads
from pcae_serve.loadtest.platforms import BatchSeconds, Platform, TimedTier
from pcae_serve.loadtest.report import Row
from pcae_serve.loadtest.simulator import End, Outcome
from pcae_serve.loadtest.workload import Workload
from pcae_serve.scheduling.tiers import TierTable

#: A run whose requests were sent later than this at p99 measures the load generator.
MAX_LAG_S = 2e-3
#: Connections in addition to the largest number of requests that overlap within their budgets.
SPARE_CONNECTIONS = 16
#: Time to wait for responses after the last budget has passed.
GRACE_S = 10.0
#: Idle time of the server before a run.
PAUSE_S = 0.5
#: Interval between polls of /readyz.
POLL_S = 0.5

#: The end of a request by the type of its problem document; any other response is a failure.
ENDS = {
    TYPE_PREFIX + error.code: end
    for end, errors in {
        End.REJECTED: (BudgetTooSmall, Overloaded, OverShare, RateLimited),
        End.DROPPED: (Dropped,),
        End.EXPIRED: (DeadlineExceeded, UploadTimeout),
    }.items()
    for error in errors
}
#: Prefix of the connection faults among the client's figures.
_FAULT = "fault: "


@dataclass(frozen=True)
class LiveServer:
    """A running pcae-serve, as it describes itself under /tiers."""

    host: str
    port: int
    path: str
    info: Mapping[str, Any]

    @classmethod
    def connect(cls, url: str, ready_s: float = 0.0) -> Self:
        """Wait up to `ready_s` until the server is ready, and read /tiers.

        Raise StartError if no server answers, or if it is still not ready.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise StartError(f"{url!r} is not a plain http address such as http://127.0.0.1:8000")
        base = f"http://{parts.netloc}{parts.path.rstrip('/')}"
        try:
            _await_ready(base, ready_s)
            with urlopen(f"{base}/tiers", timeout=30) as response:
                info = json.load(response)
            if not all(tier["latency_ms"] for tier in info["tiers"]):
                raise StartError(f"{base} has not measured its latencies yet; wait for /readyz")
        except (URLError, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, HTTPError) and error.code in (401, 403):
                raise StartError(
                    f"{base} requires an API key, which replay does not send: start it without"
                    " --api-keys-file"
                ) from None
            why = getattr(error, "reason", None) or one_line(error)
            why = getattr(why, "strerror", None) or why
            raise StartError(f"no pcae-serve answers at {base}: {why}") from None
        return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/"), info)

    @property
    def policy(self) -> str:
        return str(self.info["policy"])

    @property
    def labels(self) -> Sequence[str]:
        labels: Sequence[str] = self.info["labels"]
        return labels

    @property
    def tiers(self) -> list[int]:
        """The tiers that `auto` uses."""
        return [i for i, tier in enumerate(self.info["tiers"]) if not tier["dominated"]]

    @property
    def full_s(self) -> float:
        """The last tier's latency at batch 1, the unit of budget mixes."""
        return float(self.info["tiers"][-1]["latency_ms"]["1"]) / 1e3

    @cached_property
    def tier_table(self) -> TierTable:
        qualities = [
            (tier["accuracy"] or {}).get("top1")
            or (tier["agreement"] or {}).get("share")
            or (tier["fidelity"] or {}).get("cosine")
            or 0.0
            for tier in self.info["tiers"]
        ]
        return TierTable(tuple(tier["name"] for tier in self.info["tiers"]), tuple(qualities))

    @property
    def platform(self) -> Platform:
        """The tiers as a simulated platform; p99 is set to the median, as /tiers reports no p99."""
        tiers = [
            TimedTier(
                name=tier["name"],
                accuracy=max(0.0, accuracy),
                points=tuple(
                    BatchSeconds(batch=int(batch), p50_s=ms / 1e3, p99_s=ms / 1e3)
                    for batch, ms in tier["latency_ms"].items()
                ),
            )
            for tier, accuracy in zip(self.info["tiers"], self.tier_table.accuracy, strict=True)
        ]
        return Platform(source=self.description, tiers=tuple(tiers))

    def compute_seconds(self) -> dict[str, float]:
        """Return the devices' `busy` seconds and the wasted ones by reason; {} without /metrics."""
        try:
            with urlopen(f"{self.base}/metrics", timeout=30) as response:
                text = response.read().decode()
        except OSError:  # /metrics is not served
            return {}
        busy_s = [float(value) for _, value in _series(text, "pcae_compute_seconds_total")]
        wasted = _series(text, "pcae_wasted_compute_seconds_total")
        return {"busy": sum(busy_s)} | {reason: float(value) for reason, value in wasted}

    @property
    def base(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.path}"

    @property
    def description(self) -> str:
        info = self.info
        return (
            f"{self.base}: bundle {info['bundle']}, {info['backend']}"
            f" {info['backend_version']} on {info['device']}"
        )

    def request(self, budget_s: float, image: bytes) -> bytes:
        """Return a whole HTTP request for one image."""
        query = {"budget_ms": f"{1e3 * budget_s:.3f}"}
        if self.info["answers"] != "features":
            route, query = "classify", query | {"top_k": "1"}
        else:
            route = "embed"
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = (
            f"POST {self.path}/{route}?{urlencode(query)} HTTP/1.1\r\nHost: {host}:{self.port}\r\n"
            f"Content-Type: application/octet-stream\r\nContent-Length: {len(image)}\r\n\r\n"
        )
        return head.encode() + image


def _await_ready(base: str, ready_s: float) -> None:
    """Poll /readyz until it answers 200. Raise StartError if it does not within `ready_s`.

    A refused connection is waited for too: a server that was just started does not listen yet.
    """
    deadline_s = time.monotonic() + ready_s
    waiting = False
    while True:
        late = time.monotonic() >= deadline_s
        try:
            with urlopen(f"{base}/readyz", timeout=30):
                return
        except HTTPError as error:
            if error.code != 503:
                raise
            why = read_problem(error.read(), "detail") or "starting"
            if late:
                raise StartError(f"{base} is not ready: {why}") from None
        except URLError as error:
            if late or not isinstance(error.reason, ConnectionRefusedError):
                raise
            why = "connection refused"
        if not waiting:
            progress.report(f"{base} is not ready yet ({why}); waiting up to {ready_s:g} s")
            waiting = True
        time.sleep(min(POLL_S, max(0.0, deadline_s - time.monotonic())))


@dataclass(frozen=True)
class Answer:
    """The body of a 200 response."""

    tier: str
    met_budget: bool
    index: int | None  # of the first class; None if the server returns features


@dataclass(frozen=True)
class Run:
    """One run, request by request."""

    trace: str
    rate: float | None
    seed: int
    load: Workload
    responses: Responses
    answers: Sequence[Answer | None]  # [n]; None: not answered
    labels: NDArray[np.int64] | None  # [n]
    compute_s: Mapping[str, float]  # device seconds during the run: busy, and wasted by reason

    @property
    def right(self) -> NDArray[np.bool_] | None:
        """[n], whether the first class equals the label; None without labels."""
        if self.labels is None:
            return None
        pairs = zip(self.answers, self.labels, strict=True)
        return np.array([a is not None and a.index == label for a, label in pairs])

    def outcome(self, tier_table: TierTable) -> Outcome:
        """Return the outcome in the simulation's form, without batch sizes."""
        times_s, budgets_s = self.load.times_s, self.load.budgets_s
        responses = self.responses
        ended_s = np.where(np.isnan(responses.ended_s), times_s, responses.ended_s)
        types = [read_problem(body, "type") for body in responses.bodies]
        end = np.array([ENDS.get(each, End.FAILED) for each in types], np.int8)
        answered = np.array([answer is not None for answer in self.answers])
        late = responses.ended_s > times_s + budgets_s
        end[answered] = np.where(late[answered], End.LATE, End.IN_TIME)
        tier = [-1 if a is None else tier_table.index(a.tier) for a in self.answers]
        outcome = Outcome(times_s, budgets_s, end, np.array(tier, np.int16), ended_s)
        outcome.span_s = float(ended_s.max() - times_s[0])
        outcome.busy_s, outcome.late_s, outcome.cancelled_s, outcome.padding_s = (
            self.compute_s.get(name, 0.0) for name in ("busy", "late", "cancelled", "padding")
        )
        return outcome

    @property
    def lag_s(self) -> NDArray[np.float64]:
        """[n], from due to sent; a request that was never sent lags until the end of the run."""
        sent_s = self.responses.sent_s
        last_s = float(np.nanmax(self.responses.ended_s, initial=self.load.times_s[-1]))
        return np.where(np.isnan(sent_s), last_s, sent_s) - self.load.times_s


def check_server(server: LiveServer, payloads: Payloads) -> None:
    """Send one request with a large budget. Raise StartError unless it is answered."""
    request = server.request(60.0, payloads.bodies[0])
    responses = send(server.host, server.port, [request], [0.0], 1, 60.0)
    if responses.status[0] != 200:
        why = read_problem(responses.bodies[0], "detail") or ", ".join(+responses.faults)
        status = responses.status[0] or ""
        raise StartError(f"the test request was not answered: {status} {why}".rstrip())


def run(
    server: LiveServer,
    payloads: Payloads,
    trace: str,
    mix: str,
    rate: float | None,
    count: int,
    seed: int,
) -> Run:
    """Send one workload, with randomly chosen payloads, and collect the responses."""
    load = workload.make(trace, mix, rate, count, server.full_s, seed)
    random = np.random.default_rng([seed, 2])
    picks = random.integers(len(payloads.bodies), size=len(load.times_s))
    requests = [
        server.request(budget_s, payloads.bodies[i])
        for budget_s, i in zip(load.budgets_s.tolist(), picks, strict=True)
    ]
    connections = ceil(1.1 * max_overlap(load)) + SPARE_CONNECTIONS
    grace_s = float(load.budgets_s.max()) + GRACE_S
    time.sleep(PAUSE_S)
    due_s, before = load.times_s.tolist(), server.compute_seconds()
    responses = send(server.host, server.port, requests, due_s, connections, grace_s)
    after = server.compute_seconds()
    compute_s = {name: s - before.get(name, 0.0) for name, s in after.items()}
    labels = None if payloads.labels is None else payloads.labels[picks]
    ends = zip(responses.bodies, responses.status.tolist(), strict=True)
    answers = [parse_answer(body, status) for body, status in ends]
    return Run(trace, rate, seed, load, responses, answers, labels, compute_s)


def make_row(
    server: LiveServer, runs: Sequence[Run], mix: str, capacity_per_s: float | None
) -> Row:
    """Return the row of the report for the seeds of one trace and rate."""
    first = runs[0]
    n, span_s = len(first.load.times_s), float(first.load.times_s[-1])
    rate = first.rate or ((n - 1) / span_s if span_s else None)
    figures = [
        report.figures(run.outcome(server.tier_table), server.tier_table, server.tiers, run.right)
        for run in runs
    ]
    return Row(
        policy=server.policy,
        trace=first.trace,
        mix=mix,
        load=None if capacity_per_s is None or rate is None else rate / capacity_per_s,
        rate=rate,
        offered=n,
        runs=tuple(figures),
        client=client_figures(runs),
    )


def max_overlap(load: Workload) -> int:
    """Return the most requests that are open at once if each takes its whole budget."""
    ends_s = np.sort(load.times_s + load.budgets_s)
    begun = np.arange(1, len(ends_s) + 1)
    return int((begun - np.searchsorted(ends_s, load.times_s)).max())


def parse_answer(body: bytes, status: int) -> Answer | None:
    """Parse the body of a response; None unless the status is 200."""
    if status != 200:
        return None
    fields = json.loads(body)
    index = fields["predictions"][0]["index"] if "predictions" in fields else None
    return Answer(fields["tier"], fields["met_budget"], index)


def read_problem(body: bytes, member: Literal["type", "detail"]) -> str:
    """Return a member of a problem document, or "" if the body is not one."""
    try:
        return str(json.loads(body)[member])
    except (ValueError, KeyError, TypeError):
        return ""


def client_figures(runs: Sequence[Run]) -> dict[str, float]:
    """Return what the load generator measured, over all seeds: lag, statuses, faults."""
    lag_ms = 1e3 * np.concatenate([run.lag_s for run in runs])
    answers = [answer for run in runs for answer in run.answers]
    took_ms = np.concatenate([1e3 * (run.responses.ended_s - run.load.times_s) for run in runs])
    statuses = np.concatenate([run.responses.status for run in runs])
    figures = {
        "lag_p50_ms": float(np.percentile(lag_ms, 50)),
        "lag_p99_ms": float(np.percentile(lag_ms, 99)),
        "met_by_server": sum(a is not None and a.met_budget for a in answers) / len(answers),
    }
    for status in sorted({int(s) for s in statuses} - {0, 200}):
        status_ms = took_ms[statuses == status]
        figures[f"{status}_count"] = len(status_ms)
        figures[f"{status}_p50_ms"] = float(np.percentile(status_ms, 50))
        figures[f"{status}_p99_ms"] = float(np.percentile(status_ms, 99))
    for why, count in sum((run.responses.faults for run in runs), Counter[str]()).items():
        figures[f"{_FAULT}{why}"] = count  # above 0: `sum` of counters omits the others
    figures["void"] = bool(figures["lag_p99_ms"] > 1e3 * MAX_LAG_S)
    return figures


def client_lines(row: Row) -> Iterator[str]:
    """Describe the client's figures of a row."""
    client = row.client
    yield (
        f"{row.trace}, {row.level}: load generator lag p50 {client['lag_p50_ms']:.2f} ms, p99"
        f" {client['lag_p99_ms']:.2f} ms{' (INVALID)' if client['void'] else ''}; in time by the"
        f" server's clock: {100 * client['met_by_server']:.1f} %"
    )
    for status in sorted({name[:3] for name in client if name.endswith("_count")}):
        yield (
            f"  status {status}: {client[f'{status}_count']:.0f} responses, after p50"
            f" {client[f'{status}_p50_ms']:.1f} ms, p99 {client[f'{status}_p99_ms']:.1f} ms"
        )
    for name in client:
        if name.startswith(_FAULT):
            yield f"  {name.removeprefix(_FAULT)}: {client[name]:.0f}"


def write_requests(path: Path, runs: Sequence[Run], tier_table: TierTable) -> None:
    """Write every request of every run as CSV; a cell without a value is empty."""
    columns = (
        "trace", "rate", "seed", "scheduled_s", "sent_s", "ended_s", "budget_ms", "status", "end",
        "tier", "right", "met_budget",
    )  # fmt: skip
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for run in runs:
                ends, right = run.outcome(tier_table).end, run.right
                for i, answer in enumerate(run.answers):
                    writer.writerow(
                        (
                            run.trace,
                            run.rate or "",
                            run.seed,
                            f"{run.load.times_s[i]:.6f}",
                            _format_seconds(run.responses.sent_s[i]),
                            _format_seconds(run.responses.ended_s[i]),
                            f"{1e3 * run.load.budgets_s[i]:.3f}",
                            run.responses.status[i],
                            End(ends[i]).name.lower(),
                            answer.tier if answer else "",
                            "" if right is None or answer is None else int(right[i]),
                            int(answer.met_budget) if answer else "",
                        )
                    )
    except OSError as error:
        raise PcaeError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Restrict this process to one CPU for the duration of the block."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError:
            allowed = ", ".join(map(str, sorted(before)))
            raise StartError(f"--pin {cpu}: this process may use the CPUs {allowed}") from None
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _series(text: str, name: str) -> list[tuple[str, str]]:
    """Return (label value, value) of the series of a metric with one label."""
    return re.findall(rf'^{name}\{{\w+="([^"]*)"\}} (\S+)', text, re.MULTILINE)


def _format_seconds(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6f}"
