"""Show the progress of long work on standard error.

On a terminal a bar; elsewhere (a log file, a container) a line every 30 s. If torchrun started
several processes, only the first one shows anything.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Self

from tqdm import tqdm

LOG_EVERY_S = 30.0


class Progress:
    """Progress over a known number of images. A context manager: the bar is removed at the end."""

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        announce: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """done: images processed by earlier runs. announce: log a first line at once."""
        self._title, self._total, self._done, self._before = title, total, done, done
        self._figures: Mapping[str, str] = MappingProxyType({})
        self._clock, self._started, self._logged = clock, clock(), clock()
        main = os.environ.get("RANK", "0") == "0"
        terminal = sys.stderr.isatty()
        self._log_lines = main and not terminal
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            leave=announce,
            disable=not (main and terminal),
        )
        if announce and self._log_lines:
            print(f"{title}: {self._count()}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, images: int, title: str | None = None) -> None:
        """Add `images` to those done, and log a line if one is due."""
        self._done += images
        if title is not None:
            self._title = title
            self._bar.set_description_str(title, refresh=False)
        self._bar.update(images)
        now = self._clock()
        if self._log_lines and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            print(self._line(now - self._started), file=sys.stderr, flush=True)

    def show(self, figures: Mapping[str, float]) -> None:
        """Show figures such as the loss with the progress."""
        self._figures = {name: f"{value:.4g}" for name, value in figures.items()}
        self._bar.set_postfix(self._figures)

    def write(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        tqdm.write(text, file=sys.stderr)

    def _count(self) -> str:
        return f"{self._done:,} of {self._total:,} images"

    def _line(self, elapsed_s: float) -> str:
        parts = [f"{self._count()} ({self._done / max(self._total, 1):.0%})"]
        parts += [f"{name} {value}" for name, value in self._figures.items()]
        if (here := self._done - self._before) and elapsed_s > 0:
            rate = here / elapsed_s
            parts.append(f"{rate:.3g} images/s")
            parts.append(f"{format_duration((self._total - self._done) / rate)} left")
        return f"{self._title}: {', '.join(parts)}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
