"""Metrics of callers: by the names of keys, and bounded."""

from prometheus_client import CollectorRegistry, generate_latest

from pcae_serve.observability.caller_metrics import MAX_LABELS, CallerMetrics
from pcae_serve.observability.outcomes import Outcome


def lines(registry: CollectorRegistry) -> dict[str, float]:
    text = generate_latest(registry).decode()
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples if "_created" not in name}


def test_requests_and_device_time_are_counted_by_name() -> None:
    metrics = CallerMetrics(registry := CollectorRegistry())
    metrics.record_request(None, Outcome.IN_TIME)
    assert not lines(registry)
    metrics.add(["web", "batch"])
    metrics.record_request("web", Outcome.IN_TIME)
    metrics.record_request(None, Outcome.IN_TIME)
    metrics.record_compute("web", 0.25)
    metrics.record_compute(None, 9.0)
    found = lines(registry)
    assert len(found) == 2 * (1 + len(Outcome))  # all of them from the start
    assert {name: value for name, value in found.items() if value} == {
        'pcae_caller_requests_total{caller="web",outcome="in_time"}': 1,
        'pcae_caller_compute_seconds_total{caller="web"}': 0.25,
    }


def test_callers_beyond_the_first_share_one_label() -> None:
    metrics = CallerMetrics(registry := CollectorRegistry())
    metrics.add([f"caller{i}" for i in range(10 * MAX_LABELS)])
    for i in range(10 * MAX_LABELS):
        metrics.record_compute(f"caller{i}", 1.0)
    metrics.record_compute("never announced", 1.0)
    found = lines(registry)
    assert len(found) == (MAX_LABELS + 1) * (1 + len(Outcome))
    assert found['pcae_caller_compute_seconds_total{caller="other"}'] == 9 * MAX_LABELS + 1
