"""The interface of an engine: run one batch of images on one device.

tensorrt      NVIDIA GPU, plans built on it      cuda        NVIDIA GPU, ONNX Runtime
onnxruntime   CPU                                simulated   no graph, dummy outputs
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.manifest import Tier

#: Backends that run a bundle's half-precision graphs, the faster first.
GPU_BACKENDS = ("tensorrt", "cuda")
#: Appended to a backend's name in the log and in /tiers. Remove an entry once a record shows that
#: the backend has run on a GPU.
BACKEND_NOTES = dict.fromkeys(GPU_BACKENDS, "built, not yet run on a GPU")

Pixels = NDArray[np.uint8]  # [N, H, W, 3]


class Output(NamedTuple):
    """The network's output for one batch of N images."""

    vectors: NDArray[np.float32]  # [N, classes] logits, or [N, width] features without a head
    kept: tuple[NDArray[np.int32], ...]  # per stage [N, m_i]: original indices of the kept patches
    padding: int = 0  # rows computed beyond N to fill a batch of a fixed size
    patches: NDArray[np.float32] | None = None  # [N, H, W, D], if they were asked for


class Engine(Protocol):
    """Runs one batch per call, of 1 to max_batch images. Calls must not overlap."""

    @property
    def name(self) -> str:
        """The backend's name, part of the latency profile's key."""
        ...

    @property
    def version(self) -> str:
        """The version of the library that computes."""
        ...

    @property
    def device(self) -> str:
        """The device, such as "cpu" or "cuda:0 (NVIDIA L4)"."""
        ...

    @property
    def threads(self) -> int:
        """Threads per batch; 0 if the backend chooses."""
        ...

    @property
    def sizes(self) -> Sequence[int]:
        """Batch sizes that need set-up of their own; each is run once before serving starts."""
        ...

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        """Run a batch of pixels uint8 [N, H, W, 3] at one tier. Blocks until it is computed."""
        ...

    def terminate(self) -> None:
        """Make the batch in progress fail, if the backend can. Called from another thread."""
        ...

    def close(self) -> None:
        """Release the engine's memory. It cannot run afterwards."""
        ...


@runtime_checkable
class DenseEngine(Engine, Protocol):
    """An engine that can also return the patch grids of a bundle that has them."""

    def run_densely(self, tier: Tier, pixels: Pixels) -> Output:
        """Run a batch as `run` does; the output has patches."""
        ...


@runtime_checkable
class SharedEngine(Engine, Protocol):
    """An engine whose graphs several engines can use at the same time, without a copy."""

    def share(self) -> Engine:
        """Return an engine with the same graphs; calls of the two may overlap."""
        ...


def run_directly(engine: Engine) -> Engine:
    """Return the engine itself: batches run on the calling thread, without a queue."""
    return engine
