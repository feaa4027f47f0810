"""Open the bundle that a command names: a folder, or a name on the hub."""

import sys
from functools import partial
from pathlib import Path

from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.settings import CACHE_DIR, Settings
from pcae_serve.sources.locate import locate_bundle
from pcae_serve.sources.names import is_remote

#: Help of the argument BUNDLE.
BUNDLE_HELP = "bundle folder, or where it is: hf://OWNER/NAME, https://…, s3://… or gs://…"


def open_bundle(name: str, cache_dir: Path | None = None) -> Bundle:
    """Load a bundle; one on the hub is fetched into `cache_dir`, by default the server's.

    Raises PcaeError.
    """
    if cache_dir is None:
        cache_dir = Settings().cache_dir if is_remote(name) else CACHE_DIR
    return load_bundle(locate_bundle(name, cache_dir, partial(print, file=sys.stderr)))
