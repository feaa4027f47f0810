"""Run one graph on all images with ONNX Runtime on the CPU, to compare others with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from pcae_serve.bundle.manifest import PATCHES
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.errors import PcaeError, one_line


class GraphError(PcaeError):
    """A graph does not load or does not run."""


def run_graph(
    file: Path,
    pixels: Pixels,
    token_counts: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (8,),
) -> Output:
    """Return a graph's output for pixels uint8 [N, H, W, 3].

    token_counts: the elastic graph's second input; None for a static graph. batch_sizes: taken in
    turn until all images have run. Raises GraphError.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    feeds: dict[str, Any] = {}
    if token_counts is not None:
        feeds["token_counts"] = np.array(token_counts, dtype=np.int64)
    try:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        parts = [
            session.run(None, feeds | {"pixels": pixels[rows]})
            for rows in slice_batches(len(pixels), batch_sizes)
        ]
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        raise GraphError(f"ONNX Runtime cannot run {file}: {one_line(error)}") from None
    vectors, *kept = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
    dense = session.get_outputs()[-1].name == PATCHES
    patches = kept.pop() if dense else None
    return Output(vectors, tuple(kept), patches=patches)


def slice_batches(count: int, batch_sizes: Sequence[int]) -> Iterator[slice]:
    """Yield slices that cover `count` rows, of each batch size in turn."""
    start, turn = 0, 0
    while start < count:
        size = batch_sizes[turn % len(batch_sizes)]
        yield slice(start, min(start + size, count))
        start, turn = start + size, turn + 1
