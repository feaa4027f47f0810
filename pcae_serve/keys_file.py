"""The format of files with API keys, shared by the server and the client.

# comment
3f9a…            one key a line; empty lines and lines that begin with # are ignored
"""

from pathlib import Path


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that hold a key, stripped, with their numbers from 1.

    Raise OSError, or UnicodeError if the file is not UTF-8.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    return [(n, line) for n, line in enumerate(lines, 1) if line and not line.startswith("#")]
