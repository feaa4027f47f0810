"""When requests are traced, and what their spans tell."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from pcae_serve.observability import logs, tracing
from pcae_serve.observability.logs import RequestId

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No OTEL_* variable, and what is installed is as if all that is needed were."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(tracing, "_installed", lambda module: True)
    yield monkeypatch
    for name in tracing.DEFAULTS:
        os.environ.pop(name, None)


def setenv(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SERVICE_NAME": ""},
        ENDPOINT | {"OTEL_SDK_DISABLED": "TRUE"},
        ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nobody_asked_for_traces(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variables: dict[str, str]
) -> None:
    setenv(environment, variables)
    assert tracing.config() is None
    assert not caplog.records


def test_an_endpoint_is_enough(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    setenv(environment, ENDPOINT)
    config = tracing.config()
    assert config is not None
    assert (config["auto_configure"], config["metrics"], config["logs"]) == (True, False, False)
    assert os.environ["OTEL_SERVICE_NAME"] == "pcae-serve"
    assert not caplog.records


def test_what_the_variables_say_is_kept(environment: pytest.MonkeyPatch) -> None:
    setenv(environment, ENDPOINT | {"OTEL_SERVICE_NAME": "mine"})
    tracing.config()
    assert os.environ["OTEL_SERVICE_NAME"] == "mine"


def test_a_variable_without_an_endpoint_is_told(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    setenv(environment, {"OTEL_SERVICE_NAME": "mine"})
    assert tracing.config() is None
    [record] = caplog.records
    assert "OTEL_SERVICE_NAME is set" in record.getMessage()
    assert "set OTEL_EXPORTER_OTLP_ENDPOINT" in record.getMessage()


@pytest.mark.parametrize("missing", tracing._NEEDED)
def test_a_missing_package_is_told_once_with_the_extra(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    setenv(environment, ENDPOINT | {"OTEL_EXPORTER_OTLP_HEADERS": "key=s3cret"})
    environment.setattr(tracing, "_installed", lambda module: module != missing)
    with TestClient(FastAPI(telemetry=tracing.config())):
        pass
    [record] = caplog.records
    assert "'.[otel]'" in record.getMessage()
    assert "s3cret" not in record.getMessage()


def test_what_is_installed() -> None:
    assert tracing._installed("fastapi.telemetry")
    assert not tracing._installed("fastapi.nothing_of_the_kind")
    assert not tracing._installed("nothing_of_the_kind.at_all")


def test_without_traces_nothing_is_told() -> None:
    tracing.annotate(tier="full")
    assert tracing.trace_id() is None


def test_spans_tell_of_requests_and_not_of_probes(environment: pytest.MonkeyPatch) -> None:
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="extra otel")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    setenv(environment, ENDPOINT)
    config = tracing.config()
    assert config is not None
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()  # reads the bound on attributes, as FastAPI's own would
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    app = FastAPI(telemetry={**config, "auto_configure": False, "tracer_provider": provider})

    @app.get("/tier")
    async def tier() -> str | None:
        tracing.annotate(tier="full", queue_ms=1.5)
        return tracing.trace_id()

    @app.get("/livez")
    async def livez() -> None:
        pass

    records: list[Any] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append((record.getMessage(), tracing.trace_id()))

    listener = Listener()
    logs.access.addHandler(listener)
    logs.access.setLevel(logging.INFO)
    try:
        with TestClient(RequestId(app)) as client:
            client.get("/livez")
            asked = "0af7651916cd43dd8448eb211c80319c"
            header = {"traceparent": f"00-{asked}-b7ad6b7169203331-01"}
            answer = client.get(f"/tier?x={'y' * 9000}", headers=header)
    finally:
        logs.access.removeHandler(listener)
        logs.access.setLevel(logging.NOTSET)
    [span] = exporter.get_finished_spans()
    assert answer.json() == asked
    assert f"{span.context.trace_id:032x}" == asked
    assert span.name == "GET /tier"
    assert span.attributes["http.response.status_code"] == 200
    assert (span.attributes["pcae.tier"], span.attributes["pcae.queue_ms"]) == ("full", 1.5)
    assert all(len(str(value)) <= 500 for value in span.attributes.values())
    [(message, trace_id)] = records  # the access log's, too, can be joined with it
    assert message.startswith("GET /tier 200")
    assert trace_id == asked


def test_a_provider_that_somebody_set_up_gets_no_second_exporter(
    environment: pytest.MonkeyPatch,
) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    environment.setattr(trace, "get_tracer_provider", trace.NoOpTracerProvider)
    setenv(environment, {"OTEL_SERVICE_NAME": "mine"})
    config = tracing.config()
    assert config is not None
    assert config["auto_configure"] is False
