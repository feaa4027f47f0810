"""One GPU through cuda.bindings: what it is, its memory, and its calls with every code checked.

It knows addresses and bytes, nothing of TensorRT or of images. cuda.bindings is imported by those
who ask for a GPU: it comes with the extra that needs it.
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
    """A CUDA call failed; later ones on this GPU may fail as well."""


class Gpu(NamedTuple):
    """What plans depend on."""

    number: int  # N of cuda:N
    name: str  # as NVIDIA gives it: "NVIDIA H100 80GB HBM3"
    compute_capability: str  # "9.0"
    driver: str  # the newest CUDA that its driver runs: "13.1"


def find_gpu(device: str) -> Gpu:
    """The GPU that `device` names: "cuda:0".

    TensorRT crashes the process where there is no driver, so this comes before it.
    Raises StartError with the first thing that is missing: GPU, driver or bindings.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        raise StartError(f"TensorRT needs an NVIDIA GPU, and {device!r} names none: use cuda:0")
    names, n = nvidia.list_gpus(), int(number)
    if n >= len(names):
        raise StartError(f"there is no {device}: of {', '.join(names)} the first is cuda:0")
    cuda = Cuda(n)
    attribute = cuda.runtime.cudaDeviceAttr
    try:
        major, minor = (
            cuda.call("cudaDeviceGetAttribute", which, n)
            for which in (
                attribute.cudaDevAttrComputeCapabilityMajor,
                attribute.cudaDevAttrComputeCapabilityMinor,
            )
        )
        version = cuda.call("cudaDriverGetVersion")  # 13010
    except CudaError as error:
        raise StartError(f"{device} ({names[n]}) does not answer: {error}") from None
    runs = f"{version // 1000}.{version % 1000 // 10}"
    return Gpu(n, names[n], f"{major}.{minor}", runs)


class Cuda:
    """The runtime's calls on one GPU."""

    def __init__(self, number: int) -> None:
        """Raises StartError where cuda.bindings is not installed."""
        try:
            self.runtime = import_module("cuda.bindings.runtime")
        except ImportError:
            raise StartError(
                f"cuda-bindings is not installed: {install_command('tensorrt')}"
            ) from None
        self._number = number

    def use(self) -> None:
        """Make the GPU this thread's own: every thread begins with the first one."""
        self.call("cudaSetDevice", self._number)

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the runtime returns beside its code. Raises CudaError."""
        code, *values = getattr(self.runtime, function)(*arguments)
        if code != self.runtime.cudaError_t.cudaSuccess:
            _, text = self.runtime.cudaGetErrorString(code)
            raise CudaError(f"{function}: {text.decode()} ({code.name})")
        return values[0] if values else None


class Buffer:
    """One tensor twice: in the GPU's memory, and pinned in the host's, where `host` shows it."""

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
        """Give both back; `host` must not be touched afterwards."""
        self._cuda.call("cudaFreeHost", self._pinned)
        self._cuda.call("cudaFree", self.device)
