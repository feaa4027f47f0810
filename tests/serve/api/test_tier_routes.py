"""GET /tiers."""

from dataclasses import replace

from fastapi.testclient import TestClient

from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.service import Service
from tests.support.apps import MakeSettings, quick, serving


def test_tiers_report_accuracy_and_latency(client: TestClient) -> None:
    document = client.get("/tiers").json()
    assert [tier["name"] for tier in document["tiers"]] == ["fast", "balanced", "full"]
    assert document["tiers"][0]["accuracy"]["top1"] == 0.80
    assert document["tiers"][2]["latency_ms"]["1"] >= 40
    assert (document["backend"], document["backend_note"]) == ("simulated", None)
    assert document["max_looks"] == 1  # it is not calibrated
    assert (document["answers"], document["width"]) == ("classes", 4)
    reported = {key: document["tiers"][0][key] for key in ("model", "reduction", "precision")}
    assert reported == {"model": "vit", "reduction": "ptr", "precision": "float32"}


def test_a_backend_that_was_never_run_on_a_gpu_is_marked(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    vit = small_bundle.manifest.models["vit"].model_copy(update={"half": "bfloat16"})
    served = replace(
        small_bundle, manifest=small_bundle.manifest.model_copy(update={"models": {"vit": vit}})
    )
    engine = SimulatedEngine(served, device="cuda:0", seconds=quick)
    engine.name = "cuda"
    with serving(Service(settings(), served, [engine])) as client:
        document = client.get("/tiers").json()
    assert document["backend_note"] == "built, not yet run on a GPU"
    assert document["tiers"][0]["precision"] == "bfloat16"


def test_tiers_report_features(headless: TestClient) -> None:
    document = headless.get("/tiers").json()
    assert (document["answers"], document["width"], document["labels"]) == ("features", 8, [])
    assert document["tiers"][0]["fidelity"] is None
