from dataclasses import replace

import numpy as np
import pytest

from pcae_serve import bundle, engines
from pcae_serve.bundle import Bundle
from pcae_serve.engines.onnx_runtime import OnnxRuntimeEngine
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import StartError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8)


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return bundle.load(bundle.demo())


@pytest.fixture(scope="module")
def engine(demo: Bundle) -> engines.Engine:
    return engines.load("auto", demo, "cpu")


def test_one_session_serves_every_tier(demo: Bundle, engine: engines.Engine) -> None:
    for tier in demo.tiers:
        output = engine.run(tier, PIXELS)
        assert output.vectors.shape == (5, 10)
        assert output.vectors.dtype == np.float32
        assert np.isfinite(output.vectors).all()
        assert [stage.shape for stage in output.kept] == [(5, m) for m in tier.token_counts]


def test_kept_patches_are_original_indices_each_stage_within_the_last(
    demo: Bundle, engine: engines.Engine
) -> None:
    *_, kept = zip(*engine.run(demo.tiers[0], PIXELS).kept, strict=True)
    before = set(range(196))
    for stage in kept:
        assert len(set(stage.tolist())) == len(stage)
        assert set(stage.tolist()) <= before
        before = set(stage.tolist())


def test_an_answer_does_not_depend_on_its_batch(demo: Bundle, engine: engines.Engine) -> None:
    for tier in demo.tiers:
        together = engine.run(tier, PIXELS).vectors
        alone = np.concatenate([engine.run(tier, PIXELS[i : i + 1]).vectors for i in range(5)])
        np.testing.assert_allclose(together, alone, atol=1e-3)


def test_a_device_that_is_not_served_is_told(demo: Bundle) -> None:
    with pytest.raises(StartError, match="cuda:0"):
        engines.load("onnxruntime", demo, "cuda:0")


def test_labels_that_do_not_fit_the_graph_are_told_at_start(demo: Bundle) -> None:
    manifest = demo.manifest.model_copy(update={"labels": demo.labels[:9]})
    with pytest.raises(StartError, match="10 classes, but the bundle names 9"):
        OnnxRuntimeEngine(replace(demo, manifest=manifest))


def test_counts_that_do_not_fit_the_graph_are_told_at_start(demo: Bundle) -> None:
    tier = demo.tiers[0].model_copy(update={"token_counts": (400, 12, 3)})
    manifest = demo.manifest.model_copy(update={"tiers": (tier,)})
    with pytest.raises(StartError, match="does not run"):
        OnnxRuntimeEngine(replace(demo, manifest=manifest))


def test_the_simulated_engine_takes_the_time_it_is_told_to(demo: Bundle) -> None:
    slept: list[float] = []
    simulated = SimulatedEngine(demo, seconds=lambda tier, n: n * tier.macs, sleep=slept.append)
    output = simulated.run(demo.tiers[0], PIXELS)
    assert slept == [5 * demo.tiers[0].macs]
    assert output.vectors.shape == (5, 10)
    assert [stage.shape for stage in output.kept] == [(5, m) for m in demo.tiers[0].token_counts]
