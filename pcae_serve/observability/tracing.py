"""Traces: FastAPI's own OpenTelemetry spans, sent where the OTEL_* variables say.

It knows the environment and FastAPI's setting for it (since 0.143). Nothing is traced, and nothing
of the SDK is loaded, unless a variable asks for it. Prometheus has the metrics, the log its lines:
neither is sent a second time.
"""

import logging
import os
from collections.abc import MutableMapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pcae_serve.version import install_command

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

try:  # a dependency of FastAPI's, but not of every version that serves
    from opentelemetry import trace
except ImportError:  # pragma: no cover
    trace = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

#: Asked every few seconds by machines: spans of them would bury the rest.
UNTRACED = frozenset({"/livez", "/readyz", "/metrics"})
#: Where nothing else is said: a name to be found by, and a bound on what clients write in an URL.
DEFAULTS = {"OTEL_SERVICE_NAME": "pcae-serve", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "500"}

_NEEDED = ("fastapi.telemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def config() -> "TelemetryConfig | None":
    """FastAPI(telemetry=…): None where nothing is to be sent, whose reason is logged if need be.

    Also gives DEFAULTS to variables that are not set: the SDK reads them when the server starts.
    """
    asked = sorted(name for name, value in os.environ.items() if name.startswith("OTEL_") and value)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not asked or disabled or os.environ.get("OTEL_TRACES_EXPORTER", "").lower() == "none":
        return None
    if not all(map(_installed, _NEEDED)):
        log.warning("%s is set, but no traces are sent: %s", asked[0], install_command("otel"))
        return None
    # whoever set a provider up, such as opentelemetry-instrument, has an exporter there already
    ours = trace is not None and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    if ours and not any(map(os.environ.get, _ENDPOINTS)):
        log.warning("%s is set, but no traces are sent: set %s, too", asked[0], _ENDPOINTS[1])
        return None
    for name, value in DEFAULTS.items():
        if not os.environ.get(name):
            os.environ[name] = value
    return {
        "auto_configure": ours,
        "metrics": False,
        "logs": False,
        "operation_spans": False,  # of dependencies and serialization: nothing here waits in them
        "exclude": _untraced,
    }


def annotate(**attributes: str | float | bool) -> None:
    """Tell of the request in hand on its span, as pcae.NAME; free where nobody traces."""
    if trace is not None and (span := trace.get_current_span()).is_recording():
        span.set_attributes({f"pcae.{name}": value for name, value in attributes.items()})


def trace_id() -> str | None:
    """Of the request in hand, as 32 hexadecimal digits; None where it is not traced."""
    if trace is None:
        return None
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


def _untraced(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in UNTRACED


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False
