"""Triton's Python backend: one call decodes and classifies all requests of a dynamic batch."""

from typing import Any

import numpy as np
import triton_python_backend_utils as backend  # type: ignore[import-not-found]
from handler import Model


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.model = Model()

    def execute(self, requests: list[Any]) -> list[Any]:
        bodies = [
            backend.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
            for request in requests
        ]
        pixels = np.stack([self.model.pixels(body) for batch in bodies for body in batch])
        indices = np.array(self.model.classify(pixels), np.int32)
        answers, at = [], 0
        for batch in bodies:
            part = indices[at : at + len(batch), None]
            at += len(batch)
            answers.append(backend.InferenceResponse([backend.Tensor("index", part)]))
        return answers
