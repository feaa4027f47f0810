"""What the server counts, as Prometheus reads it.

It knows names and numbers; what they mean to a request is the service's business. A registry of its
own, so that several services in one process do not add up.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import Metric


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


#: Of a device's seconds: late answers, clients that left meanwhile, rows that filled a bucket.
WASTE = ("late", "cancelled", "padding")


class _Registry(CollectorRegistry):
    """Leaves out when each counter was made: that doubles the series, and nobody reads it.

    The library has a switch for it, but that is for the whole process, and so the embedder's.
    """

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class Metrics:
    """Counters of one service. Every series is there from the start, at zero."""

    def __init__(self, tiers: Sequence[str]) -> None:
        self._registry = _Registry()
        self._requests = Counter(
            "pcae_requests",
            "Requests by what became of them; those with wrong parameters are not counted.",
            ["outcome"],
            registry=self._registry,
        )
        self._compute_s = Counter(
            "pcae_compute_seconds",
            "Device time of batches that did not fail.",
            ["tier"],
            registry=self._registry,
        )
        self._wasted_s = Counter(
            "pcae_wasted_compute_seconds",
            "Part of pcae_compute_seconds_total that served nobody in time; no second twice.",
            ["reason"],
            registry=self._registry,
        )
        for outcome in Outcome:
            self._requests.labels(outcome)
        self.add_tiers(tiers)
        for reason in WASTE:
            self._wasted_s.labels(reason)

    def add_tiers(self, tiers: Sequence[str]) -> None:
        """Tiers that may answer from now on, as after a reload."""
        for tier in tiers:
            self._compute_s.labels(tier)

    def ended(self, outcome: Outcome) -> None:
        """A request has come to its end."""
        self._requests.labels(outcome).inc()

    def spent(
        self, tier: str, seconds: float, *, batch: int, late: int, cancelled: int, padding: int
    ) -> None:
        """A device worked on `batch` images and `padding` rows; each had an equal share of it."""
        row_s = seconds / (batch + padding)
        self._compute_s.labels(tier).inc(seconds)
        for reason, rows in zip(WASTE, (late, cancelled, padding), strict=True):
            self._wasted_s.labels(reason).inc(rows * row_s)

    def exposition(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and that format's media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
