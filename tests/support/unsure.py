"""A calibrated bundle's engine that is unsure on its cheapest tier, and can be held in a call."""

import threading
from typing import Any

import numpy as np

from pcae_serve.bundle.manifest import Tier
from pcae_serve.engines.base import Output, Pixels

FIRST, SECOND = 0, 1  # the classes that the two looks answer with

#: After `fast`, a margin up to 0.5 gains 0.3 on `full`.
CALIBRATION: dict[str, Any] = {
    "n": 1000,
    "data_set": "toy",
    "right": "label",
    "tiers": {
        name: {"temperature": 2.0, "margins": [0.5, 1.0], "shares": [0.5, 0.5]}
        for name in ("fast", "balanced", "full")
    },
    "second_looks": [
        {"first": "fast", "second": "full", "gains": [0.3, 0], "lows": [0.2, 0], "highs": [0.4, 0]}
    ],
}


class Unsure:
    """An engine that is unsure on `fast`, and sure of another class on `full` when it may run."""

    name, version, device, threads = "unsure", "1", "cpu", 0
    sizes = (1,)

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()
        self.firsts = threading.Semaphore(1_000_000)  # first looks that may run
        self.fails: Exception | None = None
        self.finite = True

    def terminate(self) -> None:
        self.open.set()

    def close(self) -> None:
        """Nothing to give back."""

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        logits = np.zeros((len(pixels), 4), np.float32)
        if tier.name == "fast":
            assert self.firsts.acquire(timeout=20)
            logits[:, FIRST] = 0.5
            return Output(logits, ())
        self.entered.set()
        assert self.open.wait(20)
        if self.fails is not None:
            raise self.fails
        logits[:, SECOND] = 20.0 if self.finite else np.nan
        return Output(logits, ())

    run_densely = run

    def shut(self) -> None:
        """From now on, a second look waits inside."""
        self.open.clear()
        self.entered.clear()
