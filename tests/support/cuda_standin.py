# ruff: noqa: N802, N815 - the names are CUDA's own
"""The CUDA runtime without a GPU: memory is numpy arrays, and work runs at synchronisation.

Where the real runtime returns an error code, this one does too; where its behaviour is undefined (a
freed address, a copy beyond an allocation, two threads on one stream), this one raises Misuse.
"""

import itertools
import threading
from collections.abc import Callable
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np


class Misuse(AssertionError):
    """A call whose behaviour is undefined on a GPU."""


class ErrorCode(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidResourceHandle = 400
    cudaErrorStreamCaptureUnsupported = 900


OK = ErrorCode.cudaSuccess


class CopyKind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CaptureMode(Enum):
    cudaStreamCaptureModeThreadLocal = 1


class Attribute(Enum):
    cudaDevAttrComputeCapabilityMajor = 1
    cudaDevAttrComputeCapabilityMinor = 2


class Stream:
    """A queue of work that runs at the next synchronisation, or is being captured."""

    def __init__(self, handle: int, device: int) -> None:
        self.handle, self.device = handle, device
        self.queue: list[Callable[[], None]] = []
        self.capture: list[Callable[[], None]] | None = None
        self.owner: int | None = None

    def __int__(self) -> int:
        return self.handle

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.capture is not None:
            self.capture.append(work)
            return
        me = threading.get_ident()
        if self.queue and self.owner != me:
            raise Misuse("two threads use one stream, and its contexts, at the same time")
        self.owner = me
        self.queue.append(work)


class Runtime:
    """cuda.bindings.runtime for two GPUs. fails: error codes that functions return, by name."""

    cudaError_t, cudaMemcpyKind = ErrorCode, CopyKind
    cudaStreamCaptureMode, cudaDeviceAttr = CaptureMode, Attribute
    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0

    def __init__(self) -> None:
        self.device: dict[int, np.ndarray[Any, Any]] = {}
        self.pinned: dict[int, np.ndarray[Any, Any]] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: set[int] = set()
        self.fails: dict[str, ErrorCode] = {}
        self.launches = 0
        self._addresses, self._handles = itertools.count(1 << 40, 1 << 24), itertools.count(1)
        self._thread = threading.local()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and name in object.__getattribute__(self, "fails"):
            return lambda *_: (self.fails[name], None)
        return object.__getattribute__(self, name)

    def left(self) -> int:
        """Return the number of resources that have not been freed."""
        return len(self.device) + len(self.pinned) + len(self.streams) + len(self.graphs)

    def resolve(self, where: dict[int, Any], address: int, nbytes: int) -> np.ndarray[Any, Any]:
        """Return `nbytes` at an address. Raises Misuse unless one live allocation holds them."""
        for base, memory in where.items():
            if base <= address and address + nbytes <= base + len(memory):
                found: np.ndarray[Any, Any] = memory[address - base :][:nbytes]
                return found
        raise Misuse(f"{nbytes} bytes at {address:#x} are freed, or beyond the allocation")

    def cudaGetErrorString(self, code: ErrorCode) -> tuple[ErrorCode, bytes]:
        return OK, {2: "out of memory"}.get(int(code), "an error").encode()

    def cudaDriverGetVersion(self) -> tuple[ErrorCode, int]:
        return OK, 13010

    def cudaDeviceGetAttribute(self, which: Attribute, device: int) -> tuple[ErrorCode, int]:
        return OK, {1: 9, 2: 0}[which.value]

    def cudaSetDevice(self, device: int) -> tuple[ErrorCode]:
        self._thread.device = device
        return (OK,)

    def cudaMalloc(self, nbytes: int) -> tuple[ErrorCode, int]:
        address = next(self._addresses)
        self.device[address] = np.full(nbytes, 0xAB, np.uint8)  # not cleared
        return OK, address

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[ErrorCode, int]:
        memory = np.full(nbytes, 0xCD, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return OK, memory.ctypes.data

    def cudaFree(self, address: int) -> tuple[ErrorCode]:
        return (OK if self.device.pop(address, None) is not None else ErrorCode(1),)

    def cudaFreeHost(self, address: int) -> tuple[ErrorCode]:
        return (OK if self.pinned.pop(address, None) is not None else ErrorCode(1),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[ErrorCode, Stream]:
        stream = Stream(next(self._handles), getattr(self._thread, "device", 0))
        self.streams[stream.handle] = stream
        return OK, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[ErrorCode]:
        del self.streams[stream.handle]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[ErrorCode]:
        if stream.capture is not None:
            return (ErrorCode.cudaErrorStreamCaptureUnsupported,)
        if not self._mine(stream):
            return (ErrorCode.cudaErrorInvalidResourceHandle,)
        for work in stream.queue:
            work()
        stream.queue.clear()
        return (OK,)

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: CopyKind, stream: Stream
    ) -> tuple[ErrorCode]:
        if not self._mine(stream):
            return (ErrorCode.cudaErrorInvalidResourceHandle,)
        there, here = self.device, self.pinned
        if kind is CopyKind.cudaMemcpyDeviceToHost:
            there, here = here, there

        def copy() -> None:
            self.resolve(there, target, nbytes)[:] = self.resolve(here, source, nbytes)

        self.resolve(there, target, nbytes), self.resolve(here, source, nbytes)
        stream.enqueue(copy)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: CaptureMode) -> tuple[ErrorCode]:
        if stream.queue:
            raise Misuse("a capture begins while work is queued")
        stream.capture = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[ErrorCode, Any]:
        captured, stream.capture = stream.capture, None
        return OK, self._graph(captured)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[ErrorCode, Any]:
        return OK, self._graph(graph.work)

    def cudaGraphDestroy(self, graph: Any) -> tuple[ErrorCode]:
        self.graphs.remove(graph.handle)
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: Any, stream: Stream) -> tuple[ErrorCode]:
        if graph.handle not in self.graphs:
            raise Misuse("a destroyed graph is launched")
        if not self._mine(stream):
            return (ErrorCode.cudaErrorInvalidResourceHandle,)
        self.launches += 1
        for work in graph.work:
            stream.enqueue(work)
        return (OK,)

    def _graph(self, work: Any) -> Any:
        graph = SimpleNamespace(handle=next(self._handles), work=work)
        self.graphs.add(graph.handle)
        return graph

    def _mine(self, stream: Stream) -> bool:
        """Return whether the stream belongs to the GPU that this thread selected."""
        return stream.device == getattr(self._thread, "device", 0)
