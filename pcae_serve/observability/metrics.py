"""Prometheus metrics of one service.

Each service has its own registry, so that several in one process do not add up. Label values are
outcomes, stages, tiers and names of API keys, never text from a client.
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

from pcae_serve.observability import outcomes
from pcae_serve.observability.caller_metrics import CallerMetrics
from pcae_serve.observability.outcomes import MISSED, Outcome
from pcae_serve.version import __version__

log = logging.getLogger(__name__)


class Failure(StrEnum):
    """How a batch failed on its device."""

    EXCEPTION = "exception"
    NAN = "nan"  # output with values that are not finite
    TIMEOUT = "timeout"  # exceeded watchdog_s


class Reload(StrEnum):
    """Result of a reload."""

    DONE = "done"
    FAILED = "failed"  # the old bundle stays in service


@dataclass(frozen=True)
class Totals:
    """Totals since the start that autoscaling is derived from."""

    in_time: float  # answers in time
    missed: float  # requests with an outcome of MISSED
    accuracy_debt: float  # summed over the answers in time


#: Reasons for wasted device time: late answers, clients that left, rows that only fill a batch.
WASTE = (Outcome.LATE.value, Outcome.CANCELLED.value, "padding")
#: Stages of an answer's time. `queue` ends when compute begins; `total` starts with the headers.
STAGES = ("decode", "queue", "compute", "total")

#: Three per decade: budgets can lie anywhere between, and quantiles are interpolated within.
STAGE_BUCKETS_S = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
#: Finest around 1, a correct prediction.
RATIO_BUCKETS = (.5, .7, .8, .9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)  # fmt: skip


class _Registry(CollectorRegistry):
    """A registry without the `_created` series, which double the output.

    The library's own switch applies to the whole process, which may have other metrics.
    """

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class _Families:
    """Metrics with a tier label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.stage_s = Histogram(
            "pcae_stage_seconds",
            "Time of an answer by stage, late answers included.",
            ["stage", "tier"],
            buckets=STAGE_BUCKETS_S,
            registry=registry,
        )
        self.answers = Counter(
            "pcae_answers",
            "Answers, late ones included; degraded: tier=auto used a tier below the best.",
            ["tier", "degraded"],
            registry=registry,
        )
        self.looks = Counter(
            "pcae_second_looks",
            "Answers of second looks, by the tier that gave them; changed: the class changed.",
            ["tier", "changed"],
            registry=registry,
        )
        self.compute_s = Counter(
            "pcae_compute_seconds",
            "Device time of batches, failed ones excluded.",
            ["tier"],
            registry=registry,
        )
        self.batch = Histogram(
            "pcae_batch_size",
            "Images per batch, padding and failed batches excluded.",
            ["tier"],
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self.ratio = Histogram(
            "pcae_prediction_error_ratio",
            "Actual over predicted duration of a batch (1: as predicted; 2: twice as long).",
            ["tier"],
            buckets=RATIO_BUCKETS,
            registry=registry,
        )
        self.failures = Counter(
            "pcae_engine_failures",
            "Batches that failed, by kind of failure.",
            ["tier", "kind"],
            registry=registry,
        )
        self.disabled = Gauge(
            "pcae_tier_disabled",
            "1 while the tier is out of rotation after consecutive failures.",
            ["tier"],
            registry=registry,
        )


class _Tier:
    """The series of one tier, kept because looking up a label costs more than counting."""

    def __init__(self, families: _Families, name: str) -> None:
        self.stages_s = [families.stage_s.labels(stage, name) for stage in STAGES]
        self.answers = [families.answers.labels(name, degraded) for degraded in ("false", "true")]
        self.looks = [families.looks.labels(name, changed) for changed in ("false", "true")]
        self.compute_s, self.batch = families.compute_s.labels(name), families.batch.labels(name)
        self.ratio = families.ratio.labels(name)
        self.disabled = families.disabled.labels(name)
        self.failures = {kind: families.failures.labels(name, kind) for kind in Failure}


class Metrics:
    """The metrics of one service. Every series exists from the start, at zero."""

    def __init__(self, tiers: Sequence[str]) -> None:
        self._registry = registry = _Registry()
        requests = Counter(
            "pcae_requests",
            "Requests by outcome; requests with invalid parameters are not counted.",
            ["outcome"],
            registry=registry,
        )
        wasted_s = Counter(
            "pcae_wasted_compute_seconds",
            "Compute time spent on late, cancelled or padding rows (each second counted once).",
            ["reason"],
            registry=registry,
        )
        reloads = Counter(
            "pcae_reloads", "Reloads of the bundle, by result.", ["result"], registry=registry
        )
        self._requests = {outcome: requests.labels(outcome) for outcome in Outcome}
        self._wasted_s = [wasted_s.labels(reason) for reason in WASTE]
        self._reloads = {result: reloads.labels(result) for result in Reload}
        self._accuracy = Counter(
            "pcae_accuracy_sum",
            "Accuracy of the tier used, summed over answers in time.",
            registry=registry,
        )
        self._debt = Counter(
            "pcae_accuracy_debt",
            "Accuracy of the best allowed tier minus the tier used, summed over answers in time.",
            registry=registry,
        )
        self._range = Gauge(
            "pcae_accuracy_range",
            "Accuracy of the best tier minus that of the worst: upper bound of an answer's debt.",
            registry=registry,
        )
        self._max_batch = Gauge("pcae_max_batch", "Maximum images per batch.", registry=registry)
        self._queue_limit = Gauge(
            "pcae_queue_limit", "Maximum number of waiting requests.", registry=registry
        )
        self._memory_limit = Gauge(
            "pcae_request_memory_limit_bytes",
            "Memory that requests may take (--memory-mb).",
            registry=registry,
        )
        self._build = Info(
            "pcae_build", "Versions, bundle, backend and policy in use.", registry=registry
        )
        self._depth: Callable[[], int] = lambda: 0
        self._predicted_wait_s: Callable[[], float] = lambda: 0.0
        self._ready: Callable[[], bool] = lambda: False
        self._uploads: Callable[[], int] = lambda: 0
        self._memory_bytes: Callable[[], int] = lambda: 0
        for name, help_text, value in (
            (
                "pcae_queue_depth",
                "Admitted requests that no device has started on.",
                lambda: self._depth(),
            ),
            (
                "pcae_predicted_wait_seconds",
                "Predicted time until all admitted requests are answered.",
                lambda: self._predicted_wait_s(),
            ),
            (
                "pcae_uploads",
                "Request bodies being received; they are not in the queue yet.",
                lambda: self._uploads(),
            ),
            (
                "pcae_request_memory_bytes",
                "Memory that requests hold, as counted by the server: bodies, decoding, pixels.",
                lambda: self._memory_bytes(),
            ),
            ("pcae_ready", "1 while requests are admitted.", lambda: self._ready()),
        ):
            Gauge(name, help_text, registry=registry).set_function(_guarded(name, value))
        ProcessCollector(registry=registry)  # memory, open files and CPU time, on Linux
        self.callers = CallerMetrics(registry)
        self._families, self._tiers = _Families(registry), dict[str, _Tier]()
        self.add_tiers(tiers)
        self.set_build_info()

    def add_tiers(self, tiers: Iterable[str]) -> None:
        """Create the series of these tiers, at zero; existing series stay."""
        for name in tiers:
            if name not in self._tiers:
                self._tiers[name] = _Tier(self._families, name)

    def set_build_info(self, **labels: str) -> None:
        """Replace the labels of pcae_build_info: bundle, digest, backend, device, policy."""
        self._build.info({"version": __version__, "python": platform.python_version()} | labels)

    def set_limits(self, *, max_batch: int, queue_limit: int) -> None:
        """Set the limits that batch size and queue depth are compared with."""
        self._max_batch.set(max_batch)
        self._queue_limit.set(queue_limit)

    def set_memory_limit(self, limit_bytes: int) -> None:
        """Set the limit that the memory of requests is compared with."""
        self._memory_limit.set(limit_bytes)

    def set_accuracy_range(self, accuracy: float) -> None:
        """Set the difference in accuracy between the best tier and the worst."""
        self._range.set(accuracy)

    def totals(self) -> Totals:
        """Return the totals that autoscaling is derived from."""
        return Totals(
            in_time=_read(self._requests[Outcome.IN_TIME]),
            missed=sum(_read(self._requests[outcome]) for outcome in MISSED),
            accuracy_debt=_read(self._debt),
        )

    def watch(
        self,
        depth: Callable[[], int],
        predicted_wait_s: Callable[[], float],
        ready: Callable[[], bool],
        uploads: Callable[[], int] = lambda: 0,
        memory_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """Set the functions that gauges call at each scrape; replaces earlier ones."""
        self._depth, self._predicted_wait_s, self._ready = depth, predicted_wait_s, ready
        self._uploads, self._memory_bytes = uploads, memory_bytes

    def record_request(self, outcome: Outcome, key_name: str | None = None) -> None:
        """Count a request that has ended, and record its outcome for the access log.

        key_name: of its API key; None: it has none.
        """
        self._requests[outcome].inc()
        self.callers.record_request(key_name, outcome)
        outcomes.record(outcome)

    def record_answer(
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
        """Count an answer, in time or late. `record_request` counts its request.

        degraded: the request allowed any tier, and an idle device would have used a better one.
        best_accuracy: accuracy of that one; a request that names its tier has no debt.
        """
        series = self._of(tier)
        for stage, seconds in zip(
            series.stages_s, (decode_s, queue_s, compute_s, total_s), strict=True
        ):
            stage.observe(seconds)
        series.answers[degraded].inc()
        if in_time:  # max: counters reject negative values and never recover from NaN
            self._accuracy.inc(max(0.0, accuracy))
            self._debt.inc(max(0.0, best_accuracy - accuracy))

    def record_second_look(self, tier: str, *, changed: bool) -> None:
        """Count an answer of a second look. changed: its class is not the first answer's."""
        self._of(tier).looks[changed].inc()

    def record_batch(
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
        """Count the device time of `batch` images and `padding` rows, shared equally by all rows.

        seconds: 0 if the batch failed. late, cancelled: how many of the images were wasted.
        predicted_s: predicted duration.
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

    def record_failure(self, tier: str, kind: Failure) -> None:
        """Count a batch that failed. `record_request` counts each of its requests."""
        self._of(tier).failures[kind].inc()

    def set_tier_disabled(self, tier: str, disabled: bool) -> None:
        """Record that a tier is taken out of rotation, or is back in it."""
        self._of(tier).disabled.set(disabled)

    def record_reload(self, result: Reload) -> None:
        """Count a reload that has ended."""
        self._reloads[result].inc()

    def exposition(self) -> tuple[bytes, str]:
        """Return all metrics in Prometheus' text format, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _of(self, tier: str) -> _Tier:
        if tier not in self._tiers:  # a batch of the old bundle may end after a reload
            self.add_tiers([tier])
        return self._tiers[tier]


def _read(counter: Counter) -> float:
    [value] = (s.value for s in next(iter(counter.collect())).samples if s.name.endswith("_total"))
    return value


def _guarded(name: str, value: Callable[[], float]) -> Callable[[], float]:
    """Wrap a gauge's function to return NaN if it raises, so that the scrape as a whole works."""

    def read() -> float:
        try:
            return float(value())
        except Exception:
            log.exception("%s cannot be read", name)
            return nan

    return read
