"""The rows of the comparison. Each is a job of one server, one model and one round."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.compare.environments import FOLDER, HERE, install_mb, python
from benchmarks.compare.log import Log
from benchmarks.compare.models import Setting
from benchmarks.compare.search import largest_passing, rate_of, step_near
from benchmarks.compare.servers import SERVER_CORE, SERVERS, Running, cache_of, serving
from benchmarks.compare.trials import poisson, trial
from pcae_serve.loadtest import workload
from pcae_serve.loadtest.workload import Workload

BALANCED, FULL, TINY = (
    Setting("demo", "balanced"),
    Setting("demo", "full"),
    Setting("vit-ti", "k06"),
)
TIERS = tuple(Setting("demo", tier) for tier in ("fast", "brisk", "balanced", "full"))
PEERS = ("plain", "litserve", "mosec", "triton")
FIXED = ("pcae-serve", *PEERS)
TARGET = 0.99
#: The budget of requests that are not to be refused.
ENDLESS_S = 60.0
MAIN_WINDOW = 8
WARM_UP, WARM_UP_PER_S = 30, 20.0


@dataclass(frozen=True)
class Job:
    """One server, model and round of a row."""

    row: str
    setting: Setting
    server: str
    round: int

    @property
    def key(self) -> str:
        return f"{self.row}/{self.setting.name}/{self.server}/{self.round}"


@dataclass(frozen=True)
class Row:
    """What is measured for which servers."""

    measure: Callable[["Bench", list[Job]], None]
    servers: dict[Setting, tuple[str, ...]]

    def jobs(self, name: str, setting: Setting, round_: int) -> list[Job]:
        """Return a round's jobs; the server that comes first differs from round to round."""
        servers = self.servers[setting]
        shift = round_ % len(servers)
        return [Job(name, setting, each, round_) for each in servers[shift:] + servers[:shift]]


class Bench:
    """What jobs share: the log, the bare engine's times, capacities measured so far."""

    def __init__(self, log: Log, logs: Path, nice: int = 0) -> None:
        self.log, self.logs, self.nice = log, logs, nice
        self._stack, self._fleet = ExitStack(), dict[tuple[str, Setting], Running]()

    def bare(self, setting: Setting) -> dict[str, Any]:
        """Return the bare engine's milliseconds on the server's core, measured once."""

        def measure() -> dict[str, Any]:
            image = next(iter(sorted((setting.folder / "images").glob("*.jpg"))))
            environment = os.environ | {
                "COMPARE_MODEL": str(setting.description),
                "COMPARE_TIER": setting.tier,
            }
            program = [python("plain"), str(HERE / "peers" / "handler.py")]
            done = subprocess.run(
                [*program, str(image), str(SERVER_CORE)], env=environment, check=True,
                capture_output=True,
            )  # fmt: skip
            figures: dict[str, Any] = json.loads(done.stdout)
            return figures

        return self.log.once(f"bare/{setting.name}", measure, 15)

    def unit_s(self, setting: Setting) -> float:
        """Return the model's time for one image, the unit of windows."""
        return float(self.bare(setting)["batch_ms"]["1"]) / 1e3

    def capacity(self, setting: Setting, window: int, server: str | None = None) -> float | None:
        """Return the median capacity in requests per second; without a server, the best one's."""
        found: dict[str, list[float]] = {}
        for entry in self.log.under(f"capacity/{setting.name}/"):
            if entry.get("done") and (rate := entry["capacity"].get(str(window))):
                found.setdefault(entry["server"], []).append(rate)
        fixed = {name: median(rates) for name, rates in found.items() if name in FIXED}
        if server is not None:
            return median(found[server]) if server in found else None
        return max(fixed.values(), default=None)

    def offered(self, setting: Setting) -> float:
        """Return the best capacity at the main window. Raise SystemExit if it is not measured."""
        rate = self.capacity(setting, MAIN_WINDOW)
        if rate is None:
            raise SystemExit(f"measure the row `capacity` of {setting.name} first")
        return rate

    @contextmanager
    def server(self, job: Job) -> Iterator[Running]:
        """Let the job's server run during the block; it is started once and paused in between."""
        key = job.server, job.setting
        if key not in self._fleet:
            opened = serving(SERVERS[job.server], job.setting, self.logs / job.row, self.nice)
            running = self._fleet[key] = self._stack.enter_context(opened)
            running.rest_mb = running.memory_mb()
            warm = poisson(WARM_UP_PER_S, WARM_UP / WARM_UP_PER_S, ENDLESS_S, 99)
            trial(running, warm, 99, tries=1)
        running = self._fleet[key]
        running.resume()
        yield running
        running.pause()

    def dismiss(self) -> None:
        """End all servers."""
        self._stack.close()
        self._fleet.clear()

    def finish(self, job: Job, figures: dict[str, Any]) -> None:
        """Write the result of a job."""
        named = {"row": job.row, "setting": job.setting.name, "server": job.server}
        self.log.add(job.key, named | {"round": job.round, "done": True} | figures)
        print(job.key, figures.get("capacity") or "", flush=True)


def one_by_one(
    measure: Callable[[Bench, Job, Running], dict[str, Any]], fresh: bool = False
) -> Callable[[Bench, list[Job]], None]:
    """Return a row that measures one server after the other. fresh: each in a new process."""

    def measure_all(bench: Bench, jobs: list[Job]) -> None:
        for job in jobs:
            if bench.log.get(job.key) is not None:
                continue
            bench.log.require(20)
            if fresh:
                bench.dismiss()
            with bench.server(job) as running:
                bench.finish(job, measure(bench, job, running))

    return measure_all


def capacity(bench: Bench, jobs: list[Job]) -> None:
    """Row 1: the largest rate with 99 % of the answers within each window.

    The searches of all servers take turns, trial by trial. A window in which no server reached the
    target in the first round is left out of the others.
    """
    setting, later = jobs[0].setting, jobs[0].round > 0
    multiples = [m for m in WINDOWS[setting] if not later or bench.capacity(setting, m)]
    searches = [Search(bench, job, m) for m in multiples for job in jobs]
    waiting = list(searches)
    while waiting:
        for search in list(waiting):
            if not search.advance():
                waiting.remove(search)
    for job in jobs:
        own = [search for search in searches if search.job == job]
        bench.finish(
            job,
            {
                "capacity": {str(search.multiple): search.rate for search in own},
                "at": {str(search.multiple): search.figures for search in own},
            },
        )


class Search:
    """The search for one server's capacity within one window."""

    def __init__(self, bench: Bench, job: Job, multiple: int) -> None:
        self.bench, self.job, self.multiple = bench, job, multiple
        self.unit_s = bench.unit_s(job.setting)
        self.rate: float | None = None
        self.figures: dict[str, Any] | None = None
        self._found: dict[int, dict[str, Any]] = {}
        self._steps = largest_passing(_first_step(bench, job, multiple, self.unit_s))
        self._step = next(self._steps)

    def advance(self) -> bool:
        """Make one trial; return whether another one is needed."""
        figures = self._found[self._step] = self._measure(self._step)
        try:
            self._step = self._steps.send(self._passes(figures))
        except StopIteration as end:
            if end.value is not None:
                self.rate = rate_of(end.value, 1 / self.unit_s)
                self.figures = _brief(self._found[end.value])
            return False
        return True

    def _passes(self, figures: dict[str, Any]) -> bool:
        window_ms = 1e3 * self.multiple * self.unit_s
        return bool(figures["within"][f"{window_ms:.2f}"] >= TARGET)

    def _measure(self, step: int) -> dict[str, Any]:
        """Try a rate. Servers without budgets do not see the window: one trial serves them all."""
        job, aware = self.job, self.job.server.startswith("pcae-serve")
        window_s = self.multiple * self.unit_s
        windows_s = [m * self.unit_s for m in WINDOWS[job.setting]]
        seconds = max(SHORTEST_S, 8 * max(windows_s))
        load = poisson(rate_of(step, 1 / self.unit_s), seconds, window_s, job.round)
        seen_s = [window_s] if aware else windows_s
        label = f"w{self.multiple}/{step}" if aware else f"{step}"

        def measure() -> dict[str, Any]:
            with self.bench.server(job) as running:
                return trial(running, load, job.round, seen_s, enough=self._passes)

        return self.bench.log.once(f"trial/{job.key}/{label}", measure, seconds + 6)


def _first_step(bench: Bench, job: Job, multiple: int, unit_s: float) -> int:
    """Return a guess: this server's last capacity, or another one's, or the engine's rate."""
    usual = {3: 0.3, 8: 0.5, 50: 0.95}.get(multiple, 0.9) / unit_s
    guess = (
        bench.capacity(job.setting, multiple, job.server)
        or bench.capacity(job.setting, multiple)
        or usual
    )
    return step_near(guess, 1 / unit_s)


def _brief(figures: dict[str, Any]) -> dict[str, Any]:
    kept = ("n", "cpu_ms", "answered_ms", "right", "tiers", "lag_p99_ms", "foreign", "void")
    return {name: figures[name] for name in kept if name in figures}


def overhead(bench: Bench, job: Job, running: Running) -> dict[str, Any]:
    """Row 2: latency and CPU time at a tenth of the best capacity, over decode and engine."""
    bare, window_s = bench.bare(job.setting), 50 * bench.unit_s(job.setting)
    alone_ms = bare["decode_ms"] + bare["batch_ms"]["1"]
    load = poisson(0.1 * bench.offered(job.setting), OVERHEAD_S, window_s, job.round)
    figures = trial(running, load, job.round, [window_s])
    answered = figures["answered_ms"]
    return figures | {
        "over_p50_ms": answered["50"] - alone_ms,
        "over_p99_ms": answered["99"] - alone_ms,
        "over_cpu_ms": figures["cpu_ms"] - alone_ms,
    }


def overload(bench: Bench, job: Job, running: Running) -> dict[str, Any]:
    """Row 3: twice the best capacity, then the time until a request is answered in time again."""
    window_s = MAIN_WINDOW * bench.unit_s(job.setting)
    rate = 2 * bench.offered(job.setting)
    bench.log.require(OVERLOAD_S + 40)
    load = poisson(rate, OVERLOAD_S, window_s, job.round)
    figures = trial(running, load, job.round, [window_s], tries=1)
    begin_s = time.monotonic()
    image, recovery_s = job.setting.images()[0], None
    while recovery_s is None and time.monotonic() - begin_s < RECOVERY_S:
        asked_s = time.monotonic()
        status, took_s, _ = running.probe(image, window_s, RECOVERY_S)
        if status == 200 and took_s <= window_s:
            recovery_s = asked_s - begin_s
        else:
            time.sleep(0.05)
    return figures | {
        "goodput": figures["in_time"] * figures["rate"],
        "recovery_s": recovery_s,
        "rest_mb": round(running.rest_mb),
        "peak_mb": round(running.peak_mb()),
        "after_mb": round(running.memory_mb()),
    }


def client_gone(bench: Bench, job: Job, running: Running) -> dict[str, Any]:
    """Row 4: CPU time spent after all clients of a burst left, over that of answering them all."""
    whole_s = median(_burst(running, None)[1] for _ in range(3))
    shares = []
    for _ in range(5):
        left_s, all_s = _burst(running, LEAVE_AFTER * whole_s)
        shares.append((all_s - left_s) / (whole_s - left_s))
    return {"whole_s": whole_s, "shares": shares, "share": median(shares)}


def _burst(running: Running, leave_after_s: float | None) -> tuple[float, float]:
    """Send a burst; return the server's CPU seconds until the clients left, and in all.

    leave_after_s: until all connections are closed; None: they wait for their answers.
    """
    running.wait_until_idle()
    before_s, left_s = running.cpu_s(), 0.0
    request = running.request(running.setting.images()[0], ENDLESS_S)
    sockets = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(BURST)]
    for each in sockets:
        each.sendall(request)
    if leave_after_s is None:
        for each in sockets:
            each.settimeout(ENDLESS_S)
            received = b""
            while b"\r\n\r\n" not in received and (part := each.recv(65_536)):
                received += part
    else:
        time.sleep(leave_after_s)
        left_s = running.cpu_s() - before_s
    for each in sockets:
        with suppress(OSError):
            each.close()
    running.wait_until_idle()
    return left_s, running.cpu_s() - before_s


def accuracy(bench: Bench, job: Job, running: Running) -> dict[str, Any]:
    """Row 5: right answers in time on a recorded trace with mixed budgets, at three loads."""
    reference, full_s = bench.offered(BALANCED), bench.unit_s(FULL)
    found = {}
    for load in LOADS:
        rate = load * reference
        count = round(rate * TRACE_S)
        requests = workload.make("azure-code", "mixed", rate, count, full_s, job.round)

        def measure(requests: Workload = requests) -> dict[str, Any]:
            return trial(running, requests, job.round)

        figures = bench.log.once(f"trial/{job.key}/{load}", measure, TRACE_S + 8)
        kept = ("rate", "right_in_time", "in_time", "tiers", "void")
        found[str(load)] = {name: figures[name] for name in kept}
    return {"loads": found}


def efficiency(bench: Bench, job: Job, running: Running) -> dict[str, Any]:
    """Row 6: images per second of a backlog, over the bare engine's at its best batch size."""
    bare = bench.bare(job.setting)["batch_ms"]
    backlog = Workload(np.zeros(BACKLOG), np.full(BACKLOG, ENDLESS_S))
    figures = trial(running, backlog, job.round)
    answered = figures["statuses"].get("200", 0)
    return {
        "rate": answered / figures["span_s"],
        "answered": answered,
        "bare": max(1e3 * int(n) / ms for n, ms in bare.items()),
        "cpu_ms": figures["cpu_ms"],
        "void": figures["void"],
    }


def cold(bench: Bench, job: Job, running: Running) -> dict[str, Any]:
    """Row 7: from the start of the process to the first answer, memory, size on disk."""
    environment = SERVERS[job.server].environment
    found = {
        "start_s": round(running.start_s, 2),
        "rest_mb": round(running.rest_mb),
        "peak_mb": round(running.peak_mb()),
        "install_mb": install_mb(environment),
    }
    if environment == "pcae":
        bench.dismiss()
        cache, aside = cache_of(job.setting), FOLDER / "cache-aside"
        shutil.rmtree(aside, ignore_errors=True)
        cache.rename(aside)
        try:
            with serving(
                SERVERS[job.server], job.setting, bench.logs / job.row, bench.nice
            ) as again:
                found["start_without_profile_s"] = round(again.start_s, 2)
        finally:
            shutil.rmtree(cache, ignore_errors=True)
            aside.rename(cache)
    return found


#: Requests of a burst whose clients leave after a share of the time that all of them take.
BURST, LEAVE_AFTER, BACKLOG = 40, 0.15, 200
#: Seconds of a trial: at least, at a tenth of capacity, at twice capacity, of the trace.
SHORTEST_S, OVERHEAD_S, OVERLOAD_S, TRACE_S, RECOVERY_S = 5.0, 12.0, 20.0, 8.0, 60.0
LOADS = (0.5, 1.0, 1.5)
WINDOWS = {BALANCED: (3, 8, 50), TINY: (3, 8, 50), FULL: (8,)}
BOTH = {BALANCED: FIXED, TINY: FIXED}
ROWS = {
    "capacity": Row(capacity, {BALANCED: FIXED, TINY: FIXED, FULL: ("pcae-serve-auto", *FIXED)}),
    "overload": Row(one_by_one(overload, fresh=True), BOTH),
    "overhead": Row(one_by_one(overhead), BOTH),
    "accuracy": Row(
        one_by_one(accuracy),
        {FULL: ("pcae-serve-auto", *PEERS), **{s: PEERS for s in TIERS if s != FULL}},
    ),
    "client-gone": Row(one_by_one(client_gone), {TINY: FIXED}),
    "efficiency": Row(one_by_one(efficiency), BOTH),
    "cold": Row(one_by_one(cold, fresh=True), {BALANCED: (*FIXED, "bentoml", "ray")}),
}
