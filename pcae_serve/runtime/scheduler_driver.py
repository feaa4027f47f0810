"""Drive the scheduler from asyncio: pass it events, carry out its actions, run its timer."""

import asyncio
import logging
from collections.abc import Callable

from pcae_serve.scheduling.event_log import Recorder, Setup
from pcae_serve.scheduling.events import Action, Dispatch, Done, Event, SetTimer, Timer
from pcae_serve.scheduling.latency import Latency

log = logging.getLogger(__name__)


class SchedulerDriver:
    """A scheduler on the event loop."""

    def __init__(
        self,
        setup: Setup,
        latency: Latency,
        act: Callable[[Action], None],
        *,
        on_fault: Callable[[Dispatch], None],
        recorder: Recorder | None = None,
    ) -> None:
        """Create a scheduler from its setup.

        act: carries out an action, SetTimer excepted. on_fault: called with a batch that `act`
        failed to start; its device is freed afterwards. recorder: writes the event log.
        """
        self.scheduler = setup.scheduler(latency)
        self._act, self._on_fault, self._recorder = act, on_fault, recorder
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        if recorder is not None:
            recorder.begin(setup)

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until all admitted requests should be answered."""
        return self.scheduler.drain_s(asyncio.get_running_loop().time())

    def handle(self, event: Event) -> None:
        """Pass an event to the scheduler and carry out the actions that it returns."""
        if self._stopped:
            return
        actions = self.scheduler.handle(event)
        if self._recorder is not None:
            self._recorder.record(event, actions)
        for action in actions:
            if isinstance(action, SetTimer):
                self._set_timer(action.at_s)
                continue
            try:
                self._act(action)
            except Exception:  # a fault in one action must not prevent the others
                log.exception("internal error: action %s failed", type(action).__name__)
                if isinstance(action, Dispatch):
                    self._abandon(action)

    def stop(self) -> None:
        """Handle no more events."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """Stop, and close the event log."""
        self.stop()
        if self._recorder is not None:
            self._recorder.close()

    def _set_timer(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(at_s, lambda: self.handle(Timer(loop.time())))

    def _abandon(self, dispatch: Dispatch) -> None:
        """Report a batch that could not be started, and free its device."""
        self._on_fault(dispatch)
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: self.handle(Done(loop.time(), dispatch.device, None)))
