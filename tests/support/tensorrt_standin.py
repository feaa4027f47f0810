# ruff: noqa: N801, N802, N815 - the names are CUDA's and TensorRT's own
"""TensorRT and the CUDA runtime without a GPU: they compute with ONNX Runtime on the CPU.

What the real ones answer with False or an error code, these do too; what is undefined behaviour
there (a freed address, a copy beyond an allocation, two threads on one stream, a graph replayed
after its context changed) raises Misuse here. Work is queued and done at the next synchronisation.
A plan is a line of JSON that names its graph.
"""

import hashlib
import itertools
import json
import shutil
import sys
import threading
from collections.abc import Callable
from enum import Enum, IntEnum
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from pcae_serve.bundle.manifest import Manifest
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines import nvidia

GPU = "NVIDIA Stand-in"
VERSION = "11.4.0"
SCRATCH = 4096


class Misuse(AssertionError):
    """What a GPU would answer with a crash or with wrong numbers."""


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidResourceHandle = 400
    cudaErrorStreamCaptureUnsupported = 900


OK = cudaError_t.cudaSuccess
Kind = Enum("cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"])
Mode = Enum("cudaStreamCaptureMode", ["cudaStreamCaptureModeThreadLocal"])
Attribute = Enum(
    "cudaDeviceAttr",
    ["cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"],
)


class Stream:
    """Work that waits for a synchronisation, or is being captured."""

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
    """cuda.bindings.runtime, for two GPUs. `fails`: names of functions that answer with a code."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, Kind, Mode
    cudaDeviceAttr = Attribute
    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0

    def __init__(self) -> None:
        self.device: dict[int, np.ndarray[Any, Any]] = {}
        self.pinned: dict[int, np.ndarray[Any, Any]] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: set[int] = set()
        self.fails: dict[str, cudaError_t] = {}
        self.launches = 0
        self._addresses, self._handles = itertools.count(1 << 40, 1 << 24), itertools.count(1)
        self._thread = threading.local()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and name in object.__getattribute__(self, "fails"):
            return lambda *_: (self.fails[name], None)
        return object.__getattribute__(self, name)

    def left(self) -> int:
        """What has not been given back."""
        return sum(map(len, (self.device, self.pinned, self.streams, self.graphs)))

    def resolve(self, where: dict[int, Any], address: int, nbytes: int) -> np.ndarray[Any, Any]:
        """The bytes there. Raises Misuse where they are not all part of one live allocation."""
        for base, memory in where.items():
            if base <= address and address + nbytes <= base + len(memory):
                found: np.ndarray[Any, Any] = memory[address - base :][:nbytes]
                return found
        raise Misuse(f"{nbytes} bytes at {address:#x} are freed, or beyond what was allocated")

    def cudaGetErrorString(self, code: cudaError_t) -> tuple[cudaError_t, bytes]:
        return OK, {2: "out of memory"}.get(int(code), "an error").encode()

    def cudaDriverGetVersion(self) -> tuple[cudaError_t, int]:
        return OK, 13010

    def cudaDeviceGetAttribute(self, which: Attribute, device: int) -> tuple[cudaError_t, int]:
        return OK, {1: 9, 2: 0}[which.value]

    def cudaSetDevice(self, device: int) -> tuple[cudaError_t]:
        self._thread.device = device
        return (OK,)

    def cudaMalloc(self, nbytes: int) -> tuple[cudaError_t, int]:
        address = next(self._addresses)
        self.device[address] = np.full(nbytes, 0xAB, np.uint8)  # not cleared
        return OK, address

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[cudaError_t, int]:
        memory = np.full(nbytes, 0xCD, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return OK, memory.ctypes.data

    def cudaFree(self, address: int) -> tuple[cudaError_t]:
        return (OK if self.device.pop(address, None) is not None else cudaError_t(1),)

    def cudaFreeHost(self, address: int) -> tuple[cudaError_t]:
        return (OK if self.pinned.pop(address, None) is not None else cudaError_t(1),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[cudaError_t, Stream]:
        stream = Stream(next(self._handles), getattr(self._thread, "device", 0))
        self.streams[stream.handle] = stream
        return OK, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[cudaError_t]:
        del self.streams[stream.handle]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[cudaError_t]:
        if stream.capture is not None:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        if not self._mine(stream):
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        for work in stream.queue:
            work()
        stream.queue.clear()
        return (OK,)

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: Kind, stream: Stream
    ) -> tuple[cudaError_t]:
        if not self._mine(stream):
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        there, here = self.device, self.pinned
        if kind is Kind.cudaMemcpyDeviceToHost:
            there, here = here, there

        def copy() -> None:
            self.resolve(there, target, nbytes)[:] = self.resolve(here, source, nbytes)

        self.resolve(there, target, nbytes), self.resolve(here, source, nbytes)
        stream.enqueue(copy)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: Mode) -> tuple[cudaError_t]:
        if stream.queue:
            raise Misuse("a capture begins while work is queued")
        stream.capture = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[cudaError_t, Any]:
        captured, stream.capture = stream.capture, None
        return OK, self._graph(captured)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[cudaError_t, Any]:
        return OK, self._graph(graph.work)

    def cudaGraphDestroy(self, graph: Any) -> tuple[cudaError_t]:
        self.graphs.remove(graph.handle)
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: Any, stream: Stream) -> tuple[cudaError_t]:
        if graph.handle not in self.graphs:
            raise Misuse("a graph is launched that was destroyed")
        if not self._mine(stream):
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        self.launches += 1
        for work in graph.work:
            stream.enqueue(work)
        return (OK,)

    def _graph(self, work: Any) -> Any:
        graph = SimpleNamespace(handle=next(self._handles), work=work)
        self.graphs.add(graph.handle)
        return graph

    def _mine(self, stream: Stream) -> bool:
        """Whether the stream is of the GPU that this thread made its own."""
        return stream.device == getattr(self._thread, "device", 0)


class DataType(Enum):
    UINT8, INT32, FLOAT, INT64 = "uint8", "int32", "float", "int64"


NUMPY = {
    DataType.UINT8: np.uint8,
    DataType.INT32: np.int32,
    DataType.FLOAT: np.float32,
    DataType.INT64: np.int64,
}
IOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
Strategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class Tensor:
    """A graph's input or output, of `session` or of a network."""

    def __init__(self, found: Any) -> None:
        self.name: str = found.name
        self.dtype = DataType(found.type.removeprefix("tensor(").removesuffix(")"))
        self.shape = tuple(size if isinstance(size, int) else -1 for size in found.shape)


@cache  # they are opened again and again
def open_session(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Engine:
    """A plan deserialised."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, cuda: Runtime, logger: ILogger, plan: dict[str, Any]) -> None:
        self.cuda, self.logger, self.plan = cuda, logger, plan
        self.session = open_session(plan["graph"])
        self.inputs = [Tensor(found) for found in self.session.get_inputs()]
        self.outputs = [Tensor(found) for found in self.session.get_outputs()]
        self.tensors = {tensor.name: tensor for tensor in [*self.inputs, *self.outputs]}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].dtype

    def get_tensor_mode(self, name: str) -> IOMode:
        return IOMode.INPUT if self.tensors[name] in self.inputs else IOMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.plan["profile"]]

    def create_execution_context(self, strategy: Strategy) -> "Context":
        return Context(self, strategy)


class Context:
    """Refuses as TensorRT does: returns False and logs why."""

    def __init__(self, engine: Engine, strategy: Strategy) -> None:
        self.engine = engine
        self.scratch: int | None = None if strategy is Strategy.USER_MANAGED else 0
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.changes, self.settled = 0, -1  # counted; at which count it last ran uncaptured

    def set_device_memory(self, address: int, nbytes: int) -> None:
        if nbytes < SCRATCH:
            raise Misuse("less scratch memory than the engine needs")
        self.engine.cuda.resolve(self.engine.cuda.device, address, nbytes)
        self.scratch, self.changes = address, self.changes + 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, largest = self.engine.get_tensor_profile_shape(name, 0)
        if not all(a <= b <= c for a, b, c in zip(least, shape, largest, strict=True)):
            return self._refuse(f"shape {shape} is outside the profile")
        self.shape, self.changes = shape, self.changes + 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.tensors:
            return self._refuse(f"there is no tensor {name}")
        self.addresses[name], self.changes = address, self.changes + 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = self.engine.cuda.streams[stream_handle]
        if self.scratch is None or self.shape is None:
            return self._refuse("device memory or the input's shape is not set")
        for name in self.engine.tensors:
            if name not in self.addresses:
                return self._refuse(f"the address of {name} is not set")
            self._bytes(name)
        if stream.capture is not None and self.settled != self.changes:
            return self._refuse("a new shape is settled by a run that is not captured")
        expected = self.changes

        def work() -> None:
            if self.changes != expected:
                raise Misuse("a graph is replayed, but its context has another shape by now")
            feeds = {tensor.name: self._array(tensor) for tensor in self.engine.inputs}
            answers = self.engine.session.run(None, feeds)
            for tensor, answer in zip(self.engine.outputs, answers, strict=True):
                self._array(tensor)[:] = answer
                if self.engine.plan["wrong"] and tensor.dtype is DataType.FLOAT:
                    self._array(tensor)[:] = answer[:, ::-1]

        if stream.capture is None:
            self.settled = self.changes
        stream.enqueue(work)
        return True

    def _array(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        assert self.shape is not None
        shape = (self.shape[0], *tensor.shape[1:])
        return self._bytes(tensor.name).view(NUMPY[tensor.dtype]).reshape(shape)

    def _bytes(self, name: str) -> np.ndarray[Any, Any]:
        assert self.shape is not None
        tensor, cuda = self.engine.tensors[name], self.engine.cuda
        count = self.shape[0] * int(np.prod(tensor.shape[1:]))
        nbytes = count * np.dtype(NUMPY[tensor.dtype]).itemsize
        return cuda.resolve(cuda.device, self.addresses[name], nbytes)

    def _refuse(self, reason: str) -> bool:
        self.engine.logger.log(Severity.ERROR, reason)
        return False


class Builder:
    def __init__(self, trt: "TensorRt", logger: ILogger) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int) -> Any:
        assert flags & 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return SimpleNamespace(graph=None)

    def create_optimization_profile(self) -> Any:
        profile = SimpleNamespace(shapes={})
        profile.set_shape = lambda name, *shapes: profile.shapes.update({name: shapes})
        return profile

    def create_builder_config(self) -> Any:
        config = SimpleNamespace(profiles=[], pools={}, timings=None)
        config.add_optimization_profile = config.profiles.append
        config.set_memory_pool_limit = lambda pool, nbytes: config.pools.update({pool: nbytes})
        config.create_timing_cache = lambda data: SimpleNamespace(data=data)
        config.get_timing_cache = lambda: SimpleNamespace(
            serialize=lambda: b"timings:" + config.timings.data
        )

        def set_timing_cache(cache: Any, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache.data and not cache.data.startswith(b"timings:"):
                return False
            config.timings = cache
            return True

        config.set_timing_cache = set_timing_cache
        return config

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        self.trt.configs.append(config)
        if self.trt.cannot_build:
            self.logger.log(Severity.ERROR, "no kernel for node TopK_3\nmore of it")
            return None
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Timing", "Building engine", 1)
        assert all(monitor.step_complete("Building engine", step) for step in range(2))
        monitor.phase_finish("Building engine")
        self.logger.log(Severity.VERBOSE, "Name: _gemm_mha_v2_myl0_7, LayerType: kgen")
        plan = {
            "graph": network.graph,
            "profile": config.profiles[0].shapes["pixels"],
            "wrong": self.trt.wrong,
        }
        return b"plan" + json.dumps(plan).encode()


class OnnxParser:
    def __init__(self, network: Any, logger: ILogger) -> None:
        self.network, self.errors = network, list[str]()

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: self.errors[index])

    def parse_from_file(self, path: str) -> bool:
        try:
            session = open_session(path)
        except Exception as error:
            self.errors.append(str(error))
            return False
        inputs = [Tensor(found) for found in session.get_inputs()]
        outputs = [Tensor(found) for found in session.get_outputs()]
        self.network.graph = path
        self.network.get_input, self.network.num_inputs = inputs.__getitem__, len(inputs)
        self.network.get_output, self.network.num_outputs = outputs.__getitem__, len(outputs)
        return True


class TensorRt:
    """The module `tensorrt`. wrong: plans answer back to front. cannot_build: builds fail."""

    __version__ = VERSION
    DataType, TensorIOMode, ILogger = DataType, IOMode, ILogger
    IProgressMonitor, OnnxParser = IProgressMonitor, OnnxParser
    ExecutionContextAllocationStrategy = Strategy
    MemoryPoolType = Enum("MemoryPoolType", ["WORKSPACE"])
    ProfilingVerbosity = Enum("ProfilingVerbosity", ["DETAILED"])
    NetworkDefinitionCreationFlag = IntEnum(
        "NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"], start=0
    )

    def __init__(self, cuda: Runtime) -> None:
        self.cuda, self.wrong, self.cannot_build = cuda, False, False
        self.configs: list[Any] = []  # of the builds so far

    def nptype(self, dtype: DataType) -> type[np.generic]:
        return NUMPY[dtype]

    def Builder(self, logger: ILogger) -> Builder:
        return Builder(self, logger)

    def Runtime(self, logger: ILogger) -> Any:
        def deserialize(plan: bytes) -> Engine | None:
            if not plan.startswith(b"plan"):
                logger.log(Severity.ERROR, "magic tag does not match")
                return None
            return Engine(self.cuda, logger, json.loads(plan.removeprefix(b"plan")))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


def install(patch: pytest.MonkeyPatch) -> TensorRt:
    """Put the stand-ins where the engine imports the real ones from."""
    trt = TensorRt(Runtime())
    patch.setitem(sys.modules, "tensorrt", trt)
    patch.setitem(sys.modules, "cuda.bindings.runtime", trt.cuda)
    patch.setattr(nvidia, "list_gpus", lambda: [GPU, GPU])
    return trt


def demo_with_graphs(root: Path, *, float32: bool, tiers: int = 5) -> Bundle:
    """A copy of the demo bundle, so many of its tiers, each with a graph for TensorRT.

    float32: it is the static float32 graph, also where the demo has one in half precision.
    """
    shutil.copytree(demo_path(), root)
    document = json.loads((root / "bundle.json").read_text())
    document["tiers"] = document["tiers"][:tiers]
    manifest = Manifest.model_validate(document)
    for tier in manifest.tiers:
        name = f"models/{tier.model}/{tier.tensorrt_graph}"
        if float32 or name not in manifest.files:
            shutil.copy(root / "models" / tier.model / tier.graph, root / name)
            document["files"][name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    (root / "bundle.json").write_text(json.dumps(document))
    return load_bundle(root)
