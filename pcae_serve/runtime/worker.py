"""A worker: one engine at work on one device, watched, told to end and made anew.

    run      a call on the device     -> ended, or hung first: it took far too long
    hung     the engine is told to end; where even that does not help, the device is lost for good
    renew    another engine in the place of one that failed, tried again until there is one

Everything but the calls runs on the event loop. It knows engines, devices and seconds, nothing of
requests, of tiers in routing or of workers beside it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from pcae_serve.bundle.manifest import Tier
from pcae_serve.engines.base import Engine, Output, Pixels
from pcae_serve.errors import BundleError, one_line
from pcae_serve.runtime.threads import Device

log = logging.getLogger(__name__)

T = TypeVar("T")

#: An engine that was told to give up has so long to come back.
TERMINATE_S = 2.0
#: Making an engine takes at most so long: captures and plans of many tiers may take minutes.
MAKE_S = 600.0
#: An engine that cannot be made is tried again so often.
RETRY_S = 15.0


class NotFinite(Exception):
    """An engine answered with numbers that are none."""


class Worker:
    """An engine on its device. `engine` is the one that runs now."""

    def __init__(
        self,
        engine: Engine,
        device: Device,
        *,
        watchdog_s: float,
        make: Callable[[], Engine] | None = None,
        on_broken: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """watchdog_s: a call that takes longer hangs. make: an engine for one that failed, which
        may block; None: the old one is used again.

        on_broken is told each time that no engine can be made, on_lost of a device that never comes
        back.
        """
        self.engine, self._device, self._watchdog_s = engine, device, watchdog_s
        self._make, self._on_broken, self._on_lost = make, on_broken, on_lost
        self._broken = False  # without an engine, for now
        self._calls = 0  # on the device

    @property
    def name(self) -> str:
        """Of the device."""
        return self._device.name

    @property
    def lost(self) -> bool:
        """Whether its device never comes back."""
        return self._device.lost

    @property
    def works(self) -> bool:
        """Whether it can run anything."""
        return not (self._device.lost or self._broken)

    @property
    def busy(self) -> bool:
        """Whether a call is on the device, or waits for its turn there."""
        return self._calls > 0

    def compute(self, tier: Tier, pixels: Pixels) -> Output:
        """Run a batch; it blocks, so it is for the device. Raises NotFinite, or as the engine."""
        output = self.engine.run(tier, pixels)
        if not np.isfinite(output.vectors).all():
            raise NotFinite(f"tier {tier.name!r} answered with numbers that are not finite")
        return output

    def run(
        self,
        call: Callable[[], T],
        ended: Callable[[asyncio.Future[T]], None],
        hung: Callable[[TimeoutError], None],
        terminate: Callable[[], None] | None = None,
    ) -> None:
        """Run a call on the device, watched.

        ended is told when it comes back, hung before that of one that takes far too long, which is
        then told to end: by `terminate`, or by that of the engine.
        """
        loop = asyncio.get_running_loop()
        tell = terminate or self.engine.terminate
        watch: asyncio.TimerHandle | None = None

        def begun() -> None:
            nonlocal watch
            watch = loop.call_later(self._watchdog_s, bark)

        def watched() -> T:
            loop.call_soon_threadsafe(begun)  # another bundle's batch may have been before it
            return call()

        def bark() -> None:
            hung(TimeoutError(f"it did not come back within {self._watchdog_s:g} s"))
            tell()
            loop.call_later(TERMINATE_S, self._give_up, running)

        def back(done: asyncio.Future[T]) -> None:
            self._calls -= 1
            if watch is not None:
                watch.cancel()
            ended(done)

        self._calls += 1
        running = self._device.submit(watched)
        running.add_done_callback(back)

    async def renew(self) -> bool:
        """Another engine for one that failed, however often it takes; whether the device has one.

        It has none where making one never came back.
        """
        while self._make is not None:
            try:
                async with asyncio.timeout(MAKE_S) as patience:
                    made = await self._device.submit(self._make)
            except BundleError as error:  # it lies there no more: what runs is all there is of it
                log.error("the engine that failed is used again: %s", error)
                break
            except Exception as error:  # the machine may be short of memory, for now
                if patience.expired():
                    self._lose()
                    return False
                self._broken = True
                log.error(
                    "no new engine on %s, trying again in %g s: %s",
                    self.name,
                    RETRY_S,
                    one_line(error),
                )
                self._on_broken()
                await asyncio.sleep(RETRY_S)
            else:
                self.engine, old = made, self.engine
                old.close()
                break
        self._broken = False
        return True

    def close(self) -> None:
        """Give back what the engine holds, where its device can still be told to."""
        if not self._device.lost:
            self.engine.close()

    def _give_up(self, running: asyncio.Future[Any]) -> None:
        """A call that does not even end when it is told to."""
        if not running.done():
            self._lose()

    def _lose(self) -> None:
        self._device.lost = True
        log.critical(
            "%s does not come back from a call: /livez fails from now on, so that a supervisor"
            " restarts this server",
            self.name,
        )
        self._on_lost()
