"""ONNX Runtime on the elastic graph: one session per model, a tier is a row of numbers.

The only module of the server that imports onnxruntime.
"""

from typing import Any

import numpy as np
import onnxruntime as ort

from pcae_serve.bundle import ELASTIC_GRAPH, Bundle, Tier
from pcae_serve.engines import Output, Pixels
from pcae_serve.errors import StartError, one_line


class OnnxRuntimeEngine:
    """Sessions of a bundle's elastic graphs."""

    name = "onnxruntime"
    version: str = ort.__version__

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int = 0) -> None:
        """threads: of one batch; 0 = one a core. Raises StartError where a graph does not load."""
        if device != "cpu":
            raise StartError(f"device {device!r} is not served yet: use --device cpu")
        self.device = device
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only
        self._sessions: dict[str, ort.InferenceSession] = {}
        for model in {tier.model: None for tier in bundle.tiers}:
            graph = bundle.file(model, ELASTIC_GRAPH)
            try:
                self._sessions[model] = ort.InferenceSession(
                    graph, options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # ONNX Runtime raises a dozen kinds of its own
                raise StartError(f"ONNX Runtime cannot load {graph}: {one_line(error)}") from None
        self.threads = threads
        self._check(bundle)

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        counts = np.array(tier.token_counts, dtype=np.int64)
        feeds: dict[str, Any] = {"pixels": pixels, "token_counts": counts}
        vectors, *kept = self._sessions[tier.model].run(None, feeds)
        return Output(vectors, tuple(kept))

    def _check(self, bundle: Bundle) -> None:
        """Run every tier once: what does not fit its manifest is told at start, not to callers."""
        blank = np.zeros((1, bundle.image_size, bundle.image_size, 3), np.uint8)
        for tier in bundle.tiers:
            try:
                output = self.run(tier, blank)
            except Exception as error:
                raise StartError(f"tier {tier.name!r} does not run: {one_line(error)}") from None
            if output.vectors.shape != (1, len(bundle.labels)):
                raise StartError(
                    f"tier {tier.name!r} answers {output.vectors.shape[1]} classes, but the bundle"
                    f" names {len(bundle.labels)}: export it again"
                )
