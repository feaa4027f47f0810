"""ONNX Runtime on the CPU: one session per elastic graph, which takes token counts as an input."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from pcae_serve.bundle.manifest import PATCHES, Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import cpus
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.errors import StartError, one_line


class OnnxRuntimeEngine:
    """One session per model, and another per model with int8 tiers."""

    name = "onnxruntime"
    version: str = ort.__version__
    device = "cpu"
    sizes: Sequence[int] = (1,)  # batches of any size run without set-up

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        """Load the graphs. threads: per batch; 0 for one per usable CPU.

        Raises StartError if a graph does not load.
        """
        self.threads = threads
        options = ort.SessionOptions()
        # by default ONNX Runtime counts the host's CPUs, including those this process may not use
        options.intra_op_num_threads = threads or cpus.count_usable()
        # spinning threads take CPU time from decoding and other processes: benchmarks/threads.py
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors only
        self._sessions: dict[tuple[str, str], ort.InferenceSession] = {}
        for model, name in {(tier.model, tier.elastic_graph): None for tier in bundle.tiers}:
            graph = bundle.file(model, name)
            try:
                self._sessions[model, name] = ort.InferenceSession(
                    graph, options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # ONNX Runtime raises a dozen types of its own
                raise StartError(f"ONNX Runtime cannot load {graph}: {one_line(error)}") from None
        self._options: ort.RunOptions | None = None  # of the batch in progress

    def share(self) -> Self:
        """Return an engine with the same sessions; batches of the two may run at the same time."""
        return copy(self)  # RunOptions are of a batch, sessions may run several

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        vectors, *kept = self._run(tier, pixels, patches=False)
        return Output(vectors, tuple(kept))

    def run_densely(self, tier: Tier, pixels: Pixels) -> Output:
        vectors, *kept, patches = self._run(tier, pixels, patches=True)
        return Output(vectors, tuple(kept), patches=patches)

    def _run(self, tier: Tier, pixels: Pixels, patches: bool) -> list[Any]:
        """Return the outputs of a batch, with the patch grid as the last one or without it."""
        counts = np.array(tier.token_counts, dtype=np.int64)
        feeds: dict[str, Any] = {"pixels": pixels, "token_counts": counts}
        self._options = options = ort.RunOptions()
        session = self._sessions[tier.model, tier.elastic_graph]
        outputs = [output.name for output in session.get_outputs()]
        if not patches and outputs[-1] == PATCHES:
            outputs.pop()
            options.only_execute_path_to_fetches = True  # else the grid is computed, and dropped
        found: list[Any] = session.run(outputs, feeds, options)
        return found

    def terminate(self) -> None:
        if self._options is not None:
            self._options.terminate = True

    def close(self) -> None:
        self._sessions.clear()


def is_gpu_build() -> bool:
    """Return whether the installed onnxruntime is the build for GPUs, as in the gpu image."""
    return "CUDAExecutionProvider" in ort.get_available_providers()
