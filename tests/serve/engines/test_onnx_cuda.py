"""ONNX Runtime's CUDA engine, on the CPU provider but for what is marked gpu."""

import hashlib
import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.engines import nvidia, onnx_cuda
from pcae_serve.engines.base import Output
from pcae_serve.engines.loader import check_engine
from pcae_serve.engines.onnx_cuda import CUDA, CudaEngine
from pcae_serve.errors import StartError
from tests.support.bundles import write_bundle

WEIGHTS = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
PIXELS = np.random.default_rng(1).integers(0, 256, (9, 8, 8, 3), np.uint8)


def graph(counts: tuple[int, ...], classes: int = 4, elastic: bool = False) -> bytes:
    """A static graph whose every output depends on its row of pixels.

    logits = mean colour x WEIGHTS; kept_i = mean of red, floored, + 0 … m_i - 1.
    """
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "hw"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "weights"], ["logits"]),
        helper.make_node("MatMul", ["colour", "red"], ["first"]),
        helper.make_node("Cast", ["first"], ["whole"], to=TensorProto.INT32),
    ]
    constants = {
        "hw": np.array([1, 2]),
        "weights": WEIGHTS[:, :classes],
        "red": np.array([[1], [0], [0]], np.float32),
    }
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])]
    for i, count in enumerate(counts):
        constants[f"range_{i}"] = np.arange(count, dtype=np.int32)[None]
        nodes.append(helper.make_node("Add", ["whole", f"range_{i}"], [f"kept_{i}"]))
        shape: list[str | int | None] = ["batch", count]
        outputs.append(helper.make_tensor_value_info(f"kept_{i}", TensorProto.INT32, shape))
    if elastic:  # kept_0 has as many columns as there are pixels that are not black
        nodes[5:6] = [
            helper.make_node("NonZero", ["floats"], ["places"]),
            helper.make_node("Cast", ["places"], ["kept_0"], to=TensorProto.INT32),
        ]
        outputs[1] = helper.make_tensor_value_info("kept_0", TensorProto.INT32, ["batch", "any"])
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "static",
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 8, 8, 3])],
            outputs,
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def expected(tier: Tier, pixels: NDArray[np.uint8]) -> Output:
    colour = pixels.astype(np.float32).mean(axis=(1, 2))
    first = colour[:, :1].astype(np.int32)
    kept = tuple(first + np.arange(m, dtype=np.int32) for m in tier.token_counts)
    return Output(colour @ WEIGHTS, kept)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Callable[[Tier], bytes]], Bundle]:
    """A bundle with the graphs for GPUs that a function makes of its tiers."""

    def make(graph_of: Callable[[Tier], bytes]) -> Bundle:
        root = write_bundle(tmp_path / "bundle")
        document = json.loads((root / "bundle.json").read_text())
        for tier in load_bundle(root).tiers:
            content = graph_of(tier)
            (root / "models" / "vit" / tier.cuda_graph).write_bytes(content)
            document["files"][f"models/vit/{tier.cuda_graph}"] = hashlib.sha256(content).hexdigest()
        (root / "bundle.json").write_text(json.dumps(document))
        return load_bundle(root)

    return make


@pytest.fixture
def served(make: Callable[[Callable[[Tier], bytes]], Bundle]) -> Bundle:
    return make(lambda tier: graph(tier.token_counts))


def assert_right(output: Output, tier: Tier, pixels: NDArray[np.uint8], atol: float) -> None:
    wanted = expected(tier, pixels)
    assert output.vectors.dtype == np.float32
    np.testing.assert_allclose(output.vectors, wanted.vectors, rtol=1e-5, atol=atol)
    assert len(output.kept) == len(wanted.kept)
    for ours, theirs in zip(output.kept, wanted.kept, strict=True):
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("batch", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)], ids=str
)
def test_any_batch_is_answered_and_its_padding_told(
    served: Bundle, batch: int, bucket: int
) -> None:
    engine = CudaEngine(served, "cpu", max_batch=6)
    for tier in served.tiers:
        for pixels in (PIXELS[:batch], PIXELS[-batch:]):
            output = engine.run(tier, pixels)
            assert_right(output, tier, pixels, atol=1e-3)
            assert output.padding == bucket - batch


def test_an_answer_outlives_the_next_batch(served: Bundle) -> None:
    engine = CudaEngine(served, "cpu", max_batch=4)
    first = engine.run(served.tiers[0], PIXELS[:4])
    for tier in served.tiers:
        engine.run(tier, PIXELS[4:8])
    assert_right(first, served.tiers[0], PIXELS[:4], atol=1e-3)


def test_buffers_stay_where_they_are(served: Bundle) -> None:
    engine = CudaEngine(served, "cpu", max_batch=4)

    def addresses() -> list[int]:
        outputs = [value for replay in engine._replays.values() for value in replay.outputs]
        return [value.data_ptr() for value in (*engine._inputs.values(), *outputs)]

    before = addresses()
    for batch in (1, 3, 4, 2):
        engine.run(served.tiers[0], PIXELS[:batch])
    assert addresses() == before
    assert len(set(before)) == 3 + 3 * 3 * 4  # 3 buckets, 3 tiers, 4 outputs


def test_every_graph_has_a_number_of_its_own(served: Bundle) -> None:
    engine = CudaEngine(served, "cpu", max_batch=4)
    numbers = {
        (tier, replay.options.get_run_config_entry("gpu_graph_id"))
        for (tier, _), replay in engine._replays.items()
    }
    assert len(numbers) == len(engine._replays) == 9


def test_callers_on_many_threads_get_their_own_answers(served: Bundle) -> None:
    engine = CudaEngine(served, "cpu", max_batch=4)

    def ask(i: int) -> None:
        tier, pixels = served.tiers[i % 3], PIXELS[i % 6 : i % 6 + 1 + i % 3]
        assert_right(engine.run(tier, pixels), tier, pixels, atol=1e-3)

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(ask, range(100)))


@pytest.mark.parametrize("batch", [0, 5])
def test_a_batch_that_was_not_set_up(served: Bundle, batch: int) -> None:
    engine = CudaEngine(served, "cpu", max_batch=4)
    with pytest.raises(ValueError, match=f"a batch has 1 to 4 images, not {batch}"):
        engine.run(served.tiers[0], PIXELS[:batch])
    assert_right(engine.run(served.tiers[0], PIXELS[:1]), served.tiers[0], PIXELS[:1], atol=1e-3)


def test_a_bundle_without_graphs_for_gpus(small_bundle: Bundle) -> None:
    with pytest.raises(StartError, match=r"has no fast\.cuda\.onnx, which the cuda backend needs"):
        CudaEngine(small_bundle, "cpu")


@pytest.mark.parametrize(
    ("graph_of", "words"),
    [
        (lambda tier: b"\x12\x05graph", r"cannot load .*fast\.cuda\.onnx"),
        (lambda tier: graph(tier.token_counts, elastic=True), "must be static, but kept_0"),
        (lambda tier: graph(tier.token_counts, classes=3), "computes 3 logits, .* has 4"),
        (lambda tier: graph((7, 5, 3)), r"'fast' keeps \(7, 5, 3\) patches, .* \(9, 5, 3\)"),
        (
            lambda tier: graph(tier.token_counts).replace(b"pixels", b"voxels"),
            "cannot set up batches on cpu: .*pixels",
        ),
    ],
    ids=["no graph", "elastic", "width", "patches", "input"],
)
def test_a_graph_that_does_not_fit_is_told_at_start(
    make: Callable[[Callable[[Tier], bytes]], Bundle],
    graph_of: Callable[[Tier], bytes],
    words: str,
) -> None:
    def tried(bundle: Bundle) -> None:
        engine = CudaEngine(bundle, "cpu")
        check_engine(engine, bundle, engine.sizes)

    with pytest.raises(StartError, match=words) as raised:
        tried(make(graph_of))
    assert "\n" not in str(raised.value)


def test_a_session_that_would_go_on_without_the_gpu_is_refused(served: Bundle) -> None:
    """Without CUDA's libraries, ONNX Runtime silently runs on the CPU."""
    file = str(served.file("vit", served.tiers[0].cuda_graph))
    if CUDA in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning of the build without CUDA
        with pytest.raises(StartError, match=r"cannot use CUDA.*\(no libcublas\): pip install"):
            onnx_cuda._session(file, (CUDA, {"device_id": "0"}), "no libcublas\nnor others")


def test_the_package_for_cpus_is_told_from_a_missing_gpu(
    served: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    if CUDA in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(nvidia, "list_gpus", lambda: ["NVIDIA"])
    with pytest.raises(StartError, match=r"pip uninstall onnxruntime.*'\.\[gpu\]'"):
        CudaEngine(served, "cuda:0")


@pytest.mark.gpu
def test_captured_graphs_answer_as_the_cpu_does(served: Bundle) -> None:
    try:
        nvidia.list_gpus()
    except StartError as error:
        pytest.skip(str(error))
    engine = CudaEngine(served, "cuda:0", max_batch=4)
    for _ in range(3):  # captured, then replayed
        for tier in served.tiers:
            for batch in (1, 2, 3, 4):
                pixels = PIXELS[batch : 2 * batch]
                assert_right(engine.run(tier, pixels), tier, pixels, atol=1e-2)
