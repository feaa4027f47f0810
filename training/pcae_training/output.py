"""A file written whole or not at all, and whether a place can be written to.

It knows paths and bytes, nothing of what is in them.
"""

import os
from pathlib import Path

from pcae_serve import atomic
from pcae_serve.errors import PcaeError


def check_place(file: Path) -> None:
    """Raise PcaeError where `write_whole` could not write `file`, as far as can be told before."""
    there = next(parent for parent in file.absolute().parents if parent.exists())
    if file.is_dir():
        raise PcaeError(f"cannot write {file}: it is a folder")
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PcaeError(f"cannot write {file}: {there} is no folder that can be written to")


def write_whole(file: Path, content: bytes) -> None:
    """Write `file` beside its place, then put it there: never half. Raises PcaeError."""
    try:
        atomic.write_file(file, content)
    except OSError as error:
        raise PcaeError(f"cannot write {file}: {error.strerror or error}") from None
