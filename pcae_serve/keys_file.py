"""The format of files with API keys, shared by the server and the client.

    # a comment
    3f9a…
    81c2… name=ingest weight=2 rate=50

One key a line, up to the first space; options in any order may follow it. Empty lines and lines
that begin with # are ignored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pcae_serve.bounded_file import read_bounded

#: Size of a keys file, at most: more than 10,000 keys.
MAX_BYTES = 1_000_000

OPTIONS = ("name", "weight", "rate")


class KeyLine(NamedTuple):
    """A line that holds a key."""

    number: int  # from 1
    key: str
    options: Mapping[str, str]


def read_keys(path: Path) -> list[KeyLine]:
    """Return the lines of a file that hold a key.

    Raise OSError, or ValueError if the file is not UTF-8 or a line has another form. No message
    contains a key.
    """
    found = []
    for number, line in enumerate(
        read_bounded(path, MAX_BYTES).decode("utf-8-sig").splitlines(), 1
    ):
        words = line.split()
        if words and not words[0].startswith("#"):
            if words[0].startswith(tuple(f"{name}=" for name in OPTIONS)):
                raise ValueError(f"line {number}: the key comes first, options follow it")
            found.append(KeyLine(number, words[0], _options(number, words[1:])))
    return found


def _options(number: int, words: list[str]) -> Mapping[str, str]:
    pairs = [word.partition("=") for word in words]
    options = {name: value for name, _, value in pairs}
    if len(options) < len(pairs) or not options.keys() <= set(OPTIONS) or not all(options.values()):
        allowed = ", ".join(f"{name}=…" for name in OPTIONS)
        raise ValueError(f"line {number}: only {allowed} may follow a key, each once")
    return options
