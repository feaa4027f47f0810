"""Metrics of callers with an API key, by its name. The number of series is bounded."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter

from pcae_serve.observability.outcomes import Outcome

#: Callers with series of their own, in the order of the keys file; further ones share `other`.
MAX_LABELS = 100
OTHER = "other"


class CallerMetrics:
    """Requests and device time by caller; requests without an API key are not counted."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "pcae_caller_requests",
            "Requests by the name of their API key and by outcome.",
            ["caller", "outcome"],
            registry=registry,
        )
        self._compute_s = Counter(
            "pcae_caller_compute_seconds",
            "Device time by the name of the API key that its requests had.",
            ["caller"],
            registry=registry,
        )
        self._labels = dict[str, str]()

    def add(self, names: Iterable[str]) -> None:
        """Create the series of these callers, at zero."""
        for name in names:
            label = name if len(self._labels) < MAX_LABELS else OTHER
            self._labels.setdefault(name, label)
        for label in set(self._labels.values()):
            self._compute_s.labels(label)
            for outcome in Outcome:
                self._requests.labels(label, outcome)

    def record_request(self, name: str | None, outcome: Outcome) -> None:
        """Count a request that has ended. name: of its API key."""
        if name is not None:
            self._requests.labels(self._labels.get(name, OTHER), outcome).inc()

    def record_compute(self, name: str | None, seconds: float) -> None:
        """Count device time that was spent for a caller."""
        if name is not None:
            self._compute_s.labels(self._labels.get(name, OTHER)).inc(seconds)
