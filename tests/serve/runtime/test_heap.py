"""Memory returns to the system after a burst."""

import asyncio
import ctypes
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from pcae_serve.runtime import heap
from pcae_serve.runtime.memory_budget import MemoryBudget
from tests.support.images import image_bytes
from tests.support.server_process import server


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_glibc_can_be_configured_and_trimmed() -> None:
    assert heap.configure()
    assert heap.trim()


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not heap.configure()
    assert not heap.trim()


def test_the_heap_is_trimmed_once_after_each_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "CHECK_S", 0.001)
    trims = list[int]()
    memory = MemoryBudget(1_000_000_000)

    def trim() -> bool:
        trims.append(memory.used_bytes)
        return True

    monkeypatch.setattr(heap, "trim", trim)

    async def scenario() -> None:
        trimmer = asyncio.create_task(heap.Trimmer(memory).run())
        for held, trimmed in ((1_000_000, 0), (100_000_000, 1), (20_000_000, 1), (50_000_000, 2)):
            with memory.reserve() as reservation:
                assert reservation.try_resize(held)
                await asyncio.sleep(0.02)  # the burst is not over
                assert len(trims) == trimmed - (held > heap.BURST_BYTES)
            while len(trims) < trimmed:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            assert trims == [0] * trimmed
        trimmer.cancel()

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_memory_returns_to_the_system_after_a_burst(tmp_path: Path) -> None:
    """30 bodies of 20 MB at a time; the first bursts also load what stays."""
    body = image_bytes() + bytes(19_900_000)

    with server("--queue-limit", "1000", cache=tmp_path) as (url, process):

        def resident_mb() -> float:
            text = Path(f"/proc/{process.pid}/status").read_text()
            [line] = (line for line in text.splitlines() if line.startswith("VmRSS"))
            return int(line.split()[1]) / 1e3

        def send(_: int) -> int:
            address = f"{url}/classify?budget_ms=60000"
            return httpx2.post(address, content=body, timeout=90).status_code

        at_rest = resident_mb()
        for _ in range(3):
            with ThreadPoolExecutor(30) as pool:
                assert set(pool.map(send, range(30))) == {200}
        give_up = 200
        while resident_mb() > at_rest + 150 and give_up:
            time.sleep(0.1)
            give_up -= 1
        assert resident_mb() <= at_rest + 150
