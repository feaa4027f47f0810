"""Ray Serve with `serve.batch`: one replica on one core.

python ray_app.py PORT
"""

import os
import sys
import time
from typing import Any

import numpy as np
import ray
from handler import Model
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
class Classifier:
    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.001)
    async def classify(self, pixels: list[np.ndarray]) -> list[int]:
        return self.model.classify(np.stack(pixels))

    async def __call__(self, request: Request) -> JSONResponse:
        index: Any = await self.classify(self.model.pixels(await request.body()))
        return JSONResponse(self.model.answer(index))  # with Content-Length


if __name__ == "__main__":
    variables = {name: os.environ[name] for name in ("COMPARE_MODEL", "COMPARE_TIER", "PYTHONPATH")}
    ray.init(
        num_cpus=1, include_dashboard=False, runtime_env={"env_vars": variables},
        object_store_memory=100_000_000,
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Classifier.bind(), route_prefix="/classify")
    while True:
        time.sleep(3600)
