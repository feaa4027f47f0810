"""The int8 form of an elastic graph: what is quantised, what is not, and that it answers alike."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pcae_export import graph, int8, pack
from pcae_export.images import generate
from pcae_export.pack import Part, TierSpec
from pcae_export.torch_reference import run_torch
from pcae_serve.bundle.manifest import INT8_GRAPH
from pcae_training.checkpoint import Checkpoint

PIXELS = generate(24, 16)


@pytest.fixture(scope="module")
def checkpoint(tiny: Any) -> Checkpoint:
    found: Checkpoint = tiny()
    return found


@pytest.fixture(scope="module")
def file(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("int8") / INT8_GRAPH
    elastic = graph.make_elastic(graph.trace(checkpoint.model, checkpoint.preprocess))
    before = len(elastic.graph.inputs)
    int8.save(elastic, checkpoint.model.state_dict(), file, {"pcae.name": "toys"})
    assert len(elastic.graph.inputs) == before  # the caller's graph is left as it was
    return file


def test_products_with_weights_alone_are_quantised(file: Path, checkpoint: Checkpoint) -> None:
    kinds = Counter(node.op_type for node in onnx.load(file).graph.node)
    blocks = checkpoint.model.config.depth
    assert kinds["MatMulInteger"] == 4 * blocks + 1  # qkv, proj, fc1, fc2; and the head
    assert kinds["Conv"] == 1  # the patch embedding
    assert kinds["MatMul"] >= 2 * blocks  # attention
    assert kinds["ConvInteger"] == 0


def test_weights_take_seven_bits(file: Path) -> None:
    """Without VNNI, two products of a full weight overflow 16 bits: answers are wrong, silently."""
    held = onnx.load(file).graph.initializer
    weights = [onnx.numpy_helper.to_array(t) for t in held if t.data_type == onnx.TensorProto.INT8]
    matrices = [weight for weight in weights if weight.ndim == 2]
    assert matrices
    assert max(np.abs(weight.astype(int)).max() for weight in matrices) == 64


def test_the_file_stands_alone_and_says_what_it_is(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    assert all(c.data_location != c.EXTERNAL for c in model.graph.initializer)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"pcae.name": "toys"}
    assert [path.name for path in file.parent.iterdir()] == [INT8_GRAPH]  # no scratch is left
    assert [value.name for value in model.graph.input] == ["pixels", "token_counts"]


@pytest.mark.parametrize("counts", [(64, 64, 64), (38, 22, 13), (64, 40, 40)])
def test_it_answers_nearly_as_torch(
    file: Path, checkpoint: Checkpoint, counts: tuple[int, ...]
) -> None:
    feeds = {"pixels": PIXELS, "token_counts": np.array(counts)}
    logits, *kept = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, feeds)
    assert logits.dtype == np.float32
    assert [stage.shape for stage in kept] == [(24, m) for m in counts]
    expected = run_torch(checkpoint, PIXELS, counts, kept).vectors.numpy()
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(logits - expected).max() > 0  # it is rounded


def test_a_bundle_lists_it_beside_the_float32_graphs(tiny: Any, tmp_path: Path) -> None:
    tiers = {"quick": TierSpec(1.0, "int8"), "full": TierSpec(1.0)}
    checkpoint = tiny(depth=1, reduction_points=())
    bundle = pack.write_bundle({"vit": Part(checkpoint, tiers)}, tmp_path / "out")
    quick, full = bundle.tiers
    assert (quick.precision, quick.elastic_graph) == ("int8", INT8_GRAPH)
    assert (full.precision, full.elastic_graph) == ("float32", "elastic.onnx")
    names = {path.name for path in (bundle.root / "models" / "vit").iterdir()}
    graphs = {name for name in names if name.endswith(".onnx")}
    assert graphs == {INT8_GRAPH, "elastic.onnx", "full.onnx"}  # int8 tiers have no static graph
    metadata = onnx.load(bundle.file("vit", INT8_GRAPH), load_external_data=False).metadata_props
    entries = {entry.key: entry.value for entry in metadata}
    assert entries["pcae.precision"] == "int8"
    assert json.loads(entries["pcae.labels"]) == ["bag", "coat", "shoe"]
