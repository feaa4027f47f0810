"""The scheduler on an event loop."""

import asyncio

import pytest

from pcae_serve.runtime.scheduler_driver import SchedulerDriver
from pcae_serve.scheduling.event_log import Setup
from pcae_serve.scheduling.events import Action, Arrived, Decoded, Dispatch
from pcae_serve.scheduling.latency import Seconds
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import ALL, LINES, TIER_TABLE

SETUP = Setup(
    policy="greedy",
    waiting_price=0.1,
    tier_table=TIER_TABLE,
    seconds=[{b: Seconds(o + b * i, o + b * i) for b in (1, 32)} for o, i in LINES],
    max_batch=32,
    queue_limit=256,
    devices=1,
)


def test_a_batch_that_cannot_be_started_is_reported_and_frees_its_device(
    caplog: pytest.LogCaptureFixture,
) -> None:
    started, faults = list[tuple[int, ...]](), list[Dispatch]()

    def act(action: Action) -> None:
        if isinstance(action, Dispatch):
            started.append(action.ids)
            if len(started) == 1:
                raise RuntimeError("no memory for the batch")

    async def scenario() -> None:
        driver = SchedulerDriver(SETUP, SETUP.latency(), act, on_fault=faults.append)
        for id_ in (1, 2):
            now_s = asyncio.get_running_loop().time()
            driver.handle(Arrived(now_s, Request(id_, now_s, now_s + 60, ALL)))
            driver.handle(Decoded(now_s, id_))
        assert started == [(1,)]
        await asyncio.sleep(0)
        assert started == [(1,), (2,)]
        driver.close()
        driver.handle(Decoded(now_s, 3))  # after the end: ignored

    asyncio.run(scenario())
    assert [dispatch.ids for dispatch in faults] == [(1,)]
    assert "action Dispatch failed" in caplog.text
