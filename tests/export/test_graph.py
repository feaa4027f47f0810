"""The graphs against torch, and against each other."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from pcae_export import graph, weights
from pcae_export.torch_reference import run_torch
from pcae_export.verify import MARGIN
from pcae_serve.bundle.manifest import ELASTIC_GRAPH, WEIGHTS
from pcae_serve.bundle.reader import Bundle
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint

Tiny = Callable[..., Checkpoint]

PIXELS = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
COUNTS = {
    "k 1.0": (64, 64, 64),
    "k 0.9": (57, 51, 45),
    "k 0.6": (38, 22, 13),
    "k 0.3": (19, 5, 1),
    "only the first stage drops": (30, 30, 30),
    "only the second": (64, 40, 40),
    "only the last": (64, 64, 7),
    "one patch left": (1, 1, 1),
}


class GatherElements(OpRun):
    """onnx's own takes 64 rows at most."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int = 0) -> Any:
        return (np.take_along_axis(data, indices, axis),)


class MultiHeadAttention(OpRun):
    """ONNX Runtime's operator, which it cannot run on a CPU in bfloat16."""

    op_domain = "com.microsoft"

    def _run(self, *qkv: Any, num_heads: int) -> Any:
        q, k, v = (
            torch.from_numpy(x.astype(np.float32).reshape(*x.shape[:2], num_heads, -1))
            .transpose(1, 2)
            for x in qkv
        )  # fmt: skip
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return (mixed.transpose(1, 2).flatten(2).numpy().astype(qkv[0].dtype),)


def run(
    file: Path, counts: Sequence[int] | None, pixels: np.ndarray, bfloat16: bool = False
) -> list[np.ndarray]:
    feeds: dict[str, Any] = {"pixels": pixels}
    if counts is not None:
        feeds["token_counts"] = np.array(counts, dtype=np.int64)
    if bfloat16:
        session: Any = ReferenceEvaluator(
            onnx.load(file), new_ops=[GatherElements, MultiHeadAttention]
        )
    else:
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    with np.errstate(invalid="ignore"):  # the mean of no patches, which is sliced away
        return [np.asarray(output) for output in session.run(None, feeds)]


def agree(checkpoint: Checkpoint, found: list[np.ndarray], counts: Sequence[int], n: int) -> None:
    """Logits within 1e-5 and the same patches, wherever no cut is a near tie."""
    expected = run_torch(checkpoint, PIXELS[:n], counts)
    clear = (expected.margin > MARGIN).numpy()
    assert clear.any()
    vectors, *kept = found
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[clear], expected.vectors.numpy()[clear], atol=1e-5)
    for ours, theirs, m in zip(kept, expected.kept, counts, strict=True):
        assert ours.dtype == np.int32
        assert ours.shape == (n, m)
        np.testing.assert_array_equal(np.sort(ours)[clear], theirs.sort(dim=1).values[clear])


def nearly_agree(
    checkpoint: Checkpoint, found: list[np.ndarray], counts: Sequence[int], tolerance: float
) -> None:
    """Logits within `tolerance` of the largest one with equal sets, and not all of them equal."""
    vectors, *kept = found
    assert [stage.shape for stage in kept] == [(len(PIXELS), m) for m in counts]
    assert {stage.dtype for stage in kept} == {np.dtype(np.int32)}
    expected = run_torch(checkpoint, PIXELS, counts, kept).vectors.numpy()
    assert vectors.dtype == np.float32
    largest = np.abs(vectors - expected).max()
    assert 0 < largest < tolerance * np.abs(expected).max()


def written(
    folder: Path,
    checkpoint: Checkpoint,
    precision: graph.Precision = "float32",
    fused: bool = False,
) -> Path:
    """Write an elastic graph of the checkpoint next to its weights."""
    file, stored = folder / f"{precision}-{fused}.onnx", folder / WEIGHTS
    weights.write(weights.to_half(checkpoint.model.state_dict()), stored)
    traced = graph.trace(checkpoint.model, checkpoint.preprocess)
    found = graph.bind_weights(
        graph.make_elastic(traced, precision, fused), weights.read_places(stored)
    )
    graph.save(found, file, {"pcae.name": "toys"})
    return file


def rounded(checkpoint: Checkpoint) -> Checkpoint:
    """With its weights as they are stored."""
    for parameter in checkpoint.model.parameters():
        parameter.data = parameter.data.half().float()
    return checkpoint


@pytest.fixture(scope="module")
def stored(made: Any) -> Checkpoint:
    """The model with the bundle's own weights."""
    return checkpoints.load(made.bundle.root / "models" / "vit")


# Elastic and static, float32


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_elastic_answers_as_torch(
    made: Any, stored: Checkpoint, counts: tuple[int, ...], batch: int
) -> None:
    file = made.bundle.file("vit", ELASTIC_GRAPH)
    agree(stored, run(file, counts, PIXELS[:batch]), counts, batch)


def test_static_is_elastic_bit_for_bit(made: Any) -> None:
    bundle: Bundle = made.bundle
    for tier in bundle.tiers:
        for batch in (1, 3, 8):
            fixed = run(bundle.file("vit", tier.graph), None, PIXELS[:batch])
            elastic = run(bundle.file("vit", ELASTIC_GRAPH), tier.token_counts, PIXELS[:batch])
            for one, other in zip(fixed, elastic, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["graph", "cuda_graph", "tensorrt_graph"])
def test_static_has_constant_counts(made: Any, kind: str) -> None:
    for tier in made.bundle.tiers:
        file = made.bundle.file("vit", getattr(tier, kind))
        model = onnx.load(file, load_external_data=False)
        assert [value.name for value in model.graph.input] == ["pixels"]
        constants = {c.name: c for c in model.graph.initializer}
        ks = [n.input[1] for n in model.graph.node if n.op_type == "TopK"]
        assert (
            tuple(int(onnx.numpy_helper.to_array(constants[k])[0]) for k in ks) == tier.token_counts
        )
        shapes = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim]
                  for o in model.graph.output}  # fmt: skip
        assert shapes == {"logits": ["batch", 3]} | {
            f"kept_{i}": ["batch", m] for i, m in enumerate(tier.token_counts)
        }


def test_weights_are_stored_once_as_float16(made: Any) -> None:
    folder = made.bundle.root / "models" / "vit"
    places = weights.read_places(folder / WEIGHTS)
    for file in folder.glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        outside = [c for c in model.graph.initializer if c.data_location == c.EXTERNAL]
        assert {c.name for c in outside} == set(places)
        for constant in outside:
            entries = {entry.key: entry.value for entry in constant.external_data}
            place = places[constant.name]
            assert constant.data_type == onnx.TensorProto.FLOAT16
            assert entries["location"] == WEIGHTS
            assert int(entries["offset"]) == place.offset
            assert int(entries["length"]) == place.length
        inside = sum(len(c.raw_data) for c in model.graph.initializer if c not in outside)
        assert inside < 4096  # positions of patches, mean, std
        assert file.stat().st_size < 60_000
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_pixels_are_cast_before_they_are_transposed(made: Any) -> None:
    for file in (made.bundle.root / "models" / "vit").glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        takes = [node.op_type for node in model.graph.node if "pixels" in node.input]
        assert "Transpose" not in takes
        assert "Cast" in takes


def test_a_model_that_drops_nothing_takes_no_counts_but_the_same_inputs(
    tiny: Tiny, tmp_path: Path
) -> None:
    checkpoint = rounded(tiny(depth=1, reduction_points=()))
    file = written(tmp_path, checkpoint)
    inputs = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).get_inputs()
    assert [(i.name, i.type, i.shape) for i in inputs] == [
        ("pixels", "tensor(uint8)", ["batch", 16, 16, 3]),
        ("token_counts", "tensor(int64)", [0]),
    ]
    agree(checkpoint, run(file, (), PIXELS), (), len(PIXELS))


# Precisions and forms


@pytest.fixture(scope="module")
def bfloat16(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The model's graph in bfloat16, its attention fused or not."""
    folder, checkpoint = tmp_path_factory.mktemp("bfloat16"), tiny()
    return {fused: written(folder, checkpoint, "bfloat16", fused) for fused in (True, False)}


@pytest.mark.parametrize("kind", ["cuda_graph", "tensorrt_graph"])
def test_graphs_in_float16_answer_nearly_as_torch(made: Any, stored: Checkpoint, kind: str) -> None:
    for tier in made.bundle.tiers:
        found = run(made.bundle.file("vit", getattr(tier, kind)), None, PIXELS)
        nearly_agree(stored, found, tier.token_counts, 0.005)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("counts", [(64, 64, 64), (38, 22, 13), (64, 40, 40)])
def test_graphs_in_bfloat16_answer_nearly_as_torch(
    bfloat16: dict[bool, Path], stored: Checkpoint, counts: tuple[int, ...], fused: bool
) -> None:
    found = run(bfloat16[fused], counts, PIXELS, bfloat16=True)
    nearly_agree(stored, found, counts, 0.04)


def test_attention_is_fused_for_onnx_runtime_on_a_gpu_and_plain_elsewhere(
    made: Any, bfloat16: dict[bool, Path], stored: Checkpoint
) -> None:
    tier, depth = made.bundle.tiers[0], stored.model.config.depth
    for name, fused, opset in (
        (made.bundle.file("vit", ELASTIC_GRAPH), False, 20),
        (made.bundle.file("vit", tier.graph), False, 20),
        (made.bundle.file("vit", tier.cuda_graph), True, 20),
        (made.bundle.file("vit", tier.tensorrt_graph), False, 20),
        (bfloat16[True], True, 22),
        (bfloat16[False], False, 22),
    ):
        model = onnx.load(name, load_external_data=False)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert kinds["MultiHeadAttention"] == (depth if fused else 0)
        assert kinds["Softmax"] == (0 if fused else depth)
        versions = {entry.domain: entry.version for entry in model.opset_import}
        assert versions == {"": opset} | ({"com.microsoft": 1} if fused else {})


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_norms_softmax_ranking_and_head_stay_in_float32(
    made: Any, bfloat16: dict[bool, Path], half: str
) -> None:
    file = made.bundle.file("vit", "low.tensorrt.onnx") if half == "float16" else bfloat16[False]
    graph = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.output]}
    taken: dict[str, set[int]] = {}
    for node in graph.node:
        taken.setdefault(node.op_type, set()).add(types.get(node.input[0], 0))
    for kind in ("LayerNormalization", "Softmax", "TopK", "ReduceL2", "ReduceMean", "Gemm"):
        assert taken[kind] == {onnx.TensorProto.FLOAT}, kind
    for kind in ("Conv", "MatMul", "Gelu"):
        assert taken[kind] == {onnx.TensorProto.DataType.Value(half.upper())}, kind


def test_making_a_form_leaves_the_traced_graph_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = tiny(depth=1, reduction_points=())
    traced = graph.trace(checkpoint.model, checkpoint.preprocess)
    before = ir.to_proto(graph.make_elastic(traced)).SerializeToString(deterministic=True)
    weights.write(weights.to_half(checkpoint.model.state_dict()), tmp_path / WEIGHTS)
    elastic = graph.make_elastic(traced, "bfloat16", fused=True)
    graph.bind_weights(graph.make_static(elastic, ()), weights.read_places(tmp_path / WEIGHTS))
    after = ir.to_proto(graph.make_elastic(traced)).SerializeToString(deterministic=True)
    assert after == before


# Rules and kinds of models


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rule, marks=[pytest.mark.slow] * (rule != "merged"))
        for rule in ("merged", "weighted", "attention", "ptr-normalised", "random")
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_every_rule_answers_as_torch(tiny: Tiny, tmp_path: Path, rule: str, fused: bool) -> None:
    """Two stages, so that the second one meets what the first has made of the tokens."""
    checkpoint = rounded(tiny(depth=2, reduction_points=(0, 1), reduction=rule))
    file = written(tmp_path, checkpoint, fused=fused)
    for counts in ((64, 64), (38, 22), (30, 30), (64, 20), (1, 1)):
        for batch in (8, 3):
            agree(checkpoint, run(file, counts, PIXELS[:batch]), counts, batch)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, marks=pytest.mark.slow)
        for changes in (
            {"pooling": "cls"},
            {"pooling": "cls", "distilled": True, "registers": 2, "layer_scale": True},
            {"classes": 0, "qkv_bias": False},
            {"pooling": "cls", "distilled": True, "reduction": "weighted"},
            {"pooling": "cls", "registers": 3, "reduction": "merged"},
        )
    ],
    ids=lambda changes: ", ".join(f"{k} {v}" for k, v in changes.items()),
)
def test_every_kind_of_model_answers_as_torch(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any]
) -> None:
    checkpoint = tiny(depth=2, reduction_points=(0, 1), **changes)
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter.normal_(std=0.3)  # none that is zero or one at first may be lost unseen
    checkpoint = rounded(checkpoint)
    for fused in (False, True):
        file = written(tmp_path, checkpoint, fused=fused)
        for counts in ((64, 64), (38, 22), (64, 20)):
            agree(checkpoint, run(file, counts, PIXELS), counts, len(PIXELS))
