"""GET /livez and /readyz."""

from fastapi.testclient import TestClient

from pcae_serve.bundle.reader import Bundle
from pcae_serve.runtime.service import Service
from tests.support.apps import MakeSettings, problem, serving, wait_until
from tests.support.gate import Gate
from tests.support.images import image_bytes


def test_health_and_documentation(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/docs").status_code == 200
    operation = client.get("/openapi.json").json()["paths"]["/classify"]["post"]
    assert "image/*" in operation["requestBody"]["content"]
    assert {"200", "400", "413", "415", "422", "503", "504"} <= set(operation["responses"])


def test_not_ready_before_latencies_are_known(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    gate.shut()
    service = Service(settings(), small_bundle, [gate])
    with serving(service, ready=False) as client:
        problem(client.get("/readyz"), 503)
        assert client.get("/livez").status_code == 200
        refused = client.post("/classify", content=image_bytes())
        assert refused.headers["retry-after"] == "1"
        problem(refused, 503)
        gate.open.set()
        wait_until(lambda: service.ready)
        assert client.get("/readyz").status_code == 200
        assert client.post("/classify", content=image_bytes()).status_code == 200
