"""An engine that runs when a test says so."""

import threading

import numpy as np

from pcae_serve.bundle.manifest import Tier
from pcae_serve.engines.base import Output, Pixels


class Gate:
    """An engine that runs when it is told to."""

    name, version, device, threads = "gate", "1", "cpu", 0
    sizes = (1,)

    def terminate(self) -> None:
        """It is let through, not stopped."""

    def close(self) -> None:
        """Nothing to give back."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.fails = False

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        self.entered.set()
        assert self.open.wait(20)
        if self.fails:
            raise RuntimeError("out of memory")
        self.batches.append(len(pixels))
        return Output(np.zeros((len(pixels), 4), np.float32), ())

    def shut(self) -> None:
        """From now on, a batch waits inside."""
        self.open.clear()
        self.entered.clear()
        self.batches.clear()
