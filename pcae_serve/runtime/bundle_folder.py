"""Find the folder of the configured bundle, at the start and again at each reload."""

import logging
from functools import partial
from pathlib import Path

from pcae_serve.settings import Settings
from pcae_serve.sources.locate import locate_bundle

log = logging.getLogger(__name__)


def find_bundle(settings: Settings) -> Path | None:
    """Return the folder of `settings.bundle`, or None for the demo bundle.

    A bundle on a hub is fetched, unless the commit that its revision names is here. Blocks. Raises
    FetchError.
    """
    if settings.bundle is None:
        return None
    return locate_bundle(settings.bundle, settings.cache_dir, partial(log.info, "bundle %s"))
