"""Return free memory of the C allocator to the system.

glibc keeps what was freed for later allocations, in two ways that a burst of large bodies makes
expensive. It serves blocks of up to 32 MB from its heap once blocks of that size have been freed,
and a heap shrinks only at its end. Free pages between smaller blocks stay, too. `configure` ends
the first, `Trimmer` returns the second once a burst is over. Other allocators, such as musl's, have
neither function and are left alone.
"""

import asyncio
import ctypes
import logging
import time

from pcae_serve.runtime.memory_budget import MemoryBudget

log = logging.getLogger(__name__)

#: Blocks of at least this size are returned to the system when they are freed. To get their pages
#: again costs about 0.1 ms per MB.
MMAP_BYTES = 1 << 20
#: Interval of the check whether a burst is over.
CHECK_S = 1.0
#: A burst is what held at least this much; it is over when requests hold less than half of it.
BURST_BYTES = 32_000_000

_M_MMAP_THRESHOLD = -3  # malloc.h


def configure() -> bool:
    """Have large blocks returned when they are freed; return whether the allocator can do that."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES) == 1


def trim() -> bool:
    """Return all free pages to the system; return whether the allocator can do that.

    It takes up to 0.1 ms per free MB, during which other threads may wait for memory.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is None:
        return False
    malloc_trim(0)
    return True


class Trimmer:
    """Trims the heap after bursts."""

    def __init__(self, memory: MemoryBudget) -> None:
        self._memory = memory

    async def run(self) -> None:
        """Check until it is cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            held = self._memory.used_bytes
            peak = self._memory.peak_bytes
            if peak >= BURST_BYTES and held < peak / 2:
                self._memory.peak_bytes = held
                start_s = time.monotonic()
                if not await asyncio.to_thread(trim):
                    return
                seconds = time.monotonic() - start_s
                log.debug("trimmed the heap in %.0f ms after a burst", 1e3 * seconds)
