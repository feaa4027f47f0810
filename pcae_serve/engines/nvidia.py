"""The NVIDIA driver, asked through its own library: which GPUs are there?

It is asked before anything else: without a driver TensorRT's runtime crashes, and ONNX Runtime goes
on without the GPU in silence. It knows nothing of either.
"""

import ctypes

from pcae_serve.errors import StartError

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class NoGpu(StartError):
    """This machine, or this container, has no NVIDIA GPU."""


def list_gpus() -> list[str]:
    """Names of the GPUs, by their number in cuda:N.

    Raises NoGpu where there is none, StartError where there is one that does not answer.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NoGpu("no NVIDIA driver here (a container needs --gpus all)") from None
    count = ctypes.c_int()
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if error == NO_DEVICE or not (error or count.value):
        raise NoGpu("the NVIDIA driver finds no GPU (CUDA_VISIBLE_DEVICES may hide it)")
    if error:
        raise StartError(f"the NVIDIA driver fails with CUDA error {error}: see nvidia-smi")
    return [_name(cuda, index) for index in range(count.value)]


def _name(cuda: ctypes.CDLL, index: int) -> str:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    return name.value.decode()
