"""The raw log: a line of JSON per trial and per result, so that a run resumes where it ended."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class OutOfTimeError(Exception):
    """The time of this call is over; the next call goes on from the log."""


class Log:
    """Entries by key; the last one of a key counts."""

    def __init__(self, path: Path, end_s: float) -> None:
        """Read the log. end_s: time.monotonic() after which no trial begins."""
        self._path, self._end_s = path, end_s
        self._entries: dict[str, Entry] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self._entries[entry["key"]] = entry

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def under(self, prefix: str) -> Iterator[Entry]:
        """Yield the entries whose keys begin so, in the order of their first lines."""
        yield from (entry for key, entry in self._entries.items() if key.startswith(prefix))

    def add(self, key: str, entry: Entry) -> Entry:
        """Write an entry and return it with its key."""
        whole = {"key": key, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | entry
        with self._path.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        self._entries[key] = whole
        return whole

    def once(self, key: str, measure: Callable[[], Entry], seconds: float) -> Entry:
        """Return the entry of a key, measured now unless the log has it.

        Raise OutOfTimeError if a measurement of `seconds` would end too late.
        """
        found = self.get(key)
        if found is None:
            self.require(seconds)
            found = self.add(key, measure())
        return found

    def require(self, seconds: float) -> None:
        """Raise OutOfTimeError unless `seconds` are left."""
        if time.monotonic() + seconds > self._end_s:
            raise OutOfTimeError
