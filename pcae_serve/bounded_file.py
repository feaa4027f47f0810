"""Read files up to a size; from folders that others may have written, only regular files.

Opening a FIFO waits for a writer, and a device can deliver bytes without end.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raise OSError, without waiting, if it is something else; its `strerror` says what.
    """
    _check_kind(path.stat(), path)  # first, because opening a device can have effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file. Raise OSError if it is not one, or is larger."""
    with open_regular(path) as file:
        return _read(file, path, max_bytes)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file that an operator names; it may be a FIFO, such as `<(…)`.

    Raise OSError if it cannot be read or is larger.
    """
    with path.open("rb") as file:
        return _read(file, path, max_bytes)


def _read(file: BufferedReader, path: Path, max_bytes: int) -> bytes:
    content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes / 1e6:g} MB", str(path))
    return content


def _check_kind(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of an unknown kind")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))
