"""The folder for what belongs to this machine: profiles, plans and models that were fetched."""

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_DIR = user_cache_path("pcae-serve")

#: The variable of the server's setting; training and export use its folder, too.
VARIABLE = "PCAE_CACHE_DIR"


def cache_folder() -> Path:
    """Return the folder for programs without the server's settings."""
    return Path(os.environ.get(VARIABLE) or CACHE_DIR)
