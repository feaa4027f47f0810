"""pcae-serve replay: a trace against a live server, open loop, as real traffic comes.

    workload -> a request at its time (`sender`) -> what came back -> report

Every time is counted from when a request was due, not from when it was sent, so that a slow server
cannot slow its own load down. How far the sender itself fell behind is told, and voids the run
beyond MAX_LAG_S. It knows the REST API; it does not know how the server schedules.
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
from typing import Any, Self
from urllib.error import URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from pcae_serve.errors import PcaeError, StartError, one_line
from pcae_serve.loadtest import report, workload
from pcae_serve.loadtest.load_generator import Sent, send
from pcae_serve.loadtest.payloads import Images
from pcae_serve.loadtest.platforms import BatchSeconds, Platform, TimedTier
from pcae_serve.loadtest.report import FAILED, Row
from pcae_serve.loadtest.simulation import capacity, told
from pcae_serve.loadtest.simulator import End, Outcome
from pcae_serve.loadtest.traffic import Count, Traffic
from pcae_serve.loadtest.workload import Workload
from pcae_serve.scheduling.tiers import TierTable
from pcae_serve.settings import MAX_BATCH

#: A sender that lags more at p99 measures itself: the run says nothing of the server.
MAX_LAG_S = 2e-3
#: Connections beyond those that budgets let be in hand at once.
SPARE = 16
#: Waited for answers after the last budget has passed.
PATIENCE_S = 10.0
#: The server has this long to be idle before a run.
PAUSE_S = 0.5

#: What a status says of a request that was not answered; any other is a failure.
ENDS = {422: End.REFUSED, 503: End.REFUSED, 504: End.EXPIRED}
#: Before the names of what went wrong on connections, among the client's figures.
_FAULT = "fault: "


class Replay(Traffic):
    """Send a trace to a running server, open loop, and report what became of every request."""

    url: CliPositionalArg[str] = Field(description="of the server, as http://127.0.0.1:8000")
    rate: list[float] | None = Field(None, description="requests a second, as 20,40")
    load: list[float] | None = Field(
        None, description="instead of --rate: arrivals in multiples of --capacity"
    )
    capacity: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="requests a second that load 1 means; else"
        " worked out from the latencies that the server tells",
    )  # fmt: skip
    requests: Count = Field(2000, description="of every run; all of them count")
    seeds: Count = Field(1, description="how often each trace and rate is run, from seed 0")
    images: Path | None = Field(
        None,
        description="an image, a folder of them, or a parquet file with `image` and `label` (needs"
        " pyarrow); a sample if left out",
    )
    labels: str | None = Field(
        None,
        description="count right answers: a .csv file with the columns file,label, or `folders`"
        " (their names are the labels), or `column` of the parquet file",
    )
    pin: int | None = Field(
        None,
        ge=0,
        description="core to send from; keep the server off it:"
        " taskset -c 0 pcae-serve --threads 1",
    )
    rows: Path | None = Field(None, description="also write every request there, as CSV")
    json_: Path | None = Field(None, alias="json", description="also write the figures there")
    png: Path | None = Field(None, description="also draw attainment over accuracy recovered")

    @model_validator(mode="after")
    def _some_pace(self) -> Self:
        files = all(trace.endswith(".csv") for trace in self.trace)  # those have a pace
        if not (self.load or self.rate or files):
            raise ValueError("say how fast requests come: --rate, or --load")
        return self

    def cli_cmd(self) -> None:
        report.require("pcae-serve replay")
        traces = self.traces()
        server = Server.ask(self.url)
        images = Images.load(self.images, self.labels, server.labels)
        known = self._capacity(server)
        rows, records = list[Row](), list[Record]()
        with pinned(self.pin):
            self._try(server, images)
            for trace in traces:
                for rate in self._rates(trace, known):
                    runs = [
                        self._run(server, images, trace, rate, seed) for seed in range(self.seeds)
                    ]
                    records += runs
                    rows.append(self._row(server, runs, known))
        void = any(row.client["void"] for row in rows)
        labelled = images.labels is not None
        notes = [server.words, *(line for row in rows for line in client_lines(row))]
        report.show(rows, notes, labels=labelled)
        if self.rows is not None:
            write_rows(self.rows, records, server.tier_table)
        if self.json_ is not None:
            about = {
                "command": "replay",
                "settings": self.model_dump(mode="json"),
                "capacity_per_s": known,
                "server": server.told,
                "void": void,
            }
            report.write_json(self.json_, rows, about, labels=labelled)
        if self.png is not None:
            report.write_png(self.png, rows, server.words)
        if void:
            raise PcaeError(
                f"void: the sender fell more than {1e3 * MAX_LAG_S:g} ms behind at p99, so the"
                " figures are its own: give it a core (see --pin), or less load"
            )

    def _capacity(self, server: "Server") -> float | None:
        if self.capacity is not None or not self.load:
            return self.capacity
        with told(f"working out the capacity for {self.mix} budgets"):
            found = capacity(server.platform, self.mix, MAX_BATCH)
        if found <= 0:
            raise StartError(f"no rate of {self.mix} budgets is served in time: give --rate")
        return found

    def _rates(self, trace: str, known: float | None) -> Sequence[float | None]:
        if self.rate:
            return self.rate
        if self.load:
            assert known is not None  # _capacity has seen to it
            return [load * known for load in self.load]
        return [None]

    def _try(self, server: "Server", images: Images) -> None:
        """One request with all the time in the world: does the server take such images?"""
        request = server.request(60.0, images.bodies[0])
        sent = send(server.host, server.port, [request], [0.0], 1, 60.0)
        if sent.status[0] != 200:
            why = problem(sent.bodies[0]) or ", ".join(+sent.faults)
            raise StartError(f"the server does not answer: {sent.status[0] or ''} {why}".rstrip())

    def _run(
        self, server: "Server", images: Images, trace: str, rate: float | None, seed: int
    ) -> "Record":
        load = workload.make(trace, self.mix, rate, self.requests, server.full_s, seed)
        random = np.random.default_rng([seed, 2])
        picks = random.integers(len(images.bodies), size=len(load.times_s))
        requests = [
            server.request(budget_s, images.bodies[i])
            for budget_s, i in zip(load.budgets_s.tolist(), picks, strict=True)
        ]
        connections = ceil(1.1 * in_hand(load)) + SPARE
        patience_s = float(load.budgets_s.max()) + PATIENCE_S
        time.sleep(PAUSE_S)
        due_s, before = load.times_s.tolist(), server.compute()
        sent = send(server.host, server.port, requests, due_s, connections, patience_s)
        spent = {name: s - before.get(name, 0.0) for name, s in server.compute().items()}
        labels = None if images.labels is None else images.labels[picks]
        ends = zip(sent.bodies, sent.status.tolist(), strict=True)
        answers = [read(body, status) for body, status in ends]
        return Record(trace, rate, seed, load, sent, answers, labels, spent)

    def _row(self, server: "Server", runs: Sequence["Record"], known: float | None) -> Row:
        first = runs[0]
        n, span_s = len(first.load.times_s), float(first.load.times_s[-1])
        rate = first.rate or ((n - 1) / span_s if span_s else None)
        figures = [
            report.figures(
                run.outcome(server.tier_table), server.tier_table, server.tiers, run.right
            )
            for run in runs
        ]
        return Row(
            policy=server.policy,
            trace=first.trace,
            mix=self.mix,
            load=None if known is None or rate is None else rate / known,
            rate=rate,
            offered=n,
            runs=tuple(figures),
            client=client_figures(runs),
        )


@dataclass(frozen=True)
class Server:
    """A live server, by what it tells of itself under /tiers."""

    host: str
    port: int
    path: str
    told: Mapping[str, Any]

    @classmethod
    def ask(cls, url: str) -> Self:
        """Raises StartError where nobody answers, or nobody that can be replayed to."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise StartError(f"{url!r} is no address as http://127.0.0.1:8000 (plain http)")
        base = f"http://{parts.netloc}{parts.path.rstrip('/')}"
        try:
            with urlopen(f"{base}/tiers", timeout=30) as response:
                told = json.load(response)
            if not all(tier["latency_ms"] for tier in told["tiers"]):
                raise StartError(f"{url} does not know its latencies yet: wait for /readyz")
        except (URLError, OSError, ValueError, KeyError, TypeError) as error:
            why = getattr(error, "reason", None) or one_line(error)
            raise StartError(f"no pcae-serve answers at {base}: {why}") from None
        return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/"), told)

    @property
    def policy(self) -> str:
        return str(self.told["policy"])

    @property
    def labels(self) -> Sequence[str]:
        labels: Sequence[str] = self.told["labels"]
        return labels

    @property
    def tiers(self) -> list[int]:
        """Those that `auto` takes."""
        return [i for i, tier in enumerate(self.told["tiers"]) if not tier["dominated"]]

    @property
    def full_s(self) -> float:
        """The last tier's seconds at batch 1."""
        return float(self.told["tiers"][-1]["latency_ms"]["1"]) / 1e3

    @cached_property
    def tier_table(self) -> TierTable:
        qualities = [
            (tier["accuracy"] or {}).get("top1")
            or (tier["agreement"] or {}).get("share")
            or (tier["fidelity"] or {}).get("cosine")
            or 0.0
            for tier in self.told["tiers"]
        ]
        return TierTable(tuple(tier["name"] for tier in self.told["tiers"]), tuple(qualities))

    @property
    def platform(self) -> Platform:
        """Its tiers as a simulation would have them; medians only."""
        tiers = [
            TimedTier(
                name=tier["name"],
                accuracy=max(0.0, accuracy),
                points=tuple(
                    BatchSeconds(batch=int(batch), p50_s=ms / 1e3, p99_s=ms / 1e3)
                    for batch, ms in tier["latency_ms"].items()
                ),
            )
            for tier, accuracy in zip(self.told["tiers"], self.tier_table.accuracy, strict=True)
        ]
        return Platform(source=self.words, tiers=tuple(tiers))

    def compute(self) -> dict[str, float]:
        """Seconds of its devices so far, under /metrics: busy, and in vain by why."""
        try:
            with urlopen(f"{self.base}/metrics", timeout=30) as response:
                text = response.read().decode()
        except OSError:  # a version without them
            return {}
        busy_s = [float(value) for _, value in _series(text, "pcae_compute_seconds_total")]
        wasted = _series(text, "pcae_wasted_compute_seconds_total")
        return {"busy": sum(busy_s)} | {label: float(value) for label, value in wasted}

    @property
    def base(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.path}"

    @property
    def words(self) -> str:
        told = self.told
        return (
            f"On {self.base}: bundle {told['bundle']}, {told['backend']}"
            f" {told['backend_version']} on {told['device']}."
        )

    def request(self, budget_s: float, image: bytes) -> bytes:
        """All of a request, ready to be sent."""
        query = {"budget_ms": f"{1e3 * budget_s:.3f}"}
        if self.told["answers"] == "logits":
            route, query = "classify", query | {"top_k": "1"}
        else:
            route = "embed"
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = (
            f"POST {self.path}/{route}?{urlencode(query)} HTTP/1.1\r\nHost: {host}:{self.port}\r\n"
            f"Content-Type: application/octet-stream\r\nContent-Length: {len(image)}\r\n\r\n"
        )
        return head.encode() + image


@dataclass(frozen=True)
class Answer:
    """What the body of a 200 says."""

    tier: str
    met_budget: bool
    index: int | None  # of the first class; None where the server answers with features


@dataclass(frozen=True)
class Record:
    """One run, request by request."""

    trace: str
    rate: float | None
    seed: int
    load: Workload
    sent: Sent
    answers: Sequence[Answer | None]  # [n]; None: not answered
    labels: NDArray[np.int64] | None  # [n]
    spent: Mapping[str, float]  # seconds that the server's devices worked, and for nobody

    @property
    def right(self) -> NDArray[np.bool_] | None:
        """[n], whether the first class was the label; None without labels."""
        if self.labels is None:
            return None
        pairs = zip(self.answers, self.labels, strict=True)
        return np.array([a is not None and a.index == label for a, label in pairs])

    def outcome(self, tier_table: TierTable) -> Outcome:
        """As a simulation tells it, but for the sizes of batches: the server tells none."""
        times_s, budgets_s = self.load.times_s, self.load.budgets_s
        ended_s = np.where(np.isnan(self.sent.ended_s), times_s, self.sent.ended_s)
        end = np.array([ENDS.get(int(status), FAILED) for status in self.sent.status], np.int8)
        answered = np.array([answer is not None for answer in self.answers])
        late = self.sent.ended_s > times_s + budgets_s
        end[answered] = np.where(late[answered], End.LATE, End.IN_TIME)
        tier = [-1 if a is None else tier_table.index(a.tier) for a in self.answers]
        outcome = Outcome(times_s, budgets_s, end, np.array(tier, np.int16), ended_s)
        outcome.span_s = float(ended_s.max() - times_s[0])
        outcome.busy_s, outcome.late_s, outcome.cancelled_s, outcome.padding_s = (
            self.spent.get(name, 0.0) for name in ("busy", "late", "cancelled", "padding")
        )
        return outcome

    @property
    def lag_s(self) -> NDArray[np.float64]:
        """[n], sent after it was due; one that never got a connection lags until the end."""
        sent_s = self.sent.sent_s
        last_s = float(np.nanmax(self.sent.ended_s, initial=self.load.times_s[-1]))
        return np.where(np.isnan(sent_s), last_s, sent_s) - self.load.times_s


def in_hand(load: Workload) -> int:
    """Requests in hand at once, if each takes all of its budget."""
    ends_s = np.sort(load.times_s + load.budgets_s)
    begun = np.arange(1, len(ends_s) + 1)
    return int((begun - np.searchsorted(ends_s, load.times_s)).max())


def read(body: bytes, status: int) -> Answer | None:
    """The answer in a body; None where the request was not answered."""
    if status != 200:
        return None
    told = json.loads(body)
    index = told["predictions"][0]["index"] if "predictions" in told else None
    return Answer(told["tier"], told["met_budget"], index)


def problem(body: bytes) -> str:
    """The line of a problem document; nothing where it is none."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return ""


def client_figures(runs: Sequence[Record]) -> dict[str, float]:
    """What only the sender can tell; over all seeds."""
    lag_ms = 1e3 * np.concatenate([run.lag_s for run in runs])
    answers = [answer for run in runs for answer in run.answers]
    waits_ms = np.concatenate([1e3 * (run.sent.ended_s - run.load.times_s) for run in runs])
    statuses = np.concatenate([run.sent.status for run in runs])
    figures = {
        "lag_p50_ms": float(np.percentile(lag_ms, 50)),
        "lag_p99_ms": float(np.percentile(lag_ms, 99)),
        "met_by_server": sum(a is not None and a.met_budget for a in answers) / len(answers),
    }
    for status in sorted({int(s) for s in statuses} - {0, 200}):
        waits = waits_ms[statuses == status]
        figures[f"{status}_count"] = len(waits)
        figures[f"{status}_p50_ms"] = float(np.percentile(waits, 50))
        figures[f"{status}_p99_ms"] = float(np.percentile(waits, 99))
    for why, count in sum((run.sent.faults for run in runs), Counter[str]()).items():
        figures[f"{_FAULT}{why}"] = count  # those above 0: `sum` of counters keeps no others
    figures["void"] = bool(figures["lag_p99_ms"] > 1e3 * MAX_LAG_S)
    return figures


def client_lines(row: Row) -> Iterator[str]:
    """The client's figures of a row, in words."""
    told = row.client
    yield (
        f"{row.trace}, {row.level}: lag of the sender p50 {told['lag_p50_ms']:.2f}, p99"
        f" {told['lag_p99_ms']:.2f} ms{' (VOID)' if told['void'] else ''}; in time by the server's"
        f" own word {100 * told['met_by_server']:.1f} %"
    )
    for status in sorted({name[:3] for name in told if name.endswith("_count")}):
        yield (
            f"  status {status}: {told[f'{status}_count']:.0f}, told after p50"
            f" {told[f'{status}_p50_ms']:.1f}, p99 {told[f'{status}_p99_ms']:.1f} ms"
        )
    for name in told:
        if name.startswith(_FAULT):
            yield f"  {name.removeprefix(_FAULT)}: {told[name]:.0f}"


def write_rows(path: Path, records: Sequence[Record], tier_table: TierTable) -> None:
    """Every request of every run, as CSV; empty cells: it did not come to it."""
    columns = (
        "trace", "rate", "seed", "scheduled_s", "sent_s", "ended_s", "budget_ms", "status", "end",
        "tier", "right", "met_budget",
    )  # fmt: skip
    words = {**{end.value: end.name.lower() for end in End}, FAILED: "failed"}
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(columns)
            for run in records:
                ends, right = run.outcome(tier_table).end, run.right
                for i, answer in enumerate(run.answers):
                    out.writerow(
                        (
                            run.trace,
                            run.rate or "",
                            run.seed,
                            f"{run.load.times_s[i]:.6f}",
                            _seconds(run.sent.sent_s[i]),
                            _seconds(run.sent.ended_s[i]),
                            f"{1e3 * run.load.budgets_s[i]:.3f}",
                            run.sent.status[i],
                            words[int(ends[i])],
                            answer.tier if answer else "",
                            "" if right is None or answer is None else int(right[i]),
                            int(answer.met_budget) if answer else "",
                        )
                    )
    except OSError as error:
        raise PcaeError(f"{path} cannot be written: {error.strerror}") from None


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """This process on one core, for as long as it sends."""
    before = os.sched_getaffinity(0)
    if core is not None:
        try:
            os.sched_setaffinity(0, {core})
        except OSError:
            cores = ", ".join(map(str, sorted(before)))
            raise StartError(f"--pin {core}: this process may use the cores {cores}") from None
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _series(text: str, name: str) -> list[tuple[str, str]]:
    """(label's value, value) of the series of one name, each with one label."""
    return re.findall(rf'^{name}\{{\w+="([^"]*)"\}} (\S+)', text, re.MULTILINE)


def _seconds(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6f}"
