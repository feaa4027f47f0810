"""Serve vision transformers under a latency budget."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pcae_serve import usage_reports
from pcae_serve.version import __version__

if TYPE_CHECKING:
    from pcae_serve.client import AsyncClient as AsyncClient
    from pcae_serve.client import Client as Client
    from pcae_serve.local.model import Model as Model
    from pcae_serve.local.model import load as load

__all__ = ["AsyncClient", "Client", "Model", "__version__", "load"]

usage_reports.switch_off()

#: Public names that are imported on first use, because their modules are heavy.
_LAZY = {
    "AsyncClient": "pcae_serve.client",
    "Client": "pcae_serve.client",
    "Model": "pcae_serve.local.model",
    "load": "pcae_serve.local.model",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562). Raises AttributeError for an unknown name."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
