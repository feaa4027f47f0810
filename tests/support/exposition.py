"""The series that /metrics exposes, with their labels."""

from prometheus_client.parser import text_string_to_metric_families

from pcae_serve.observability.metrics import Metrics


def served() -> dict[str, list[dict[str, str]]]:
    """Labels of every sample, by its name."""
    found: dict[str, list[dict[str, str]]] = {}
    content, _ = Metrics(["fast", "full"]).exposition()
    for family in text_string_to_metric_families(content.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


SERVED = served()
