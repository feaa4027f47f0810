"""Serve vision transformers under a latency budget."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pcae_serve import usage_reports
from pcae_serve.version import __version__

if TYPE_CHECKING:
    from pcae_serve.client import AsyncClient as AsyncClient
    from pcae_serve.client import Client as Client

__all__ = ["AsyncClient", "Client", "__version__"]

usage_reports.switch_off()

#: Public names that are imported on first use, because their modules are heavy.
_LAZY = {"AsyncClient": "pcae_serve.client", "Client": "pcae_serve.client"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562). Raises AttributeError for an unknown name."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
