"""LitServe with batching, as its documentation of `max_batch_size` shows.

python litserve_app.py PORT
"""

import os
import sys
from typing import Annotated, Any

import litserve as ls
import numpy as np
from fastapi import Body
from handler import Model

MAX_BATCH = int(os.environ.get("COMPARE_MAX_BATCH", "8"))
WAIT_S = float(os.environ.get("COMPARE_WAIT_MS", "1")) / 1e3


class Classifier(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.model = Model()

    def decode_request(
        self, request: Annotated[bytes, Body(media_type="application/octet-stream")]
    ) -> np.ndarray:
        return self.model.pixels(request)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> list[int]:
        return self.model.classify(x)

    def unbatch(self, output: list[int]) -> list[int]:
        return output

    def encode_response(self, output: int) -> dict[str, Any]:
        return self.model.answer(output)


if __name__ == "__main__":
    api = Classifier(max_batch_size=MAX_BATCH, batch_timeout=WAIT_S)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, track_requests=False)
    server.run(
        port=int(sys.argv[1]), host="127.0.0.1", num_api_servers=1, generate_client_file=False,
        log_level="warning",
    )  # fmt: skip
