"""Progress of a run over many images, on standard error.

A terminal shows one line that is rewritten; elsewhere a line is printed every ten seconds.
"""

import sys
import time
from collections.abc import Callable
from typing import TextIO

#: Seconds between two updates: on a terminal, and elsewhere.
TERMINAL_S, LINES_S = 0.2, 10.0


class Progress:
    """Counts images. Call `clear` before other output, and at the end."""

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._stream, self._clock = total, stream or sys.stderr, clock
        self._terminal = self._stream.isatty()
        self._interval_s = TERMINAL_S if self._terminal else LINES_S
        self._start_s = self._shown_s = clock()
        self._width = 0
        self.done = self.failed = 0

    def add(self, *, failed: bool = False, note: str = "") -> None:
        """Count an image, and show the progress if it is time. note: such as the tier."""
        self.done += 1
        self.failed += failed
        now_s = self._clock()
        if now_s - self._shown_s < self._interval_s:
            return
        self._shown_s = now_s
        self._show(self._line(now_s - self._start_s, note))

    @property
    def rate(self) -> float:
        """Images per second so far."""
        return self.done / max(self._clock() - self._start_s, 1e-9)

    def clear(self) -> None:
        """Remove the line from a terminal."""
        if self._width:
            self._stream.write(f"\r{' ' * self._width}\r")
            self._stream.flush()
            self._width = 0

    def _line(self, elapsed_s: float, note: str) -> str:
        left_s = elapsed_s * (self._total - self.done) / self.done
        parts = [
            f"{self.done:,} of {self._total:,} images",
            f"{self.done / max(elapsed_s, 1e-9):,.1f}/s",
            f"about {duration(left_s)} left",
        ]
        parts += [f"{self.failed:,} failed"] * (self.failed > 0) + [note] * bool(note)
        return ", ".join(parts)

    def _show(self, line: str) -> None:
        if self._terminal:
            self._stream.write(f"\r{line.ljust(self._width)}")
            self._width = len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Return a time as a person writes it: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
