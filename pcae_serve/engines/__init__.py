"""Engines run one batch on one device. One small interface; each body lives in its own module.

An engine knows graphs and arrays; it knows nothing of requests, budgets or queues.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle import Tier

Pixels = NDArray[np.uint8]  # [N, H, W, 3]


class Output(NamedTuple):
    """What the network said of a batch."""

    logits: NDArray[np.float32]  # [N, classes]
    kept: tuple[NDArray[np.int32], ...]  # per stage [N, m_i]: original indices of the patches left


class Engine(Protocol):
    """Runs batches, one call at a time; any batch size from 1 to max_batch."""

    name: str  # of the backend, part of the profile's key
    version: str
    device: str

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        """Logits for a batch, at one tier. Blocks until they are there."""
        ...
