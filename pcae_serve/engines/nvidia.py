"""List the machine's NVIDIA GPUs through the driver's own library.

Call it before TensorRT or ONNX Runtime: without a driver, the first crashes and the second silently
runs on the CPU.
"""

import ctypes

from pcae_serve.errors import StartError

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class NoGpu(StartError):
    """This machine, or this container, has no NVIDIA GPU."""


def list_gpus() -> list[str]:
    """Return the names of the GPUs, in the order of cuda:N.

    Raises NoGpu if there is none, and StartError if the driver fails.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NoGpu("no NVIDIA driver found (a container needs --gpus all)") from None
    count = ctypes.c_int()
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if error == NO_DEVICE or not (error or count.value):
        raise NoGpu("the NVIDIA driver finds no GPU (CUDA_VISIBLE_DEVICES may hide it)")
    if error:
        raise StartError(f"the NVIDIA driver fails with CUDA error {error}; see nvidia-smi")
    return [_name(cuda, index) for index in range(count.value)]


def _name(cuda: ctypes.CDLL, index: int) -> str:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    return name.value.decode()
