"""Write files and folders atomically: a reader sees the old content or the new, never half of it.

Content goes to a temporary name in the same folder, is flushed to disk, and is renamed into place.
"""

import os
import shutil
import tempfile
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` with `content`, creating its folder. Raises OSError; then `path` is unchanged.

    Writers at the same time do not disturb each other: the last rename wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes it the owner's alone
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def replace_folder(fresh: Path, target: Path) -> None:
    """Rename the folder `fresh` to `target`, on the same file system; `target` may exist.

    Flushes every file of `fresh` first. Until the rename is on disk, the old folder stays as
    `previous(target)`, where a reader finds it if the writer is killed. Raises OSError; then
    `target` is unchanged.
    """
    for path in (*fresh.rglob("*"), fresh):
        _sync(path)
    old = previous(target)
    if exists := os.path.lexists(target):
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if exists:
            old.rename(target)
        raise
    _sync(target.parent)  # the renames, before the old folder goes
    shutil.rmtree(old, ignore_errors=True)


def previous(target: Path) -> Path:
    """Return where `replace_folder` keeps the old folder while it works."""
    return target.with_name(f".{target.name}.old")


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
