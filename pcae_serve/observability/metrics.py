"""What the server counts, as Prometheus reads it.

It knows names and numbers; what they mean to a request is the service's business. A registry of its
own, so that several services in one process do not add up. Labels are outcomes, stages and tiers,
never what a client wrote.
"""

import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import nan

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

from pcae_serve.version import __version__

log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """What became of a request whose parameters made sense. Attainment: in_time over all."""

    IN_TIME = "in_time"
    LATE = "late"  # answered after its deadline
    REFUSED_BUDGET = "refused_budget"  # no allowed tier fits, even on an idle machine
    REFUSED_LOAD = "refused_load"
    REFUSED_FULL = "refused_full"  # queue_limit
    REFUSED_DRAINING = "refused_draining"  # starting or stopping
    EXPIRED = "expired"  # its budget passed before any compute
    LET_GO = "let_go"  # given up by the policy for others
    LEFT = "left"  # its client went away
    UNREADABLE = "unreadable"  # no image, or too large a one
    FAILED = "failed"  # the engine failed


class Failure(StrEnum):
    """How a batch failed on its device."""

    RAISED = "raised"
    NAN = "nan"  # it answered, with numbers that are none
    HUNG = "hung"  # it did not come back


class Reload(StrEnum):
    """How an attempt to serve another bundle ended."""

    DONE = "done"
    FAILED = "failed"  # the former bundle is still served


#: Ends that more machines would have prevented: the load's doing, not the caller's.
MISSED = (
    Outcome.LATE, Outcome.REFUSED_LOAD, Outcome.REFUSED_FULL, Outcome.EXPIRED, Outcome.LET_GO,
)  # fmt: skip


@dataclass(frozen=True)
class Tally:
    """What an autoscaler goes by, counted since the start."""

    in_time: float  # answers
    missed: float  # requests that the load cost their answer in time
    owed: float  # accuracy, over the answers in time


#: Of a device's seconds: late answers, clients that left meanwhile, rows that filled a bucket.
WASTE = ("late", "cancelled", "padding")
#: Of an answer's seconds; queue ends where compute begins, total begins with the headers.
STAGES = ("decode", "queue", "compute", "total")

#: Three to the decade: budgets lie anywhere between, and quantiles are read off the borders.
STAGE_BUCKETS_S = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
#: Finest around 1, where the forecast was right.
RATIO_BUCKETS = (.5, .7, .8, .9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)  # fmt: skip


class _Registry(CollectorRegistry):
    """Leaves out when each counter was made: that doubles the series, and nobody reads it.

    The library has a switch for it, but that is for the whole process, and so the embedder's.
    """

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class _Families:
    """What is counted by tier."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.stage_s = Histogram(
            "pcae_stage_seconds",
            "Where the time of an answer went, late answers too.",
            ["stage", "tier"],
            buckets=STAGE_BUCKETS_S,
            registry=registry,
        )
        self.answers = Counter(
            "pcae_answers",
            "Answers, late ones too; degraded: to auto, by less than the best tier allowed.",
            ["tier", "degraded"],
            registry=registry,
        )
        self.compute_s = Counter(
            "pcae_compute_seconds",
            "Device time of batches that did not fail.",
            ["tier"],
            registry=registry,
        )
        self.batch = Histogram(
            "pcae_batch_size",
            "Images in a batch that did not fail, padding left out.",
            ["tier"],
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self.ratio = Histogram(
            "pcae_prediction_error_ratio",
            "Seconds that a batch took over those predicted; 1 is right, 2 took twice as long.",
            ["tier"],
            buckets=RATIO_BUCKETS,
            registry=registry,
        )
        self.failures = Counter(
            "pcae_engine_failures",
            "Batches that failed on their device.",
            ["tier", "kind"],
            registry=registry,
        )
        self.is_out = Gauge(
            "pcae_tier_out_of_service",
            "1 while the tier is out of routing: it failed, and is passed over.",
            ["tier"],
            registry=registry,
        )


class _Tier:
    """Series of one tier at hand: looking a label up costs more than counting."""

    def __init__(self, families: _Families, name: str) -> None:
        self.stages_s = [families.stage_s.labels(stage, name) for stage in STAGES]
        self.answers = [families.answers.labels(name, degraded) for degraded in ("false", "true")]
        self.compute_s, self.batch = families.compute_s.labels(name), families.batch.labels(name)
        self.ratio, self.is_out = families.ratio.labels(name), families.is_out.labels(name)
        self.failures = {kind: families.failures.labels(name, kind) for kind in Failure}


class Metrics:
    """What one service counts. Every series is there from the start, at zero."""

    def __init__(self, tiers: Sequence[str]) -> None:
        self._registry = registry = _Registry()
        requests = Counter(
            "pcae_requests",
            "Requests by what became of them; those with wrong parameters are not counted.",
            ["outcome"],
            registry=registry,
        )
        wasted_s = Counter(
            "pcae_wasted_compute_seconds",
            "Part of pcae_compute_seconds_total that served nobody in time; no second twice.",
            ["reason"],
            registry=registry,
        )
        reloads = Counter(
            "pcae_reloads", "Attempts to serve another bundle.", ["result"], registry=registry
        )
        self._requests = {outcome: requests.labels(outcome) for outcome in Outcome}
        self._wasted_s = [wasted_s.labels(reason) for reason in WASTE]
        self._reloads = {result: reloads.labels(result) for result in Reload}
        self._accuracy = Counter(
            "pcae_accuracy_sum",
            "Accuracies of the tiers used, summed over answers in time.",
            registry=registry,
        )
        self._debt = Counter(
            "pcae_accuracy_debt",
            "Accuracy of the best tier allowed less that of the tier used, over answers in time.",
            registry=registry,
        )
        self._range = Gauge(
            "pcae_accuracy_range",
            "Accuracy of the best tier less that of the worst: what an answer can lack at most.",
            registry=registry,
        )
        self._max_batch = Gauge("pcae_max_batch", "Images in a batch at most.", registry=registry)
        self._queue_limit = Gauge("pcae_queue_limit", "Requests that may wait.", registry=registry)
        self._build = Info("pcae_build", "What serves what.", registry=registry)
        self._depth: Callable[[], int] = lambda: 0
        self._predicted_wait_s: Callable[[], float] = lambda: 0.0
        self._ready: Callable[[], bool] = lambda: False
        for name, told, ask in (
            ("pcae_queue_depth", "Requests that no device works on.", lambda: self._depth()),
            (
                "pcae_predicted_wait_seconds",
                "Time until the work in hand is done, as predicted.",
                lambda: self._predicted_wait_s(),
            ),
            ("pcae_ready", "1 while requests are taken.", lambda: self._ready()),
        ):
            Gauge(name, told, registry=registry).set_function(_guarded(name, ask))
        ProcessCollector(registry=registry)  # memory, open files and CPU time, on Linux
        self._families, self._tiers = _Families(registry), dict[str, _Tier]()
        self.add_tiers(tiers)
        self.build_info()

    def add_tiers(self, tiers: Iterable[str]) -> None:
        """Series of these tiers, at zero where they are new; those of others stay."""
        for name in tiers:
            if name not in self._tiers:
                self._tiers[name] = _Tier(self._families, name)

    def build_info(self, **labels: str) -> None:
        """What is served now, such as bundle, digest, backend, policy; replaces what was told."""
        self._build.info({"version": __version__, "python": platform.python_version()} | labels)

    def limits(self, *, max_batch: int, queue_limit: int) -> None:
        """What batch fill and queue depth are shares of."""
        self._max_batch.set(max_batch)
        self._queue_limit.set(queue_limit)

    def accuracy_range(self, accuracy: float) -> None:
        """What separates the best of the tiers served now from the worst."""
        self._range.set(accuracy)

    def tally(self) -> Tally:
        return Tally(
            in_time=_read(self._requests[Outcome.IN_TIME]),
            missed=sum(_read(self._requests[outcome]) for outcome in MISSED),
            owed=_read(self._debt),
        )

    def watch(
        self,
        depth: Callable[[], int],
        predicted_wait_s: Callable[[], float],
        ready: Callable[[], bool],
    ) -> None:
        """Whom to ask at each scrape; replaces whoever was asked before."""
        self._depth, self._predicted_wait_s, self._ready = depth, predicted_wait_s, ready

    def ended(self, outcome: Outcome) -> None:
        """A request has come to its end."""
        self._requests[outcome].inc()

    def answered(
        self,
        tier: str,
        *,
        decode_s: float,
        queue_s: float,
        compute_s: float,
        total_s: float,
        in_time: bool,
        degraded: bool,
        accuracy: float,
        best_accuracy: float,
    ) -> None:
        """A request has its answer, in time or late; `ended` is told besides.

        degraded: it asked for auto, and a better tier was allowed. best_accuracy: of the best one
        allowed, so that a request that pinned its tier is owed nothing.
        """
        series = self._of(tier)
        for stage, seconds in zip(
            series.stages_s, (decode_s, queue_s, compute_s, total_s), strict=True
        ):
            stage.observe(seconds)
        series.answers[degraded].inc()
        if in_time:  # a counter takes nothing negative, and never recovers from a nan
            self._accuracy.inc(max(0.0, accuracy))
            self._debt.inc(max(0.0, best_accuracy - accuracy))

    def spent(
        self,
        tier: str,
        seconds: float,
        *,
        batch: int,
        late: int,
        cancelled: int,
        padding: int,
        predicted_s: float | None = None,
    ) -> None:
        """A device worked on `batch` images and `padding` rows; each had an equal share of it.

        Without seconds the batch failed. predicted_s: what was expected when it began.
        """
        series = self._of(tier)
        row_s = seconds / (batch + padding)
        series.compute_s.inc(seconds)
        for wasted_s, rows in zip(self._wasted_s, (late, cancelled, padding), strict=True):
            if rows:
                wasted_s.inc(rows * row_s)
        if seconds > 0:
            series.batch.observe(batch)
            if predicted_s:
                series.ratio.observe(seconds / predicted_s)

    def failed(self, tier: str, kind: Failure) -> None:
        """A batch failed on its device; `ended` is told of each of its requests besides."""
        self._of(tier).failures[kind].inc()

    def tier_out_of_service(self, tier: str, is_out: bool) -> None:
        """A tier has left routing, or is back in it."""
        self._of(tier).is_out.set(is_out)

    def reloaded(self, result: Reload) -> None:
        """An attempt to serve another bundle has ended."""
        self._reloads[result].inc()

    def exposition(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and that format's media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _of(self, tier: str) -> _Tier:
        if tier not in self._tiers:  # a batch of the former bundle may end after a reload
            self.add_tiers([tier])
        return self._tiers[tier]


def _read(counter: Counter) -> float:
    [value] = (s.value for s in next(iter(counter.collect())).samples if s.name.endswith("_total"))
    return value


def _guarded(name: str, ask: Callable[[], float]) -> Callable[[], float]:
    """One gauge that cannot be read, during a reload say, must not cost the whole scrape."""

    def read() -> float:
        try:
            return float(ask())
        except Exception:
            log.exception("%s cannot be read", name)
            return nan

    return read
