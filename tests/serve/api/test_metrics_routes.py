"""GET /metrics."""

from fastapi.testclient import TestClient

from tests.support.apps import outcomes
from tests.support.images import image_bytes


def test_metrics_count_requests_by_outcome(client: TestClient) -> None:
    before = outcomes(client)
    client.post("/classify", content=image_bytes())
    client.post("/classify?budget_ms=1", content=image_bytes())
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert outcomes(client) - before == {"in_time": 1, "rejected_budget": 1}
    assert "pcae_compute_seconds_total" in response.text
    assert 'pcae_wasted_compute_seconds_total{reason="padding"} 0.0' in response.text
