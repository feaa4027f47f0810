"""Which tiers are in rotation: failures take a tier out, a successful probe returns it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from pcae_serve.errors import one_line
from pcae_serve.observability.metrics import Metrics

log = logging.getLogger(__name__)

#: Consecutive failures that take a tier out of rotation.
MAX_FAILURES = 3
#: Interval, in seconds, between probes of a tier that is out of rotation.
PROBE_INTERVAL_S = 15.0


class TierHealth:
    """Consecutive failures per tier. Tiers are numbered as in the bundle."""

    def __init__(self, names: Sequence[str], metrics: Metrics) -> None:
        self._names, self._metrics = names, metrics
        self._failures: Counter[int] = Counter()  # consecutive, by tier
        self._disabled: set[int] = set()

    @property
    def disabled(self) -> frozenset[int]:
        """Tiers out of rotation."""
        return frozenset(self._disabled)

    @property
    def works(self) -> bool:
        """Whether any tier is in rotation."""
        return len(self._disabled) < len(self._names)

    def in_rotation(self, tiers: Sequence[int]) -> tuple[int, ...]:
        """Return those of `tiers` that are in rotation, in the same order."""
        return tuple(tier for tier in tiers if tier not in self._disabled)

    def succeeded(self, tier: int) -> None:
        """Reset the count of consecutive failures."""
        self._failures[tier] = 0

    def failed(self, tier: int) -> int:
        """Count one failure and return how many there are in a row."""
        self._failures[tier] += 1
        return self._failures[tier]

    def disable_if_failing(self, tier: int) -> bool:
        """Take a tier out of rotation after MAX_FAILURES; return whether that happened now."""
        if self._failures[tier] < MAX_FAILURES or tier in self._disabled:
            return False
        log.error(
            "tier %s is out of rotation after %d consecutive failures; probed every %g s",
            self._names[tier],
            self._failures[tier],
            PROBE_INTERVAL_S,
        )
        self._disabled.add(tier)
        self._metrics.set_tier_disabled(self._names[tier], True)
        return True

    async def probe_until_healthy(
        self, tier: int, probe: Callable[[int], Awaitable[object]]
    ) -> None:
        """Run `probe(tier)` at intervals until it succeeds; then return the tier to rotation."""
        while tier in self._disabled:
            await asyncio.sleep(PROBE_INTERVAL_S)
            try:
                await probe(tier)
            except Exception as error:
                log.warning("tier %s stays out of rotation: %s", self._names[tier], one_line(error))
            else:
                log.info("tier %s is back in rotation", self._names[tier])
                self._failures[tier] = 0
                self._disabled.discard(tier)
                self._metrics.set_tier_disabled(self._names[tier], False)
