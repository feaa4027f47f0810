"""A worker: one engine on one device, with a watchdog and recovery.

    run               a call on the device; one that exceeds the watchdog limit is taken to hang
    hang              the engine is terminated; the device is lost if the call still does not return
    recreate_engine   a new engine in place of one that failed, retried until it succeeds

Calls run on the device's thread, everything else on the event loop.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from pcae_serve.bundle.manifest import Tier
from pcae_serve.engines.base import DenseEngine, Engine, Output, Pixels
from pcae_serve.errors import BundleError, one_line
from pcae_serve.runtime.threads import Device

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that a terminated call has to return before its device is lost.
TERMINATE_S = 2.0
#: Time limit in seconds for creating an engine: graph captures of many tiers can take minutes.
MAKE_S = 600.0
#: Interval, in seconds, between attempts to create an engine.
RETRY_S = 15.0


class NotFinite(Exception):
    """The engine's output contains NaN or infinity."""


def compute(engine: Engine, tier: Tier, pixels: Pixels, dense: bool = False) -> Output:
    """Run a batch and check its output. dense: with patch grids, on an engine that has them.

    Raises NotFinite, or what the engine raises.
    """
    if dense:
        assert isinstance(engine, DenseEngine)
        output = engine.run_densely(tier, pixels)
        assert output.patches is not None
        finite = bool(np.isfinite(output.patches).all())
    else:
        output, finite = engine.run(tier, pixels), True
    if not (finite and np.isfinite(output.vectors).all()):
        raise NotFinite(f"tier {tier.name!r} returned values that are not finite")
    return output


class Worker:
    """An engine on its device. `engine` is the current one."""

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
        """Create a worker that uses `engine`.

        watchdog_s: time limit of a call. make: creates an engine in place of one that failed, and
        may block; None: the old engine is used again. on_broken: called whenever no engine could be
        created. on_lost: called if a call never returns.
        """
        self.engine, self._device, self._watchdog_s = engine, device, watchdog_s
        self._make, self._on_broken, self._on_lost = make, on_broken, on_lost
        self._broken = False  # no engine at present
        self._calls = 0  # running or waiting on the device

    @property
    def name(self) -> str:
        """Name of the device."""
        return self._device.name

    @property
    def lost(self) -> bool:
        """Whether a call on the device hangs for good."""
        return self._device.lost

    @property
    def works(self) -> bool:
        """Whether it can run batches."""
        return not (self._device.lost or self._broken)

    @property
    def busy(self) -> bool:
        """Whether a call is running or waiting on the device."""
        return self._calls > 0

    def compute(self, tier: Tier, pixels: Pixels, dense: bool = False) -> Output:
        """Run a batch, on the device's thread. Raises NotFinite, or what the engine raises."""
        return compute(self.engine, tier, pixels, dense)

    def run(
        self,
        call: Callable[[], T],
        ended: Callable[[asyncio.Future[T]], None],
        hung: Callable[[TimeoutError], None],
        terminate: Callable[[], None] | None = None,
    ) -> None:
        """Run a call on the device, with a watchdog.

        ended: called when the call has returned. hung: called before that, if it exceeds the
        watchdog limit; it is then ended by `terminate`, or by the engine's own.
        """
        loop = asyncio.get_running_loop()
        end_call = terminate or self.engine.terminate

        def watched() -> T:
            watchdog.start()  # only now: another bundle's batch may have used the device before
            return call()

        def time_out() -> None:
            hung(TimeoutError(f"the call did not return within {self._watchdog_s:g} s"))
            end_call()
            loop.call_later(TERMINATE_S, self._lose_if_running, running)

        def returned(done: asyncio.Future[T]) -> None:
            self._calls -= 1
            watchdog.cancel()
            ended(done)

        self._calls += 1
        watchdog = _Watchdog(self._watchdog_s, time_out)
        running = self._device.submit(watched)
        running.add_done_callback(returned)

    async def recreate_engine(self) -> bool:
        """Recreate the failed engine, retrying until it succeeds.

        Returns False if the device is lost. Without `make`, or if the bundle's files have changed,
        the old engine is used again.
        """
        while self._make is not None:
            try:
                async with asyncio.timeout(MAKE_S) as timeout:
                    made = await self._device.submit(self._make)
            except BundleError as error:  # its files have changed: only the old engine is left
                log.error("keeping the engine that failed: %s", error)
                break
            except Exception as error:  # perhaps too little memory at present
                if timeout.expired():
                    self._lose()
                    return False
                self._broken = True
                log.error(
                    "cannot create an engine on %s, retrying in %g s: %s",
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
        """Release what the engine holds, unless a call hangs in it."""
        if not self._device.lost:
            self.engine.close()

    def _lose_if_running(self, running: asyncio.Future[Any]) -> None:
        if not running.done():
            self._lose()

    def _lose(self) -> None:
        self._device.lost = True
        log.critical(
            "%s does not return from a call; /livez fails from now on, so that a supervisor"
            " restarts this server",
            self.name,
        )
        self._on_lost()


class _Watchdog:
    """The time limit of a call, from the moment that it starts on its thread.

    The thread only notes the time: waking the event loop for each call would cost more.
    """

    def __init__(self, limit_s: float, time_out: Callable[[], None]) -> None:
        """time_out: called on the event loop, once, unless this is cancelled before."""
        self._limit_s, self._time_out = limit_s, time_out
        self._loop = asyncio.get_running_loop()
        self._start_s: float | None = None
        self._timer = self._loop.call_later(limit_s, self._check)

    def start(self) -> None:
        """Note that the call starts. May be called from any thread."""
        self._start_s = self._loop.time()

    def cancel(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        left_s = self._limit_s
        if self._start_s is not None:
            left_s -= self._loop.time() - self._start_s
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check)
        else:
            self._time_out()
