# ruff: noqa: N802 - the names are TensorRT's own
"""TensorRT without a GPU: plans run with ONNX Runtime on the CPU. A plan is JSON naming its graph.

Where TensorRT returns False or None, this stand-in does too, and logs the reason; replaying a CUDA
graph after its context changed, which is undefined, raises Misuse.
"""

import hashlib
import json
import shutil
import sys
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
from tests.support.cuda_standin import Misuse, Runtime

GPU = "NVIDIA Stand-in"
VERSION = "11.4.0"
SCRATCH = 4096


class DType(Enum):
    UINT8, INT32, FLOAT, INT64 = "uint8", "int32", "float", "int64"


NUMPY: dict[DType, type[np.generic]] = {
    DType.UINT8: np.uint8,
    DType.INT32: np.int32,
    DType.FLOAT: np.float32,
    DType.INT64: np.int64,
}


class IOMode(Enum):
    INPUT, OUTPUT = "input", "output"


class Strategy(Enum):
    STATIC, USER_MANAGED = "static", "user managed"


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Logger:
    Severity = Severity

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class Tensor:
    """An input or output of a session or of a network."""

    def __init__(self, found: Any) -> None:
        self.name: str = found.name
        self.dtype = DType(found.type.removeprefix("tensor(").removesuffix(")"))
        self.shape = tuple(size if isinstance(size, int) else -1 for size in found.shape)


@cache  # the same graphs are opened by many tests
def open_session(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Engine:
    """A deserialised plan."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, cuda: Runtime, logger: Logger, plan: dict[str, Any]) -> None:
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

    def get_tensor_dtype(self, name: str) -> DType:
        return self.tensors[name].dtype

    def get_tensor_mode(self, name: str) -> IOMode:
        return IOMode.INPUT if self.tensors[name] in self.inputs else IOMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.plan["profile"]]

    def create_execution_context(self, strategy: Strategy) -> "Context":
        return Context(self, strategy)


class Context:
    """Returns False and logs the reason in the cases in which TensorRT does."""

    def __init__(self, engine: Engine, strategy: Strategy) -> None:
        self.engine = engine
        self.scratch: int | None = None if strategy is Strategy.USER_MANAGED else 0
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        # number of changes, and that number at the last run that was not captured
        self.changes, self.settled = 0, -1

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
            return self._refuse("the first run with a new shape must not be captured")
        expected = self.changes

        def work() -> None:
            if self.changes != expected:
                raise Misuse("a graph is replayed after its context changed")
            feeds = {tensor.name: self._array(tensor) for tensor in self.engine.inputs}
            answers = self.engine.session.run(None, feeds)
            for tensor, answer in zip(self.engine.outputs, answers, strict=True):
                self._array(tensor)[:] = answer
                if self.engine.plan["wrong"] and tensor.dtype is DType.FLOAT:
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
    def __init__(self, trt: "TensorRt", logger: Logger) -> None:
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
    def __init__(self, network: Any, logger: Logger) -> None:
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
    """The module `tensorrt`. wrong: plans reverse their outputs. cannot_build: builds fail."""

    __version__ = VERSION
    DataType, TensorIOMode, ILogger = DType, IOMode, Logger
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

    def nptype(self, dtype: DType) -> type[np.generic]:
        return NUMPY[dtype]

    def Builder(self, logger: Logger) -> Builder:
        return Builder(self, logger)

    def Runtime(self, logger: Logger) -> Any:
        def deserialize(plan: bytes) -> Engine | None:
            if not plan.startswith(b"plan"):
                logger.log(Severity.ERROR, "magic tag does not match")
                return None
            return Engine(self.cuda, logger, json.loads(plan.removeprefix(b"plan")))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


def install(patch: pytest.MonkeyPatch) -> TensorRt:
    """Put the stand-ins in place of the modules that the engine imports."""
    trt = TensorRt(Runtime())
    patch.setitem(sys.modules, "tensorrt", trt)
    patch.setitem(sys.modules, "cuda.bindings.runtime", trt.cuda)
    patch.setattr(nvidia, "list_gpus", lambda: [GPU, GPU])
    return trt


def demo_with_graphs(root: Path, *, float32: bool, tiers: int = 5) -> Bundle:
    """Return a copy of the demo bundle with its first `tiers` tiers, each with a TensorRT graph.

    float32: use the static float32 graph, even if the demo has one in half precision.
    """
    shutil.copytree(demo_path(), root)
    document = json.loads((root / "bundle.json").read_text())
    document["tiers"] = document["tiers"][:tiers]
    document.pop("calibration", None)  # it is of all tiers
    manifest = Manifest.model_validate(document)
    for tier in manifest.tiers:
        name = f"models/{tier.model}/{tier.tensorrt_graph}"
        if float32 or name not in manifest.files:
            shutil.copy(root / "models" / tier.model / tier.graph, root / name)
            document["files"][name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    (root / "bundle.json").write_text(json.dumps(document))
    return load_bundle(root)
