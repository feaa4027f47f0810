"""Report the progress of long work: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

LOG_S = 10.0


class Progress:
    """Counts units of work on standard error. Use it as a context manager."""

    def __init__(
        self,
        title: str,
        total: float,
        unit: str,
        bar_format: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._unit, self._clock = title, total, unit, clock
        self._logs = not sys.stderr.isatty()
        self._bar = tqdm(
            desc=title, total=total, unit=unit, bar_format=bar_format, leave=False,
            disable=self._logs,
        )  # fmt: skip
        self._done, self._logged = 0.0, clock()
        self._log()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, units: float = 1) -> None:
        """Add finished units."""
        self._bar.update(units)
        self._done += units
        if self._clock() - self._logged >= LOG_S:
            self._logged = self._clock()
            self._log()

    def reset(self, total: float) -> None:
        """Start again at 0 of a new total."""
        self._bar.reset(total)
        self._done, self._total = 0.0, total

    def describe(self, text: str) -> None:
        """Show a text next to the bar."""
        self._bar.set_postfix_str(text)

    def _log(self) -> None:
        if self._logs:
            count = f": {self._done:.0f} of {self._total:.0f} {self._unit}" if self._total else ""
            print(f"{self._title}{count}", file=sys.stderr, flush=True)
