"""Write result files atomically, and check beforehand that they can be written."""

import os
from pathlib import Path

from pcae_serve import atomic
from pcae_serve.errors import PcaeError


def check_writable(file: Path) -> None:
    """Raise PcaeError if it is known already that `write_whole` cannot write `file`."""
    ancestor = next(parent for parent in file.absolute().parents if parent.exists())
    if file.is_dir():
        raise PcaeError(f"cannot write {file}: it is a folder")
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise PcaeError(f"cannot write {file}: {ancestor} is not a writable folder")


def write_whole(file: Path, content: bytes) -> None:
    """Write `file` atomically. Raise PcaeError if it cannot be written."""
    try:
        atomic.write_file(file, content)
    except OSError as error:
        raise PcaeError(f"cannot write {file}: {error.strerror or error}") from None
