"""Traces: FastAPI's own OpenTelemetry spans, exported as the OTEL_* variables configure.

Uses FastAPI's telemetry setting (since 0.143). Without such a variable nothing is traced and the
SDK is not loaded. Metrics and logs are not exported: Prometheus and stderr have them.
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

#: Polled every few seconds by other programs: their spans would hide the rest.
UNTRACED = frozenset({"/livez", "/readyz", "/metrics"})
#: Defaults: a service name, and a limit on the text that clients write into a URL.
DEFAULTS = {"OTEL_SERVICE_NAME": "pcae-serve", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "500"}

_NEEDED = ("fastapi.telemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def config() -> "TelemetryConfig | None":
    """Return the argument for FastAPI(telemetry=…), or None if nothing is to be exported.

    Log a warning if traces are asked for but cannot be exported. Also set those variables
    of DEFAULTS that are unset: the SDK reads them when the server starts.
    """
    otel_names = sorted(
        name for name, value in os.environ.items() if name.startswith("OTEL_") and value
    )
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not otel_names or disabled or os.environ.get("OTEL_TRACES_EXPORTER", "").lower() == "none":
        return None
    if not all(map(_installed, _NEEDED)):
        log.warning("%s is set, but no traces are sent: %s", otel_names[0], install_command("otel"))
        return None
    # a provider that exists already, as with opentelemetry-instrument, has its own exporter
    own_provider = trace is not None and isinstance(
        trace.get_tracer_provider(), trace.ProxyTracerProvider
    )
    if own_provider and not any(map(os.environ.get, _ENDPOINTS)):
        log.warning(
            "%s is set, but no traces are sent; set %s as well", otel_names[0], _ENDPOINTS[1]
        )
        return None
    for name, value in DEFAULTS.items():
        if not os.environ.get(name):
            os.environ[name] = value
    return {
        "auto_configure": own_provider,
        "metrics": False,
        "logs": False,
        "operation_spans": False,  # dependencies and serialisation: nothing here waits in them
        "exclude": _untraced,
    }


def annotate(**attributes: str | float | bool) -> None:
    """Set attributes pcae.NAME on the current request's span; does nothing without tracing."""
    if trace is not None and (span := trace.get_current_span()).is_recording():
        span.set_attributes({f"pcae.{name}": value for name, value in attributes.items()})


def trace_id() -> str | None:
    """Return the current trace id as 32 hexadecimal digits, or None without a trace."""
    if trace is None:
        return None
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


def _untraced(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in UNTRACED


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing as well
        return False
