"""Limit the rate of log records: the first event is logged at once, later ones are counted."""

import logging
import time
from collections.abc import Callable

#: Minimum time between two records of one kind.
INTERVAL_S = 10.0


class Throttle:
    """Log one kind of event, at most once in INTERVAL_S."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._logged_s: float | None = None
        self._skipped = 0

    def warning(self, message: str, *args: object) -> None:
        """Log `message`, with the number of those skipped since the last record; or skip it."""
        now_s = self._clock()
        if self._logged_s is not None and now_s - self._logged_s < INTERVAL_S:
            self._skipped += 1
            return
        since = f" ({self._skipped} more since the last record)" if self._skipped else ""
        self._log.warning(message + "%s", *args, since)
        self._logged_s, self._skipped = now_s, 0
