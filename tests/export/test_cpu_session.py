"""Graphs run on every image once, in batches of the sizes asked for."""

from typing import Any

import numpy as np
import pytest

from pcae_export.cpu_session import GraphError, run_graph, slice_batches
from pcae_export.verify import BATCHES

PIXELS = np.random.default_rng(2).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


def test_a_graph_answers_the_same_in_batches_of_any_size(made: Any) -> None:
    file = made.bundle.file("vit", "elastic.onnx")
    counts = made.bundle.tiers[0].token_counts
    whole, parts = (run_graph(file, PIXELS, counts, sizes) for sizes in ((8,), (1, 3)))
    np.testing.assert_allclose(parts.vectors, whole.vectors, atol=1e-5)
    assert [stage.shape for stage in parts.kept] == [(5, count) for count in counts]


def test_a_graph_that_does_not_run_is_one_line(made: Any) -> None:
    with pytest.raises(GraphError, match=r"ONNX Runtime cannot run .*elastic\.onnx: ") as caught:
        run_graph(made.bundle.file("vit", "elastic.onnx"), PIXELS)  # without its token counts
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 16, 33, 64])
def test_every_image_is_run_once_in_batches_of_all_sizes(count: int) -> None:
    rows = [range(count)[part] for part in slice_batches(count, BATCHES)]
    assert [i for part in rows for i in part] == list(range(count))
    if count >= sum(BATCHES):
        assert {len(part) for part in rows} >= set(BATCHES)
