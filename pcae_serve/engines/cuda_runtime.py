"""Access one GPU through cuda.bindings, with every return code checked.

cuda.bindings is imported on first use, as only the `tensorrt` extra installs it.
"""

import ctypes
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pcae_serve.engines import nvidia
from pcae_serve.errors import StartError
from pcae_serve.version import install_command


class CudaError(RuntimeError):
    """A CUDA call failed. Later calls on this GPU may fail too."""


class Gpu(NamedTuple):
    """The properties of a GPU that plans depend on."""

    number: int  # N of cuda:N
    name: str  # as NVIDIA gives it: "NVIDIA H100 80GB HBM3"
    compute_capability: str  # "9.0"
    driver: str  # newest CUDA version that its driver supports: "13.1"


def find_gpu(device: str) -> Gpu:
    """Return the GPU of a device name such as "cuda:0".

    Call it before TensorRT, which crashes the process without a driver. Raises StartError with the
    first thing that is missing: driver, GPU or bindings.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        raise StartError(f"TensorRT needs an NVIDIA GPU such as cuda:0, not {device!r}")
    names, n = nvidia.list_gpus(), int(number)
    if n >= len(names):
        raise StartError(f"there is no {device}: the GPUs from cuda:0 are {', '.join(names)}")
    cuda = Cuda(n)
    attribute = cuda.runtime.cudaDeviceAttr
    try:
        major, minor = (
            cuda.call("cudaDeviceGetAttribute", each, n)
            for each in (
                attribute.cudaDevAttrComputeCapabilityMajor,
                attribute.cudaDevAttrComputeCapabilityMinor,
            )
        )
        version = cuda.call("cudaDriverGetVersion")  # 13010
    except CudaError as error:
        raise StartError(f"{device} ({names[n]}) does not respond: {error}") from None
    runs = f"{version // 1000}.{version % 1000 // 10}"
    return Gpu(n, names[n], f"{major}.{minor}", runs)


class Cuda:
    """The CUDA runtime on one GPU."""

    def __init__(self, number: int) -> None:
        """Raise StartError if cuda.bindings is not installed."""
        try:
            self.runtime = import_module("cuda.bindings.runtime")
        except ImportError:
            raise StartError(
                f"cuda-bindings is not installed: {install_command('tensorrt')}"
            ) from None
        self._number = number

    def use(self) -> None:
        """Select the GPU for the calling thread; each thread starts with GPU 0."""
        self.call("cudaSetDevice", self._number)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the runtime and return its value. Raises CudaError if it fails."""
        code, *values = getattr(self.runtime, function)(*arguments)
        if code != self.runtime.cudaError_t.cudaSuccess:
            _, text = self.runtime.cudaGetErrorString(code)
            raise CudaError(f"{function}: {text.decode()} ({code.name})")
        return values[0] if values else None


class Buffer:
    """A tensor in the GPU's memory and a copy in pinned host memory, which `host` views."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._cuda = cuda
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.device: int = cuda.call("cudaMalloc", nbytes)
        try:
            self._pinned: int = cuda.call(
                "cudaHostAlloc", nbytes, cuda.runtime.cudaHostAllocDefault
            )
        except CudaError:
            cuda.call("cudaFree", self.device)
            raise
        memory = (ctypes.c_byte * nbytes).from_address(self._pinned)
        self.host: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def send(self, rows: int, stream: Any) -> None:
        """Queue a copy of the first rows to the GPU."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        nbytes = self.host[:rows].nbytes
        self._cuda.call("cudaMemcpyAsync", self.device, self._pinned, nbytes, kind, stream)

    def fetch(self, rows: int, stream: Any) -> None:
        """Queue a copy of the first rows to the host."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        nbytes = self.host[:rows].nbytes
        self._cuda.call("cudaMemcpyAsync", self._pinned, self.device, nbytes, kind, stream)

    def free(self) -> None:
        """Free both. `host` must not be accessed afterwards."""
        self._cuda.call("cudaFreeHost", self._pinned)
        self._cuda.call("cudaFree", self.device)
