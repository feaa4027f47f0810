import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import cuda_runtime, nvidia, plan_cache, tensorrt
from pcae_serve.engines.base import Output
from pcae_serve.engines.cuda_runtime import CudaError
from pcae_serve.engines.plan_cache import Plan, PlanParity, Recipe
from pcae_serve.engines.tensorrt import Runner, TensorRtEngine
from pcae_serve.errors import StartError
from tests.support import tensorrt_standin
from tests.support.cuda_standin import CaptureMode, CopyKind, ErrorCode, Misuse
from tests.support.tensorrt_standin import TensorRt

MAX_BATCH = 4
MODE = CaptureMode.cudaStreamCaptureModeThreadLocal
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tensorrt_standin.demo_with_graphs(
        tmp_path_factory.mktemp("demo") / "bundle", float32=True
    )


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRt:
    return tensorrt_standin.install(monkeypatch)


@pytest.fixture
def cache(bundle: Bundle, trt: TensorRt, tmp_path: Path) -> Path:
    """A cache with a plan of every tier, for batches up to MAX_BATCH."""
    library = tensorrt.load_library()
    target = library.target(cuda_runtime.find_gpu("cuda:0"))
    plan_cache.plans_folder(tmp_path).mkdir()
    for tier in bundle.tiers:
        data = plan_of(trt, bundle, tier.name)
        parity = PlanParity(
            images=64,
            data_set="toys",
            measure="top-1 agreement",
            value=1,
            largest_difference=0,
            same_patches=1,
        )
        plan = Plan(
            key=plan_cache.make_key(bundle, tier, target, Recipe(max_batch=MAX_BATCH)),
            sha256=plan_cache.digest(data),
            built=datetime.now(UTC),
            build_s=1,
            driver="13.1",
            shapes={},
            fused_attention=12,
            parity=parity,
        )
        plan_cache.write_plan(tmp_path, plan, data)
    return tmp_path


@pytest.fixture
def engine(bundle: Bundle, cache: Path) -> Iterator[TensorRtEngine]:
    engine = TensorRtEngine(bundle, "cuda:0", cache, MAX_BATCH)
    yield engine
    engine.close()


def plan_of(trt: TensorRt, bundle: Bundle, name: str, most: int = MAX_BATCH) -> bytes:
    """What the stand-in's builder makes of a tier's graph."""
    tier = next(tier for tier in bundle.tiers if tier.name == name)
    logger = tensorrt.load_library().messages
    builder = trt.Builder(logger)
    network = builder.create_network(1)
    assert trt.OnnxParser(network, logger).parse_from_file(str(plan_cache.find_graph(bundle, tier)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("pixels", *((n, 28, 28, 3) for n in (1, 2, most)))
    config.add_optimization_profile(profile)
    config.progress_monitor = SilentMonitor()
    plan = builder.build_serialized_network(network, config)
    assert plan
    return plan


class SilentMonitor:
    def phase_start(self, phase: str, parent: str | None, steps: int) -> None: ...

    def phase_finish(self, phase: str) -> None: ...

    def step_complete(self, phase: str, step: int) -> bool:
        return True


def expected(bundle: Bundle, name: str, pixels: np.ndarray[Any, Any]) -> Output:
    """Return ONNX Runtime's output of the graph that the plan was built from."""
    tier = next(tier for tier in bundle.tiers if tier.name == name)
    vectors, *kept = tensorrt_standin.open_session(str(plan_cache.find_graph(bundle, tier))).run(
        None, {"pixels": pixels}
    )
    return Output(vectors, tuple(kept))


def test_every_tier_answers_as_its_graph_at_every_batch(
    bundle: Bundle, engine: TensorRtEngine
) -> None:
    for tier in bundle.tiers:
        whole = expected(bundle, tier.name, PIXELS)
        for batch in range(1, MAX_BATCH + 1):
            found = engine.run(tier, PIXELS[:batch])
            np.testing.assert_allclose(found.vectors, whole.vectors[:batch], atol=1e-4)
            assert found.vectors.dtype == np.float32
            assert len(found.kept) == len(tier.token_counts)
            for ours, theirs in zip(found.kept, whole.kept, strict=True):
                assert ours.dtype == np.int32
                np.testing.assert_array_equal(np.sort(ours), np.sort(theirs[:batch]))
            assert found.padding == (batch == 3)


def test_a_run_is_one_launch_of_a_captured_graph(
    bundle: Bundle, engine: TensorRtEngine, trt: TensorRt
) -> None:
    before = trt.cuda.launches
    engine.run(bundle.tiers[0], PIXELS[:3])
    assert trt.cuda.launches == before + 1


def test_answers_stay_when_the_next_batch_has_run(bundle: Bundle, engine: TensorRtEngine) -> None:
    first = engine.run(bundle.tiers[0], PIXELS[:2])
    copy = first.vectors.copy(), first.kept[0].copy()
    engine.run(bundle.tiers[0], PIXELS[2:4])
    np.testing.assert_array_equal(first.vectors, copy[0])
    np.testing.assert_array_equal(first.kept[0], copy[1])


def test_threads_take_turns(bundle: Bundle, engine: TensorRtEngine) -> None:
    tiers = [bundle.tiers[i % len(bundle.tiers)] for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda i: engine.run(tiers[i], PIXELS[i : i + 1]), range(8))
        for i, found in enumerate(answers):
            alone = expected(bundle, tiers[i].name, PIXELS[i : i + 1])
            np.testing.assert_allclose(found.vectors, alone.vectors, atol=1e-4)


def test_the_second_gpu_is_used_from_any_thread(bundle: Bundle, cache: Path) -> None:
    engine = TensorRtEngine(bundle, "cuda:1", cache, MAX_BATCH)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(engine.run, bundle.tiers[0], PIXELS[:1]).result()
    assert engine.device == f"cuda:1 ({tensorrt_standin.GPU})"
    assert found.vectors.shape == (1, 10)
    engine.close()


def test_closing_gives_everything_back(bundle: Bundle, cache: Path, trt: TensorRt) -> None:
    engine = TensorRtEngine(bundle, "cuda:0", cache, MAX_BATCH)
    assert trt.cuda.left() > 0
    engine.close()
    engine.close()
    assert trt.cuda.left() == 0
    with pytest.raises(CudaError, match="closed"):
        engine.run(bundle.tiers[0], PIXELS[:1])


@pytest.mark.parametrize(
    "function",
    ["cudaStreamCreateWithFlags", "cudaMalloc", "cudaHostAlloc", "cudaGraphInstantiate"],
)
def test_a_cuda_error_at_start_is_one_line_and_leaves_nothing(
    bundle: Bundle, cache: Path, trt: TensorRt, function: str
) -> None:
    trt.cuda.fails[function] = ErrorCode.cudaErrorMemoryAllocation
    with pytest.raises(StartError, match=f"{function}: out of memory") as caught:
        TensorRtEngine(bundle, "cuda:0", cache, MAX_BATCH)
    assert "\n" not in str(caught.value)
    assert trt.cuda.left() == 0


def test_a_cuda_error_in_a_run_is_raised(
    bundle: Bundle, engine: TensorRtEngine, trt: TensorRt
) -> None:
    trt.cuda.fails["cudaGraphLaunch"] = ErrorCode.cudaErrorInvalidResourceHandle
    with pytest.raises(CudaError, match=r"cudaGraphLaunch: .*cudaErrorInvalidResourceHandle"):
        engine.run(bundle.tiers[0], PIXELS[:1])
    trt.cuda.fails.clear()
    assert len(engine.run(bundle.tiers[0], PIXELS[:1]).vectors) == 1


@pytest.mark.parametrize(
    "pixels", [PIXELS[:0], np.zeros((9, 28, 28, 3), np.uint8), PIXELS[:1, :27], PIXELS / 255.0]
)
def test_pixels_that_do_not_fit_are_refused(
    bundle: Bundle, engine: TensorRtEngine, pixels: np.ndarray[Any, Any]
) -> None:
    with pytest.raises(ValueError, match=r"a batch has 1 to 4|pixels are"):
        engine.run(bundle.tiers[0], pixels)


def test_batches_beyond_the_plans_are_told_at_start(bundle: Bundle, cache: Path) -> None:
    with pytest.raises(StartError, match="takes batches of at most 4 images, not 32"):
        TensorRtEngine(bundle, "cuda:0", cache)


def test_a_missing_plan_names_the_command(bundle: Bundle, cache: Path) -> None:
    for file in plan_cache.plans_folder(cache).glob("*.json"):
        file.unlink()
    with pytest.raises(StartError, match=r"no TensorRT plan .* run 'pcae-export tensorrt "):
        TensorRtEngine(bundle, "cuda:0", cache, MAX_BATCH)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda _: b"rubbish", "magic tag does not match"),
        (lambda plan: plan.replace(b"[4, 28", b"[3, 28"), "it takes at most 3 images"),
    ],
    ids=["rubbish", "narrow"],
)
def test_a_plan_that_does_not_load_is_told(
    bundle: Bundle, trt: TensorRt, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    data = {"fast": spoil(plan_of(trt, bundle, "fast"))}
    with pytest.raises(StartError, match=f"{reason}; run 'pcae-export tensorrt'"):
        Runner(tensorrt.load_library(), cuda_runtime.find_gpu("cuda:0"), data, (1, 4))
    assert trt.cuda.left() == 0


def test_without_a_gpu_tensorrt_is_not_touched(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none() -> list[str]:
        raise nvidia.NoGpu("no NVIDIA driver here")

    monkeypatch.setattr(nvidia, "list_gpus", none)
    monkeypatch.setattr(tensorrt, "import_module", lambda name: pytest.fail(f"imports {name}"))
    with pytest.raises(StartError, match="no NVIDIA driver here"):
        TensorRtEngine(bundle, "cuda:0", tmp_path)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:x", "cuda:-1"])
def test_a_device_that_is_no_gpu_is_told(trt: TensorRt, device: str) -> None:
    with pytest.raises(StartError, match="needs an NVIDIA GPU such as cuda:0"):
        cuda_runtime.find_gpu(device)


def test_a_gpu_that_is_not_there_is_told(trt: TensorRt) -> None:
    with pytest.raises(StartError, match="there is no cuda:2"):
        cuda_runtime.find_gpu("cuda:2")
    assert cuda_runtime.find_gpu("cuda:1") == (1, tensorrt_standin.GPU, "9.0", "13.1")


def test_a_gpu_that_does_not_answer_is_told(trt: TensorRt) -> None:
    trt.cuda.fails["cudaDriverGetVersion"] = ErrorCode.cudaErrorInvalidValue
    with pytest.raises(StartError, match="does not respond: cudaDriverGetVersion"):
        cuda_runtime.find_gpu("cuda:0")


def test_missing_bindings_are_told(trt: TensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(StartError, match="cuda-bindings is not installed: pip install"):
        cuda_runtime.find_gpu("cuda:0")


def test_tensorrt_comes_before_its_substitute(
    trt: TensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tensorrt.load_library().name == "tensorrt"
    for package in tensorrt.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StartError, match="TensorRT is not installed: pip install"):
        tensorrt.load_library()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", trt)
    assert (tensorrt.load_library().name, tensorrt.load_library().ahead_of_time) == (
        "tensorrt_rtx",
        True,
    )


def test_an_old_tensorrt_is_refused(trt: TensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "__version__", "10.3.0", raising=False)
    with pytest.raises(StartError, match=r"TensorRT 10\.3\.0 is too old: 10\.16 or newer"):
        tensorrt.load_library()
    monkeypatch.setattr(trt, "__version__", "10.16.1.11", raising=False)
    assert tensorrt.load_library().version == "10.16.1.11"


def test_a_tensorrt_without_its_libraries_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(tensorrt, "import_module", broken)
    with pytest.raises(StartError, match=r"tensorrt does not load: libnvinfer\.so\.11"):
        tensorrt.load_library()


class TestStandIn:
    """The stand-in refuses what TensorRT and CUDA would; the tests above rely on it."""

    @pytest.fixture
    def made(self, trt: TensorRt, bundle: Bundle) -> Any:
        library = tensorrt.load_library()
        runtime = trt.Runtime(library.messages)
        engine = runtime.deserialize_cuda_engine(plan_of(trt, bundle, "fast"))
        context = engine.create_execution_context(tensorrt_standin.Strategy.USER_MANAGED)
        _, stream = trt.cuda.cudaStreamCreateWithFlags(1)
        return engine, context, stream

    def bind(self, trt: TensorRt, engine: Any, context: Any, batch: int = 1) -> None:
        _, scratch = trt.cuda.cudaMalloc(tensorrt_standin.SCRATCH)
        context.set_device_memory(scratch, tensorrt_standin.SCRATCH)
        assert context.set_input_shape("pixels", (batch, 28, 28, 3))
        for name in engine.tensors:
            _, address = trt.cuda.cudaMalloc(batch * 28 * 28 * 3)
            assert context.set_tensor_address(name, address)

    def test_nothing_runs_before_all_is_set(self, trt: TensorRt, made: Any) -> None:
        engine, context, stream = made
        assert not context.execute_async_v3(int(stream))
        assert not context.set_input_shape("pixels", (MAX_BATCH + 1, 28, 28, 3))
        self.bind(trt, engine, context)
        del context.addresses["logits"]
        assert not context.execute_async_v3(int(stream))
        assert not context.set_tensor_address("nonsense", 1)

    def test_a_capture_needs_a_settled_shape(self, trt: TensorRt, made: Any) -> None:
        engine, context, stream = made
        self.bind(trt, engine, context)
        trt.cuda.cudaStreamBeginCapture(stream, MODE)
        assert not context.execute_async_v3(int(stream))
        (code,) = trt.cuda.cudaStreamSynchronize(stream)
        assert code == ErrorCode.cudaErrorStreamCaptureUnsupported

    def test_a_replay_after_a_change_is_misuse(self, trt: TensorRt, made: Any) -> None:
        engine, context, stream = made
        self.bind(trt, engine, context, batch=2)
        assert context.execute_async_v3(int(stream))
        trt.cuda.cudaStreamSynchronize(stream)
        trt.cuda.cudaStreamBeginCapture(stream, MODE)
        assert context.execute_async_v3(int(stream))
        _, graph = trt.cuda.cudaStreamEndCapture(stream)
        assert context.set_input_shape("pixels", (1, 28, 28, 3))
        trt.cuda.cudaGraphLaunch(graph, stream)
        with pytest.raises(Misuse, match="after its context changed"):
            trt.cuda.cudaStreamSynchronize(stream)

    def test_small_buffers_and_freed_memory_are_misuse(self, trt: TensorRt, made: Any) -> None:
        engine, context, stream = made
        self.bind(trt, engine, context)
        _, small = trt.cuda.cudaMalloc(8)
        context.set_tensor_address("logits", small)
        with pytest.raises(Misuse, match="beyond the allocation"):
            context.execute_async_v3(int(stream))
        _, host = trt.cuda.cudaHostAlloc(16, 0)
        kind = CopyKind.cudaMemcpyHostToDevice
        with pytest.raises(Misuse, match="beyond"):
            trt.cuda.cudaMemcpyAsync(small, host, 16, kind, stream)
        trt.cuda.cudaMemcpyAsync(small, host, 8, kind, stream)
        trt.cuda.cudaFree(small)
        with pytest.raises(Misuse, match="freed"):
            trt.cuda.cudaStreamSynchronize(stream)

    def test_two_threads_on_one_stream_are_misuse(self, trt: TensorRt, made: Any) -> None:
        engine, context, stream = made
        self.bind(trt, engine, context)
        assert context.execute_async_v3(int(stream))
        caught: list[Exception] = []

        def other() -> None:
            try:
                context.execute_async_v3(int(stream))
            except Misuse as error:
                caught.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert caught

    def test_without_its_lock_the_engine_would_be_caught(
        self, trt: TensorRt, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = {"fast": plan_of(trt, bundle, "fast")}
        runner = Runner(tensorrt.load_library(), cuda_runtime.find_gpu("cuda:0"), data, (1,))
        runner._lock = nullcontext()  # type: ignore[assignment]
        launched, tried = threading.Event(), threading.Event()
        synchronise = trt.cuda.cudaStreamSynchronize

        def wait(stream: Any) -> Any:
            launched.set()
            assert tried.wait(60)
            return synchronise(stream)

        monkeypatch.setattr(trt.cuda, "cudaStreamSynchronize", wait)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(runner.run, "fast", PIXELS[:1])
            assert launched.wait(60)
            with pytest.raises(Misuse, match="two threads"):
                runner.run("fast", PIXELS[1:2])
            tried.set()
            first.result()
        runner._closing.detach()
