"""Mosec: a stage that decodes and a stage with dynamic batching, as its documentation shows.

python mosec_app.py --port PORT
"""

import os

import numpy as np
from handler import Model
from mosec import Server, Worker

MAX_BATCH = int(os.environ.get("COMPARE_MAX_BATCH", "8"))
WAIT_MS = int(os.environ.get("COMPARE_WAIT_MS", "1"))


class Decode(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> np.ndarray:
        return self.model.pixels(data)


class Classify(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, data: list[np.ndarray]) -> list[dict[str, object]]:
        return [self.model.answer(index) for index in self.model.classify(np.stack(data))]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=1, timeout=60)
    server.append_worker(
        Classify, num=1, max_batch_size=MAX_BATCH, max_wait_time=WAIT_MS, timeout=60
    )
    server.run()
