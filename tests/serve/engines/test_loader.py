import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines import loader, nvidia
from pcae_serve.engines.base import Engine
from pcae_serve.engines.loader import load_configured_engine, load_engine
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import BundleError, StartError
from pcae_serve.settings import Settings

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8)


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return load_bundle(demo_path())


@pytest.fixture(scope="module")
def engine(demo: Bundle) -> Engine:
    return load_engine("auto", demo, "cpu", threads=1)


def test_one_session_serves_every_tier(demo: Bundle, engine: Engine) -> None:
    for tier in demo.tiers:
        output = engine.run(tier, PIXELS)
        assert output.vectors.shape == (5, 10)
        assert output.vectors.dtype == np.float32
        assert np.isfinite(output.vectors).all()
        assert [stage.shape for stage in output.kept] == [(5, m) for m in tier.token_counts]


def test_kept_patches_are_original_indices_each_stage_within_the_last(
    demo: Bundle, engine: Engine
) -> None:
    *_, kept = zip(*engine.run(demo.tiers[0], PIXELS).kept, strict=True)
    before = set(range(196))
    for stage in kept:
        assert len(set(stage.tolist())) == len(stage)
        assert set(stage.tolist()) <= before
        before = set(stage.tolist())


def test_an_answer_does_not_depend_on_its_batch(demo: Bundle, engine: Engine) -> None:
    for tier in demo.tiers:
        together = engine.run(tier, PIXELS).vectors
        alone = np.concatenate([engine.run(tier, PIXELS[i : i + 1]).vectors for i in range(5)])
        np.testing.assert_allclose(together, alone, atol=1e-3)


def test_memory_does_not_creep_over_batch_sizes_and_tiers(demo: Bundle, engine: Engine) -> None:
    side = demo.image_size

    def rss_mb() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def every_size() -> float:
        for tier in (demo.tiers[0], demo.tiers[-1]):
            for batch in (8, 1, 5, 7):  # the largest first: the rest fits into it
                engine.run(tier, np.zeros((batch, side, side, 3), np.uint8))
        return rss_mb()

    first = every_size()
    after = [every_size() for _ in range(2)]
    assert after[-1] < 1.05 * first, (first, after)


def test_labels_that_do_not_fit_the_graph_are_told_at_start(demo: Bundle) -> None:
    manifest = demo.manifest.model_copy(update={"labels": demo.labels[:9]})
    with pytest.raises(StartError, match="computes 10 logits, but the manifest has 9"):
        load_engine("onnxruntime", replace(demo, manifest=manifest))


def test_features_that_do_not_fit_the_graph_are_told_at_start(demo: Bundle) -> None:
    vit = demo.manifest.models["vit"].model_copy(update={"answers": "features"})
    manifest = demo.manifest.model_copy(update={"labels": (), "models": {"vit": vit}})
    with pytest.raises(StartError, match="computes 10 features, but the manifest has 128"):
        load_engine("onnxruntime", replace(demo, manifest=manifest))


def test_an_int8_tier_runs_a_graph_of_its_own(demo: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "models" / "vit"
    shutil.copytree(demo.root / "models" / "vit", root)
    tiers = [
        tier.model_copy(update={"precision": precision, "name": f"{tier.name}-{precision}"})
        for tier in demo.tiers[:2]
        for precision in ("float32", "int8")
    ]
    manifest = demo.manifest.model_copy(update={"tiers": tuple(tiers)})
    served = replace(demo, root=tmp_path, manifest=manifest)
    with pytest.raises(StartError, match=r"elastic\.int8\.onnx"):
        OnnxRuntimeEngine(served)
    graph = onnx.load(root / "elastic.onnx", load_external_data=False)
    graph.graph.node.append(onnx.helper.make_node("Neg", [graph.graph.output[0].name], ["negated"]))
    graph.graph.output[0].name = "negated"  # distinguishes the two graphs here
    onnx.save(graph, root / "elastic.int8.onnx")
    engine = OnnxRuntimeEngine(served)
    for plain, quantised in ((tiers[0], tiers[1]), (tiers[2], tiers[3])):
        ours, theirs = engine.run(quantised, PIXELS), engine.run(plain, PIXELS)
        np.testing.assert_allclose(ours.vectors, -theirs.vectors, atol=1e-5)


def test_counts_that_do_not_fit_the_graph_are_told_at_start(demo: Bundle) -> None:
    tier = demo.tiers[0].model_copy(update={"token_counts": (400, 12, 3)})
    manifest = demo.manifest.model_copy(update={"tiers": (tier,)})
    with pytest.raises(StartError, match="does not run"):
        load_engine("onnxruntime", replace(demo, manifest=manifest))


def test_the_simulated_engine_takes_the_time_it_is_told_to(demo: Bundle) -> None:
    slept: list[float] = []
    simulated = SimulatedEngine(demo, seconds=lambda tier, n: n * tier.macs, sleep=slept.append)
    output = simulated.run(demo.tiers[0], PIXELS)
    assert slept == [5 * demo.tiers[0].macs]
    assert output.vectors.shape == (5, 10)
    assert [stage.shape for stage in output.kept] == [(5, m) for m in demo.tiers[0].token_counts]


def test_the_simulated_engine_answers_with_features_too(demo: Bundle) -> None:
    vit = demo.manifest.models["vit"].model_copy(update={"answers": "features"})
    manifest = demo.manifest.model_copy(update={"labels": (), "models": {"vit": vit}})
    simulated = SimulatedEngine(replace(demo, manifest=manifest), sleep=lambda _: None)
    assert simulated.run(demo.tiers[0], PIXELS).vectors.shape == (5, 128)


@pytest.mark.parametrize(("name", "extra"), [("onnx_cpu", "cpu"), ("onnx_cuda", "gpu")])
def test_a_missing_library_is_told_with_what_installs_it(
    demo: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.delitem(sys.modules, f"pcae_serve.engines.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(nvidia, "list_gpus", lambda: ["NVIDIA"])
    backend = "onnxruntime" if extra == "cpu" else "cuda"
    with pytest.raises(StartError, match=rf"onnxruntime is not installed: .*\[{extra}\]"):
        load_engine(backend, demo)


class Machine:
    """GPUs and GPU backends as a machine may have them; what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpus: list[str] | StartError = ["NVIDIA A", "NVIDIA B"]
        self.broken: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        monkeypatch.setattr(nvidia, "list_gpus", self._gpus)
        monkeypatch.setattr(loader, "_gpu_engine", self._engine)

    def _gpus(self) -> list[str]:
        if isinstance(self.gpus, StartError):
            raise self.gpus
        return self.gpus

    def _engine(self, name: str, served: Bundle, gpu: str, *_: object) -> Engine:
        self.asked.append((name, gpu))
        if name in self.broken:  # a bundle without graphs for TensorRT is such a reason, too
            raise (BundleError if name == "tensorrt" else StartError)(self.broken[name])
        engine = SimulatedEngine(served, gpu)
        engine.name = name
        return engine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Machine:
    caplog.set_level(logging.INFO)
    return Machine(monkeypatch)


BROKEN = {"tensorrt": "no plans", "cuda": "no libraries"}


@pytest.mark.parametrize(
    ("broken", "device", "chosen", "level", "words"),
    [
        ([], "auto", ("tensorrt", "cuda:0"), None, ""),
        ([], "cuda:1", ("tensorrt", "cuda:1"), None, ""),
        (["tensorrt"], "auto", ("cuda", "cuda:0"), "INFO", "tensorrt: no plans"),
        (["tensorrt"], "cuda:1", ("cuda", "cuda:1"), "INFO", "tensorrt: no plans"),
        (
            ["tensorrt", "cuda"], "auto", ("onnxruntime", "cpu"),
            "WARNING", "using the CPU: tensorrt: no plans; cuda: no libraries",
        ),
        ([], "cpu", ("onnxruntime", "cpu"), None, ""),
    ],
)  # fmt: skip
def test_auto_takes_the_first_backend_that_works_and_says_why(
    demo: Bundle,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    broken: list[str],
    device: str,
    chosen: tuple[str, str],
    level: str | None,
    words: str,
) -> None:
    machine.broken = {name: BROKEN[name] for name in broken}
    engine = load_engine("auto", demo, device, threads=1)
    assert (engine.name, engine.device) == chosen
    assert [record.levelname for record in caplog.records] == ([level] if level else [])
    assert words in caplog.text


@pytest.mark.parametrize(
    ("error", "providers", "level"),
    [
        (nvidia.NoGpu("no driver"), ["CPUExecutionProvider"], "INFO"),
        # the package, or image, for GPUs: somebody meant to have one
        (nvidia.NoGpu("no driver"), ["CUDAExecutionProvider", "CPUExecutionProvider"], "WARNING"),
        (StartError("the driver fails"), ["CPUExecutionProvider"], "WARNING"),
    ],
)
def test_a_machine_without_a_gpu_serves_on_its_cpu_and_one_that_should_have_it_warns(
    demo: Bundle,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: StartError,
    providers: list[str],
    level: str,
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    machine.gpus = error
    assert load_engine("auto", demo, threads=1).name == "onnxruntime"
    [record] = caplog.records
    assert str(error) in record.message
    assert record.levelname == level
    assert machine.asked == []


@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("tensorrt", "auto", "no plans"),
        ("cuda", "cuda:1", "no libraries"),
        ("auto", "cuda:1", "tensorrt: no plans; cuda: no libraries"),
        ("auto", "cuda:2", r"there is no cuda:2: the GPUs from cuda:0 are NVIDIA A, NVIDIA B"),
        ("cuda", "cuda:2", "there is no cuda:2"),
        ("cuda", "cpu", "backend cuda runs on a GPU; use --device cuda:0"),
        ("tensorrt", "cpu", "backend tensorrt runs on a GPU"),
        ("onnxruntime", "cuda:0", "runs on the CPU; use --backend cuda for cuda:0"),
    ],
)
def test_what_was_named_is_never_left_for_something_else(
    demo: Bundle,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    device: str,
    words: str,
) -> None:
    machine.broken = BROKEN
    with pytest.raises(StartError, match=words):
        load_engine(backend, demo, device)
    assert not caplog.records


@pytest.mark.parametrize("backend", ["auto", "cuda", "tensorrt"])
def test_a_named_gpu_without_a_driver(demo: Bundle, machine: Machine, backend: str) -> None:
    machine.gpus = nvidia.NoGpu("no driver")
    with pytest.raises(StartError, match="no driver"):
        load_engine(backend, demo, "cuda:0")
    assert machine.asked == []


def test_settings_name_the_engine(
    demo: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = list[object]()
    monkeypatch.setattr(nvidia, "list_gpus", lambda: ["NVIDIA"] * 4)

    def made(*args: object) -> Engine:
        asked.append(args)
        return SimulatedEngine(demo, sleep=lambda _: None)

    monkeypatch.setattr(loader, "_gpu_engine", made)
    settings = Settings(
        backend="cuda", device="cuda:3,cuda:1", max_batch=7, cache_dir=tmp_path, threads=2
    )
    load_configured_engine(settings, demo)
    load_configured_engine(settings, demo, "cuda:1")
    assert asked == [("cuda", demo, gpu, 7, tmp_path) for gpu in ("cuda:3", "cuda:1")]
    on_cpu = load_configured_engine(settings.model_copy(update={"backend": "auto"}), demo, "cpu")
    assert (on_cpu.device, on_cpu.threads) == ("cpu", 2)
