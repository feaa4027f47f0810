"""JSON documents and files that are not what their name promises."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

#: JSON documents that Python's parser reads or takes long for, and a word of what is said of each.
JSON = {
    "arrays 200,000 deep": (b"[" * 200_000, "levels deep"),
    "objects 100,000 deep": (b'{"a":' * 100_000, "levels deep"),
    "40 levels, closed": (b"[" * 40 + b"]" * 40, "levels deep"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "-Infinity": (b"[-Infinity]", "Infinity"),
    "1e400": (b"[1e400]", "too large"),
    "an integer of 5,000 digits": (b"[" + b"9" * 5000 + b"]", "digits"),
    "a name twice": (b'{"labels": 1, "labels": 2}', "twice"),
    "half a surrogate pair": (b'{"labels": ["\\ud800"]}', "surrogate"),
    "half a surrogate pair as a name": (b'{"\\uDFFF": 1}', "surrogate"),
    "UTF-16": (b"\xff\xfe{\x00}\x00", "UTF-8"),
    "nothing": (b"", "Expecting value"),
    "two documents": (b"{} {}", "Extra data"),
    "9 MB of text": (b'"' + b"x" * 9_000_000 + b'"', "larger than"),
}


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


#: What can lie in a folder under a file's name: how to make it, and what it is called.
KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "FIFO": (os.mkfifo, "a FIFO"),
    "device": (_device, "a device|outside the bundle"),
    "socket": (_socket, "a socket"),
    "folder": (Path.mkdir, "a folder"),
    "link in a circle": (lambda path: path.symlink_to(path.name), "symbolic link|loop"),
}
