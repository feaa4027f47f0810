"""Build a service from settings, without HTTP: bundle, engines and service."""

from collections.abc import Callable

from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines.base import Engine, run_directly
from pcae_serve.engines.loader import load_configured_engine
from pcae_serve.runtime import heap
from pcae_serve.runtime.bundle_folder import find_bundle
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings


def build_service(settings: Settings) -> Service:
    """Load the bundle and one engine per device; return a service that has not started.

    Without `settings.bundle`, the demo bundle is served. Raises BundleError, FetchError or
    StartError.
    """
    heap.configure()
    bundle = load_bundle(find_bundle(settings) or demo_path())

    def make_engine(
        bundle: Bundle, device: int, wrap: Callable[[Engine], Engine] = run_directly
    ) -> Engine:
        return load_configured_engine(settings, bundle, settings.devices[device], wrap)

    engines = [make_engine(bundle, i) for i in range(len(settings.devices))]
    return Service(settings, bundle, engines, make_engine)
