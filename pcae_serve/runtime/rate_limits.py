"""Rate limits of API keys: a token bucket each, which holds the images of one second."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from pcae_serve.callers import Caller


@dataclass
class _Bucket:
    rate: float  # images per second
    images: float  # that may be sent now
    now_s: float = 0.0

    @property
    def burst(self) -> float:
        return max(1.0, self.rate)

    def wait_s(self, now_s: float, images: int) -> float:
        """Fill the bucket until `now_s`; return the seconds until N images may be sent.

        They are infinite if it never holds N.
        """
        self.images = min(self.burst, self.images + (now_s - self.now_s) * self.rate)
        self.now_s = now_s
        return inf if images > self.burst else max(0.0, (images - self.images) / self.rate)


class RateLimits:
    """The images per second of callers that have a rate. Times are of one monotonic clock."""

    def __init__(self, callers: Iterable[Caller] = ()) -> None:
        self._buckets = {
            caller.name: _Bucket(caller.rate, max(1.0, caller.rate))
            for caller in callers
            if caller.rate is not None
        }

    def rate(self, name: str | None) -> float:
        """Return the images per second of a caller that has a rate."""
        return self._buckets[name or ""].rate

    def wait_s(self, name: str | None, now_s: float, images: int = 1) -> float:
        """Return the seconds until a caller may send N images at once; 0 if it may now.

        They are infinite if it never may.
        """
        bucket = None if name is None else self._buckets.get(name)
        return 0.0 if bucket is None else bucket.wait_s(now_s, images)

    def take(self, name: str | None, now_s: float, images: int = 1) -> float:
        """Count images unless they exceed the rate; return the seconds to wait if they do."""
        wait_s = self.wait_s(name, now_s, images)
        if not wait_s and name in self._buckets:
            self._buckets[name].images -= images
        return wait_s
