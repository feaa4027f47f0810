"""BentoML with adaptive batching (`batchable=True`).

bentoml serve bentoml_app:Classifier --port PORT
"""

from pathlib import Path
from typing import Annotated, Any

import bentoml
import numpy as np
from bentoml.validators import ContentType
from handler import Model


@bentoml.service(workers=1, traffic={"timeout": 60}, resources={"cpu": "1"})
class Batches:
    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(batchable=True, max_batch_size=8, max_latency_ms=60_000)
    def classify(self, pixels: np.ndarray) -> np.ndarray:
        return np.array(self.model.classify(pixels))


@bentoml.service(workers=1, traffic={"timeout": 60}, resources={"cpu": "1"})
class Classifier:
    batches = bentoml.depends(Batches)

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api
    async def classify(self, image: Annotated[Path, ContentType("image/jpeg")]) -> dict[str, Any]:
        pixels = self.model.pixels(image.read_bytes())
        (index,) = await self.batches.to_async.classify(pixels[None])
        return self.model.answer(int(index))
