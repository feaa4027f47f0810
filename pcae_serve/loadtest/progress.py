"""Progress of long work on standard error: a bar on a terminal, otherwise a line every 10 s."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from typing import TypeVar

T = TypeVar("T")

#: Seconds between two lines, without a terminal.
INTERVAL_S = 10.0


def report(line: str) -> None:
    """Print a line to standard error at once."""
    print(line, file=sys.stderr, flush=True)


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield the items and show how many of `total` are done, and the time left."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            for item in items:
                yield item
                bar.advance(task)
        return
    done = 0

    def line(elapsed_s: float) -> str:
        left = f", about {elapsed_s * (total - done) / done:.0f} s left" if done else ""
        return f"{what}: {done} of {total} after {elapsed_s:.0f} s{left}"

    with _every_interval(line):
        for item in items:
            yield item
            done += 1


@contextmanager
def status(what: str) -> Iterator[None]:
    """Show that `what` is in progress: a spinner on a terminal, otherwise lines."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
        return
    report(what)
    with _every_interval(lambda elapsed_s: f"{what}: {elapsed_s:.0f} s so far"):
        yield


@contextmanager
def _every_interval(line: Callable[[float], str]) -> Iterator[None]:
    """Print `line(elapsed_s)` every INTERVAL_S from a thread, until the block ends."""
    ended = Event()
    start_s = monotonic()

    def run() -> None:
        while not ended.wait(INTERVAL_S):
            report(line(monotonic() - start_s))

    thread = Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
