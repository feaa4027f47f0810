"""Decode images on threads while the engine computes: in order, and a limited number ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def decode_ahead(
    images: Iterable[T],
    submit: Callable[[T], Future[R]],
    choose_size: Callable[[], int],
    ahead: int,
) -> Iterator[list[Future[R]]]:
    """Yield the images' results in lists, in order.

    submit: starts decoding an image. choose_size: returns the length of the next list; the last may
    be shorter. ahead: images that may be decoded beyond the list in use.
    Images are taken from the iterable on this thread. If the iteration is given up, what has not
    begun is cancelled.
    """
    waiting, source = deque[Future[R]](), iter(images)
    try:
        while True:
            batch = choose_size()
            for image in islice(source, batch + ahead - len(waiting)):
                waiting.append(submit(image))
            if not waiting:
                return
            yield [waiting.popleft() for _ in range(min(batch, len(waiting)))]
    finally:
        for future in waiting:
            future.cancel()
