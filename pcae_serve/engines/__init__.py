"""Engines run one batch on one device. One small interface; each body lives in its own module.

An engine knows graphs and arrays; it knows nothing of requests, budgets or queues.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle import Bundle, Tier
from pcae_serve.errors import StartError

Pixels = NDArray[np.uint8]  # [N, H, W, 3]


class Output(NamedTuple):
    """What the network said of a batch."""

    vectors: NDArray[np.float32]  # [N, classes] logits, or [N, width] features without a head
    kept: tuple[NDArray[np.int32], ...]  # per stage [N, m_i]: original indices of the patches left


class Engine(Protocol):
    """Runs batches, one call at a time; any batch size from 1 to max_batch."""

    name: str  # of the backend, part of the profile's key
    version: str
    device: str
    threads: int  # of one batch; 0 = the backend's own choice

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        """Answers to a batch, at one tier. Blocks until they are there."""
        ...


def load(backend: str, bundle: Bundle, device: str, threads: int = 0) -> Engine:
    """The engine of that name. Raises StartError where its library is missing or a graph fails."""
    if backend == "simulated":
        from pcae_serve.engines.simulated import SimulatedEngine

        return SimulatedEngine(bundle, device)
    try:  # heavy, so imported by those who run it
        from pcae_serve.engines.onnx_runtime import OnnxRuntimeEngine
    except ModuleNotFoundError:
        raise StartError("onnxruntime is not installed: pip install 'pcae-serve[cpu]'") from None
    return OnnxRuntimeEngine(bundle, device, threads)
