"""Processes that decode images: one that is no longer needed, or takes too much, can be killed.

The standard library's process pools cannot end a running call, and send Python objects; a decoder
of hostile files should not be able to send any.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pcae_serve.errors import UnreadableImage
from pcae_serve.runtime import refusals
from pcae_serve.runtime.decode_worker import (
    ERRORS,
    FIRST_ERROR,
    NO_MEMORY,
    PIXELS,
    REPLY,
    Request,
)
from pcae_serve.runtime.refusals import Refused

log = logging.getLogger(__name__)

#: Signals that end a process in a decoder's own fault: the file causes them.
_FAULTS = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
}
#: Run decode_worker with the modules of this process: the current folder must not add any.
_PROGRAM = """\
import sys
sys.path[:] = sys.argv[1:]
from pcae_serve.runtime.decode_worker import main
main()
"""
#: Seconds after which an idle process ends, unless it is the only one.
IDLE_S = 60.0
#: Bytes that are written to a process at a time.
_PIECE_BYTES = 1 << 18
#: Seconds that a process has to end after it has closed its output.
_END_S = 1.0
#: Maximum bytes of an error's text.
_MAX_TEXT_BYTES = 10_000


class DecodeProcesses:
    """Up to `count` processes, started when they are needed. Calls start in their order."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._idle: list[_Worker] = []
        self._started = set[_Worker]()

    @property
    def warm(self) -> bool:
        """Whether a process waits for an image."""
        return bool(self._idle)

    async def decode(
        self, request: Request, on_seconds: Callable[[float, bool], None] = lambda *_: None
    ) -> NDArray[np.uint8]:
        """Decode an image to pixels uint8 [H, W, 3]. To cancel it kills a process.

        on_seconds: called with the time that a process took for it, and whether it finished. Raises
        Refused if memory or a process is missing, and what decoding raises.
        """
        async with self._free:
            worker = self._take_idle() or await self._start()
            start_s, finished = time.monotonic(), False
            try:
                kind, content = await worker.ask(request)
                finished = True
            finally:
                on_seconds(time.monotonic() - start_s, finished)
                if finished:
                    self._rest(worker)
                else:
                    self._remove(worker)
        return _result(kind, content, request.preprocess.image_size)

    async def stop(self) -> None:
        """Kill all processes and wait for their end."""
        workers = list(self._started)
        for worker in self._idle:
            worker.wake()
        for worker in workers:
            worker.kill()
        for worker in workers:
            await worker.ended()
        self._started.clear()
        self._idle.clear()

    def _take_idle(self) -> "_Worker | None":
        """Return an idle process that still runs, if there is one."""
        while self._idle:
            worker = self._idle.pop()
            worker.wake()
            if worker.runs:
                return worker
            self._remove(worker)
        return None

    def _rest(self, worker: "_Worker") -> None:
        """Keep a process for the next image; one that is not needed for some time ends."""
        self._idle.append(worker)
        worker.rest(IDLE_S, self._retire)

    def _retire(self, worker: "_Worker") -> None:
        if len(self._idle) > 1:
            self._idle.remove(worker)
            self._remove(worker)

    def _remove(self, worker: "_Worker") -> None:
        """Kill a process; forget it when it has ended."""
        worker.kill()
        end = asyncio.ensure_future(worker.ended())
        end.add_done_callback(lambda _: self._started.discard(worker))

    async def _start(self) -> "_Worker":
        try:
            worker = await _Worker.start()
        except OSError:  # no memory, or too many processes
            raise Refused(refusals.out_of_memory()) from None
        self._started.add(worker)
        return worker


class _Worker:
    """One decoder process."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._input, self._output = process, process.stdin, process.stdout
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls) -> "_Worker":
        # numpy's threads take address space, and decoding uses none of them
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = (sys.executable, "-P", "-c", _PROGRAM, *sys.path)
        return cls(
            await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE,
                stdout=PIPE,
                env=environment,
                process_group=0,  # signals to this process's group do not end it, as it starts, too
            )
        )

    async def ask(self, request: Request) -> tuple[int, bytes]:
        """Return kind and content of the reply. Raises if the process ends before."""
        try:
            for part in request.to_bytes():
                view = memoryview(part)
                for at in range(0, len(view), _PIECE_BYTES):  # other connections take their turn
                    self._input.write(view[at : at + _PIECE_BYTES])
                    await self._input.drain()
            kind, length = REPLY.unpack(await self._output.readexactly(REPLY.size))
            size = request.preprocess.image_size
            if length > max(3 * size * size, _MAX_TEXT_BYTES):
                raise asyncio.IncompleteReadError(b"", length)
            return kind, await self._output.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            # it is about to end: a signal now would take its exit code from who waits for it
            try:
                await asyncio.wait_for(self.ended(), _END_S)
            except TimeoutError:
                self.kill()
                await self.ended()
            raise self._failure() from None

    def _failure(self) -> Exception:
        """Return the error of a process that ended by itself."""
        code = self._process.returncode or 0
        log.warning("a decoder process ended with %s; the next image gets another", _describe(code))
        if -code == signal.SIGXCPU:
            return UnreadableImage("the image takes too long to decode; save it again")
        if -code in _FAULTS:
            return UnreadableImage("the image cannot be decoded; save it again")
        # most likely the system killed it, or it could not even start for lack of memory
        return Refused(refusals.out_of_memory())

    def rest(self, limit_s: float, on_limit: Callable[["_Worker"], None]) -> None:
        """Call `on_limit` after `limit_s`, unless it is woken up before."""
        self._timer = asyncio.get_running_loop().call_later(limit_s, on_limit, self)

    def wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @property
    def runs(self) -> bool:
        return self._process.returncode is None

    def kill(self) -> None:
        """Kill the process, if it runs."""
        if self.runs:
            self._process.kill()

    async def ended(self) -> None:
        """Wait for the end of the process."""
        await self._process.wait()


def _describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _result(kind: int, content: bytes, size: int) -> NDArray[np.uint8]:
    """Return the pixels of a reply, or raise its error."""
    if kind == PIXELS and len(content) == 3 * size * size:
        return np.frombuffer(content, np.uint8).reshape(size, size, 3)
    if FIRST_ERROR <= kind < FIRST_ERROR + len(ERRORS):
        raise ERRORS[kind - FIRST_ERROR](content.decode("utf-8", "replace"))
    if kind == NO_MEMORY:
        raise MemoryError
    raise UnreadableImage("the image cannot be decoded; save it again")
