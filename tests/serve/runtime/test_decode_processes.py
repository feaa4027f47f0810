"""Decoder processes: the same pixels, limits, and what survives their end."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import RequestError, TooLarge, UnreadableImage, UnsupportedType
from pcae_serve.runtime import decode_processes, decode_worker
from pcae_serve.runtime.decode_processes import DecodeProcesses
from pcae_serve.runtime.decode_worker import Request
from pcae_serve.runtime.refusals import Refused
from tests.support.images import image_bytes

PREPROCESS = Preprocess(image_size=8, resize=8, mean=(0.5,) * 3, std=(0.5,) * 3)
BODY = image_bytes(level=7, size=(100, 60))
DAMAGED = BODY[: len(BODY) // 2]


def request(body: bytes = BODY, max_pixels: int = 1_000_000, cpu_s: float = 20.0) -> Request:
    return Request(PREPROCESS, body, max_pixels, 1_000_000, cpu_s)


def with_processes(count: int, scenario: Callable[[DecodeProcesses], Awaitable[None]]) -> None:
    async def run() -> None:
        processes = DecodeProcesses(count)
        try:
            await scenario(processes)
        finally:
            await processes.stop()

    asyncio.run(run())


def children() -> set[int]:
    """Return the processes that this one has started and not reaped."""
    file = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return {int(pid) for pid in file.read_text().split()}


def test_a_process_gives_the_pixels_and_errors_of_a_thread() -> None:
    times: list[tuple[float, bool]] = []

    async def scenario(processes: DecodeProcesses) -> None:
        for _ in range(2):  # the second time, it is the same process
            pixels = await processes.decode(request(), lambda *took: times.append(took))
            np.testing.assert_array_equal(pixels, PREPROCESS(BODY))
            assert times[-1][0] > 0
            assert times[-1][1]
            assert processes.warm
        for bad, kind in (
            (request(DAMAGED), UnreadableImage),
            (request(b"GIF"), UnsupportedType),
            (request(max_pixels=10), TooLarge),
        ):
            with pytest.raises(kind) as there:
                await processes.decode(bad)
            with pytest.raises(kind) as here:
                PREPROCESS(bad.body, bad.max_pixels)
            assert str(there.value) == str(here.value)
        await processes.decode(request())

    with_processes(1, scenario)


def test_cancelling_kills_the_process_and_the_next_call_gets_another() -> None:
    async def scenario(processes: DecodeProcesses) -> None:
        before = children()
        await processes.decode(request())
        (pid,) = children() - before
        os.kill(pid, signal.SIGSTOP)  # a decoder that takes for ever
        times: list[tuple[float, bool]] = []
        call = asyncio.create_task(processes.decode(request(), lambda *took: times.append(took)))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(times) == 1
        assert not times[0][1]
        await processes.decode(request())
        while pid in children():
            await asyncio.sleep(0.01)

    with_processes(1, scenario)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGSEGV, UnreadableImage),  # of a decoder
        (signal.SIGXCPU, UnreadableImage),  # of the limit
        (signal.SIGKILL, Refused),  # of a system that lacks memory
    ],
)
def test_the_end_of_a_process_is_the_end_of_one_request(
    number: signal.Signals, error: type[RequestError]
) -> None:
    async def scenario(processes: DecodeProcesses) -> None:
        before = children()
        await processes.decode(request())
        (pid,) = children() - before
        os.kill(pid, signal.SIGSTOP)
        call = asyncio.create_task(processes.decode(request()))
        await asyncio.sleep(0.05)
        os.kill(pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        with pytest.raises(error):
            await call
        await processes.decode(request())

    with_processes(1, scenario)


def test_a_process_that_ended_while_it_was_idle_costs_no_request() -> None:
    async def scenario(processes: DecodeProcesses) -> None:
        before = children()
        await processes.decode(request())
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        while pid in children():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # its end is reported to the loop
        await processes.decode(request())

    with_processes(1, scenario)


def test_processes_that_are_not_needed_end_except_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_processes, "IDLE_S", 0.1)

    async def scenario(processes: DecodeProcesses) -> None:
        before = children()
        await asyncio.gather(processes.decode(request()), processes.decode(request()))
        assert len(children() - before) == 2
        while len(children() - before) > 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert len(children() - before) == 1
        await processes.decode(request())

    with_processes(2, scenario)


def test_signals_of_a_terminal_are_for_the_parent() -> None:
    async def scenario(processes: DecodeProcesses) -> None:
        before = children()
        await processes.decode(request())
        (pid,) = children() - before
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        await processes.decode(request())
        assert children() - before == {pid}
        await processes.stop()
        assert children() == before

    with_processes(1, scenario)


def test_the_current_folder_adds_no_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a file that is named as a module would run, or break the decoder."""
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])

    async def scenario(processes: DecodeProcesses) -> None:
        await processes.decode(request())

    with_processes(1, scenario)


def test_a_process_is_no_member_of_the_servers_group() -> None:
    """A terminal sends Ctrl-C to a group, when a process is about to start, too."""

    async def scenario(processes: DecodeProcesses) -> None:
        before = children()
        await processes.decode(request())
        (pid,) = children() - before
        assert os.getpgid(pid) == pid != os.getpgrp()

    with_processes(1, scenario)


# the program, in this process


def test_a_request_survives_its_way(tmp_path: Path) -> None:
    sent = Request(Preprocess(4, 5, (0.1, 0.2, 0.3), (1.0,) * 3, squash=False), b"xyz", 7, 8, 9.5)
    file = tmp_path / "pipe"
    file.write_bytes(b"".join(sent.to_bytes()))
    with file.open("rb") as pipe:
        read = Request.read(pipe)
        assert Request.read(pipe) is None
    assert read is not None
    assert read[1:] == sent[1:]
    assert read.preprocess.to_config() == sent.preprocess.to_config()


def test_lack_of_memory_is_not_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders report a failed allocation as a damaged file."""
    assert decode_worker.answer(request(DAMAGED))[0] == decode_worker.FIRST_ERROR
    much = Request(PREPROCESS, DAMAGED, 1_000_000, 1 << 60, 20.0)
    assert decode_worker.answer(much)[0] == decode_worker.NO_MEMORY

    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Preprocess, "__call__", no_memory)
    assert decode_worker.answer(request())[0] == decode_worker.NO_MEMORY


def test_a_file_that_takes_too_long_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts CPU time, so this also holds if the parent is gone."""
    pid = os.fork()
    if pid == 0:  # must not return into pytest

        def spin(*_: Any) -> None:
            end_s = time.process_time() + 60
            while time.process_time() < end_s:
                pass

        monkeypatch.setattr(Preprocess, "__call__", spin)
        decode_worker.answer(request(cpu_s=0.01))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGXCPU
