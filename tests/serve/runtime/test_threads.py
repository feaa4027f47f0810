"""Threads for calls that may never come back."""

import asyncio
import os
import sys
import threading

import pytest

from pcae_serve.runtime.threads import NICENESS, Threads


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness is the process's")
def test_threads_stand_back_behind_the_loop() -> None:
    async def scenario() -> None:
        before = niceness()
        threads = Threads("t", 2)
        assert await threads.submit(niceness) == min(19, before + NICENESS)
        assert niceness() == before
        assert await threads.shutdown(1.0)

    asyncio.run(scenario())


def test_what_may_not_be_set_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError

    async def scenario() -> None:
        threads = Threads("t", 1)
        assert await threads.submit(lambda: 7) == 7
        assert await threads.shutdown(1.0)

    monkeypatch.setattr(os, "setpriority", forbidden)
    asyncio.run(scenario())
