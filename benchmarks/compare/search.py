"""Search for a capacity on a grid of rates, with few trials: each one costs seconds."""

from collections.abc import Generator
from math import log

#: Ratio of neighbouring rates.
STEP = 1.04


def largest_passing(start: int, reach: int = 16) -> Generator[int, bool, int | None]:
    """Yield steps to try, receive whether each passes, and return the largest one that does.

    Steps pass up to some limit; each is asked once. From the guess `start` the distance doubles
    until the answer changes, and the range in between is halved. None: nothing passes within
    `reach` below the guess. Raise ValueError if everything passes within it above.
    """
    up = 1 if (yield start) else -1
    distance, last = 1, start
    while (yield start + up * distance) == (up > 0):
        last = start + up * distance
        distance *= 2
        if distance > reach:
            if up > 0:
                raise ValueError(f"every rate up to step {last} passes")
            return None
    low, high = sorted((last, start + up * distance))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (yield middle) else (low, middle)
    return low


def rate_of(step: int, base_per_s: float) -> float:
    """Return the rate of a step in requests per second; step 0 has the base rate."""
    return base_per_s * STEP**step


def step_near(rate_per_s: float, base_per_s: float) -> int:
    """Return the step whose rate is nearest in ratio."""
    return round(log(rate_per_s / base_per_s) / log(STEP))
