"""TensorRT: one plan per tier, built on this GPU by `pcae-export tensorrt`, run as CUDA graphs.

    find the GPU → load the library → read the plans → capture every (tier, bucket) → run

A batch is padded to the next bucket (a fixed batch size); the padding's outputs are ignored.
"""

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import plan_cache
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.engines.cuda_runtime import Buffer, Cuda, CudaError, Gpu, find_gpu
from pcae_serve.engines.plan_cache import GpuTarget
from pcae_serve.errors import StartError, one_line
from pcae_serve.settings import CACHE_DIR, MAX_BATCH
from pcae_serve.version import install_command

log = logging.getLogger(__name__)

#: Packages with TensorRT's interface; the first one installed is used. The wheels of tensorrt_rtx
#: contain only tensorrt_rtx_bindings.
PACKAGES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
OLDEST = (10, 16)  # oldest supported tensorrt; written for this version and 11


@dataclass(frozen=True)
class Library:
    """TensorRT's Python module and its logger."""

    name: str  # tensorrt, or tensorrt_rtx
    version: str
    trt: Any
    messages: Any  # an ILogger with `errors` and `layers`; must outlive the objects that use it

    @property
    def ahead_of_time(self) -> bool:
        """Return whether it can build plans without a GPU and driver."""
        return self.name == "tensorrt_rtx"

    def target(self, gpu: Gpu) -> GpuTarget:
        """Return the target that plans built on a GPU are valid for."""
        return GpuTarget(
            library=self.name,
            version=self.version,
            gpu=gpu.name,
            compute_capability=gpu.compute_capability,
        )

    def last_error(self) -> str:
        """Return the last logged error in one line, as calls return only that they failed."""
        errors: list[str] = self.messages.errors
        return errors[-1].strip().splitlines()[0] if errors else "TensorRT gives no reason"


def load_library() -> Library:
    """Import TensorRT, or else TensorRT-RTX. Raises StartError if neither loads."""
    for package in PACKAGES:
        try:
            trt = import_module(package)
        except ModuleNotFoundError as error:
            if error.name == package:
                continue
            raise StartError(f"{package} does not load: {one_line(error)}") from None
        except (ImportError, OSError) as error:
            raise StartError(f"{package} does not load: {one_line(error)}") from None
        version: str = trt.__version__
        if package == "tensorrt" and tuple(map(int, version.split(".")[:2])) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise StartError(f"TensorRT {version} is too old: {oldest} or newer is required")
        return Library(package.removesuffix("_bindings"), version, trt, _messages(trt))
    raise StartError(f"TensorRT is not installed: {install_command('tensorrt')}")


class TensorRtEngine:
    """The plans of a bundle's tiers on one GPU."""

    name = "tensorrt"
    threads = 0
    sizes: Sequence[int] = (1,)  # the runner ran each bucket when it captured it

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cuda:0",
        cache_dir: Path = CACHE_DIR,
        max_batch: int = MAX_BATCH,
    ) -> None:
        """Capture every tier at every bucket up to max_batch.

        Raises StartError if library, driver, GPU or a plan is missing, or a plan does not fit.
        """
        gpu = find_gpu(device)  # before TensorRT
        library = load_library()
        target, data = library.target(gpu), {}
        for tier in bundle.tiers:
            plan = plan_cache.find_plan(cache_dir, bundle, tier, target, max_batch)
            data[tier.name] = plan_cache.read_plan(cache_dir, plan)
        self._bundle = bundle
        self._runner = Runner(library, gpu, data, plan_cache.batch_buckets(max_batch))
        self.version = f"{library.name} {library.version}"
        self.device = f"{device} ({gpu.name})"

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        answers = self._runner.run(tier.name, pixels)
        padding = self._runner.bucket(len(pixels)) - len(pixels)
        return to_output(self._bundle, tier, answers)._replace(padding=padding)

    def terminate(self) -> None:
        """Do nothing: a graph that was launched on the GPU cannot be stopped."""

    def close(self) -> None:
        """Free the GPU's memory. The engine cannot run afterwards."""
        self._runner.close()


def to_output(bundle: Bundle, tier: Tier, answers: Mapping[str, NDArray[Any]]) -> Output:
    """Convert a plan's outputs by name to an engine's Output."""
    stages = range(len(tier.token_counts))
    return Output(answers[bundle.output], tuple(answers[f"kept_{stage}"] for stage in stages))


@dataclass
class _Resident:
    """One plan's buffers, and a captured graph per bucket."""

    pixels: Buffer
    outputs: dict[str, Buffer]
    graphs: dict[int, Any] = field(default_factory=dict)


class Runner:
    """Runs plans by name on one GPU, with one stream and one call at a time.

    Each bucket has its own execution context, because a captured graph refers to the state of the
    context it was captured from. All contexts share one scratch memory, as they never overlap.
    """

    def __init__(
        self, library: Library, gpu: Gpu, data: Mapping[str, bytes], buckets: Sequence[int]
    ) -> None:
        """Load and capture plans. data: plans by name. buckets: batch sizes, ascending.

        Raises StartError if a plan does not load or run.
        """
        self._library, self._buckets, self._lock = library, tuple(buckets), threading.Lock()
        self._residents: dict[str, _Resident] = {}
        with ExitStack() as stack:  # frees everything allocated so far if a step fails
            try:
                self._cuda = Cuda(gpu.number)
                self._cuda.use()
                self._stream = self._cuda.call(
                    "cudaStreamCreateWithFlags", self._cuda.runtime.cudaStreamNonBlocking
                )
                stack.callback(self._cuda.call, "cudaStreamDestroy", self._stream)
                self._load(data, stack)
            except CudaError as error:
                raise StartError(f"TensorRT cannot start on {gpu.name}: {error}") from None
            self._closing = weakref.finalize(self, _close, self._cuda, stack.pop_all())

    def run(self, name: str, pixels: Pixels) -> dict[str, NDArray[Any]]:
        """Run a plan on pixels uint8 [N, H, W, 3]; return its outputs [N, …] by name.

        Raises ValueError if the pixels do not fit, and CudaError if the GPU fails.
        """
        resident, count = self._residents[name], len(pixels)
        bucket, image = self.bucket(count), resident.pixels.host.shape[1:]
        if pixels.dtype != np.uint8 or pixels.shape[1:] != image:
            raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 [N, *{image}]")
        with self._lock:
            if not self._closing.alive:
                raise CudaError("the engine is closed")
            self._cuda.use()
            resident.pixels.host[:count] = pixels  # the other rows' outputs are not read
            self._cuda.call("cudaGraphLaunch", resident.graphs[bucket], self._stream)
            self._cuda.call("cudaStreamSynchronize", self._stream)
            return {name: buffer.host[:count].copy() for name, buffer in resident.outputs.items()}

    def bucket(self, count: int) -> int:
        """Return the bucket for `count` images. Raises ValueError beyond the largest."""
        if not 1 <= count <= self._buckets[-1]:
            raise ValueError(f"a batch has 1 to {self._buckets[-1]} images, not {count}")
        return next(size for size in self._buckets if size >= count)

    def close(self) -> None:
        """Free everything in reverse order: once, and at interpreter exit at the latest."""
        with self._lock:
            self._closing()

    def _load(self, data: Mapping[str, bytes], stack: ExitStack) -> None:
        runtime = self._library.trt.Runtime(self._library.messages)
        engines = {name: self._deserialise(runtime, name, plan) for name, plan in data.items()}
        nbytes = max(engine.device_memory_size_v2 for engine in engines.values())
        scratch = self._cuda.call("cudaMalloc", max(nbytes, 1))
        stack.callback(self._cuda.call, "cudaFree", scratch)
        held: list[Any] = [runtime, *engines.values()]  # and their contexts, once created
        stack.callback(_release, held)
        for name, engine in engines.items():
            resident = self._buffers(name, engine, stack)
            for bucket in self._buckets:
                context = engine.create_execution_context(
                    self._library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
                )
                if context is None:
                    raise self._unusable(
                        name, f"no execution context: {self._library.last_error()}"
                    )
                held.append(context)
                context.set_device_memory(scratch, nbytes)
                resident.graphs[bucket] = self._capture(name, context, resident, bucket, stack)
            self._residents[name] = resident

    def _deserialise(self, runtime: Any, name: str, plan: bytes) -> Any:
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._unusable(name, self._library.last_error())
        return engine

    def _buffers(self, name: str, engine: Any, stack: ExitStack) -> _Resident:
        trt, buffers = self._library.trt, {}
        for tensor in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            shape = tuple(engine.get_tensor_shape(tensor))[1:]
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(tensor)))
            wanted: type[np.generic] = np.int32 if tensor.startswith("kept_") else np.float32
            if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
                wanted = np.uint8
                _, _, largest = engine.get_tensor_profile_shape(tensor, 0)
                if largest[0] < self._buckets[-1]:
                    raise self._unusable(name, f"it takes at most {largest[0]} images")
            if dtype != wanted or -1 in shape:
                raise self._unusable(name, f"{tensor} is {dtype} {shape}, not {np.dtype(wanted)}")
            buffers[tensor] = Buffer(self._cuda, (self._buckets[-1], *shape), dtype)
            stack.callback(buffers[tensor].free)
        if "pixels" not in buffers:
            raise self._unusable(name, "it has no input 'pixels'")
        return _Resident(buffers.pop("pixels"), buffers)

    def _capture(
        self, name: str, context: Any, resident: _Resident, bucket: int, stack: ExitStack
    ) -> Any:
        """Capture one batch as a CUDA graph: pixels to the GPU, the plan, outputs to the host."""
        call, stream = self._cuda.call, self._stream

        def execute() -> None:
            if not context.execute_async_v3(int(stream)):
                raise self._unusable(
                    name, f"batch {bucket} does not run: {self._library.last_error()}"
                )

        tensors = {"pixels": resident.pixels} | resident.outputs
        shape = (bucket, *resident.pixels.host.shape[1:])
        if not context.set_input_shape("pixels", shape) or not all(
            context.set_tensor_address(tensor, buffer.device) for tensor, buffer in tensors.items()
        ):
            raise self._unusable(
                name, f"batch {bucket} is not accepted: {self._library.last_error()}"
            )
        resident.pixels.send(bucket, stream)
        execute()  # runs the set-up of a new shape, which must not be captured
        call("cudaStreamSynchronize", stream)
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", stream, mode)
        try:
            resident.pixels.send(bucket, stream)
            execute()
            for buffer in resident.outputs.values():
                buffer.fetch(bucket, stream)
        except BaseException:
            self._cuda.runtime.cudaStreamEndCapture(stream)  # its code only repeats the failure
            raise
        graph = call("cudaStreamEndCapture", stream)
        try:
            executable = call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)
        stack.callback(call, "cudaGraphExecDestroy", executable)
        return executable

    def _unusable(self, name: str, reason: str) -> StartError:
        return StartError(
            f"cannot use the TensorRT plan of tier {name!r}: {reason};"
            f" run '{plan_cache.BUILD_COMMAND}' again"
        )


def _close(calls: Cuda, stack: ExitStack) -> None:
    calls.use()
    stack.close()


def _release(held: list[Any]) -> None:
    """Drop references to contexts, then engines, then the runtime; TensorRT frees each."""
    while held:
        held.pop()


def _messages(trt: Any) -> Any:
    """Return an ILogger that keeps errors and layer names, and logs the rest at level debug."""
    severity = trt.ILogger.Severity

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers: list[str] = []  # names of a plan's layers, logged while it is built

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(message)
            if level != severity.VERBOSE:
                log.debug("%s", message)
                return
            for line in message.splitlines():
                if line.startswith("Name: "):
                    self.layers.append(line.removeprefix("Name: ").partition(",")[0])

    return Messages()
