"""TensorRT plans: built by TensorRT-RTX, which needs no GPU, and run by a stand-in."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_export import tensorrt_plans
from pcae_export.cpu_session import run_graph
from pcae_export.tensorrt_plans import PlanBuilder, PlanError, TensorRt, build_plan, compare_outputs
from pcae_serve import atomic
from pcae_serve.bundle.manifest import ELASTIC_GRAPH, Tier
from pcae_serve.bundle.reader import Bundle, demo_path, file_sha256, load_bundle
from pcae_serve.command import config, run
from pcae_serve.engines import nvidia, plan_cache, tensorrt
from pcae_serve.engines.base import Output
from pcae_serve.engines.cuda_runtime import find_gpu
from pcae_serve.engines.plan_cache import Recipe
from pcae_serve.engines.tensorrt import Library, TensorRtEngine
from pcae_serve.errors import PcaeError
from tests.support import tensorrt_standin
from tests.support.cuda_standin import Runtime

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 3), np.uint8)
RECIPE = Recipe(opt_batch=2, max_batch=4)


class Command(BaseSettings):
    """The command as pcae-export has it."""

    model_config = config("pcae-export")

    tensorrt: CliSubCommand[TensorRt]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tensorrt_standin.demo_with_graphs(
        tmp_path_factory.mktemp("demo") / "bundle", float32=True, tiers=3
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo bundle with the graphs that it ships for TensorRT."""
    return tensorrt_standin.demo_with_graphs(
        tmp_path_factory.mktemp("demo") / "bundle", float32=False
    )


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> tensorrt_standin.TensorRt:
    return tensorrt_standin.install(monkeypatch)


@pytest.fixture
def builder(bundle: Bundle, trt: tensorrt_standin.TensorRt, tmp_path: Path) -> PlanBuilder:
    return PlanBuilder(
        bundle, tensorrt.load_library(), find_gpu("cuda:0"), RECIPE, tmp_path, PIXELS, "noise"
    )


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Library:
    """TensorRT-RTX itself, even if TensorRT is installed."""
    pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    return tensorrt.load_library()


def reference(bundle: Bundle, tier: Tier) -> NDArray[np.float32]:
    """ONNX Runtime's float32 logits [N, classes] for PIXELS."""
    return run_graph(bundle.file(tier.model, ELASTIC_GRAPH), PIXELS, tier.token_counts).vectors


# with TensorRT-RTX


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "fast")) for n in (
        "fast", "brisk", "balanced", "careful", "full")]
)  # fmt: skip
def test_tensorrt_rtx_builds_every_tier(real: Bundle, rtx: Library, name: str) -> None:
    tier = next(tier for tier in real.tiers if tier.name == name)
    built = build_plan(rtx, real, tier, Recipe(), None)
    assert len(built.data) > 1_000_000
    assert built.outputs == {"logits": ("float32", (10,))} | {
        f"kept_{i}": ("int32", (count,)) for i, count in enumerate(tier.token_counts)
    }
    assert built.shapes == {
        "min": (1, 28, 28, 3), "opt": (8, 28, 28, 3), "max": (32, 28, 28, 3)
    }  # fmt: skip
    if f"models/{tier.model}/{tier.tensorrt_graph}" in load_bundle(demo_path()).manifest.files:
        assert built.fused_attention == real.manifest.models[tier.model].depth


def test_a_graph_that_tensorrt_cannot_read_is_one_line(
    real: Bundle, rtx: Library, tmp_path: Path
) -> None:
    tier = real.tiers[0]
    spoilt = replace(real, root=tmp_path)
    graph = plan_cache.find_graph(spoilt, tier)
    graph.parent.mkdir(parents=True)
    graph.write_bytes(b"no graph")
    with pytest.raises(PlanError, match=r"tensorrt_rtx 1.* cannot read .*onnx: ") as caught:
        build_plan(rtx, spoilt, tier, Recipe(), None)
    assert "\n" not in str(caught.value)


# with the stand-in


def test_what_the_command_built_the_server_runs(
    bundle: Bundle,
    trt: tensorrt_standin.TensorRt,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["tensorrt", str(bundle.root), "--cache-dir", str(tmp_path), "--parity-images", "64"]
    argv += ["--max-batch", "4", "--opt-batch", "2"]
    assert run(Command, argv) == 0
    out = capsys.readouterr().out
    assert out.count("built in") == 3
    assert "top-1 agreement 1.0000 on 64 images of generated images" in out
    assert "1 of 12 attention blocks fused" in out
    assert trt.cuda.left() == 0
    engine = TensorRtEngine(bundle, "cuda:0", tmp_path, 4)
    for tier in bundle.tiers:
        expected = reference(bundle, tier)[:3]
        np.testing.assert_allclose(engine.run(tier, PIXELS[:3]).vectors, expected, atol=1e-3)
    engine.close()
    assert run(Command, argv) == 0
    assert capsys.readouterr().out.count("already cached") == 3
    assert len(trt.configs) == 3


def test_a_dry_run_needs_no_gpu_and_keeps_nothing(
    bundle: Bundle,
    trt: tensorrt_standin.TensorRt,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    monkeypatch.setattr(nvidia, "list_gpus", lambda: pytest.fail("asks for a GPU"))
    argv = ["tensorrt", str(bundle.root), "--dry-run", "--cache-dir", str(tmp_path / "cache")]
    assert run(Command, argv) == 0
    assert capsys.readouterr().out.count("with tensorrt_rtx 11.4.0: ") == 3
    assert not (tmp_path / "cache").exists()


def test_the_sidecar_tells_all(builder: PlanBuilder, bundle: Bundle) -> None:
    tier = bundle.tiers[0]
    plan, new = builder.ensure(tier)
    assert new
    file = plan_cache.plans_folder(builder.cache_dir) / f"{plan.key.name}.json"
    sidecar = json.loads(file.read_text())
    assert sidecar["key"] == {
        "bundle": bundle.digest,
        "tier": "fast",
        "graph": file_sha256(plan_cache.find_graph(bundle, tier)),
        "target": {
            "library": "tensorrt",
            "version": tensorrt_standin.VERSION,
            "gpu": tensorrt_standin.GPU,
            "compute_capability": "9.0",
        },
        "recipe": {
            "opt_batch": 2,
            "max_batch": 4,
            "optimization_level": 3,
            "workspace_mb": 4096,
        },
    }
    assert sidecar["driver"] == "13.1"
    assert sidecar["shapes"]["max"] == [4, 28, 28, 3]
    assert sidecar["parity"]["images"] == 8
    assert sidecar["sha256"] == file_sha256(file.with_suffix(".plan"))


def test_a_plan_is_built_once_and_anew_where_its_key_changes(
    builder: PlanBuilder, bundle: Bundle, trt: tensorrt_standin.TensorRt
) -> None:
    tier = bundle.tiers[0]
    first, _ = builder.ensure(tier)
    assert builder.ensure(tier) == (first, False)
    assert replace(builder, recipe=Recipe(opt_batch=1, max_batch=4)).ensure(tier)[1]
    assert replace(builder, bundle=replace(bundle, digest="another")).ensure(tier)[1]
    assert replace(builder, gpu=builder.gpu._replace(name="NVIDIA L4")).ensure(tier)[1]
    assert len(trt.configs) == 4
    assert trt.configs[0].pools == {trt.MemoryPoolType.WORKSPACE: 4096 << 20}
    assert trt.configs[0].builder_optimization_level == 3


@pytest.mark.parametrize("damage", ["bytes", "sidecar", "engine"])
def test_a_damaged_plan_is_built_anew(builder: PlanBuilder, bundle: Bundle, damage: str) -> None:
    tier = bundle.tiers[0]
    first, _ = builder.ensure(tier)
    target = plan_cache.plans_folder(builder.cache_dir) / first.key.name
    if damage == "bytes":
        target.with_suffix(".plan").write_bytes(b"plan{")
    elif damage == "sidecar":
        target.with_suffix(".json").write_text("{")
    else:  # whole, but TensorRT does not take it
        rubbish = first.model_copy(update={"sha256": plan_cache.digest(b"rubbish")})
        plan_cache.write_plan(builder.cache_dir, rubbish, b"rubbish")
    again, new = builder.ensure(tier)
    assert new
    assert again.sha256 == first.sha256
    assert builder.ensure(tier) == (again, False)


def test_a_plan_that_answers_wrong_is_not_kept(
    bundle: Bundle,
    trt: tensorrt_standin.TensorRt,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trt.wrong = True
    argv = ["tensorrt", str(bundle.root), "--cache-dir", str(tmp_path), "--parity-images", "64"]
    assert run(Command, [*argv, "--max-batch", "2", "--opt-batch", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "tier 'fast': the plan's top-1 agreement with ONNX Runtime is" in error
    assert not [
        *plan_cache.plans_folder(tmp_path).glob("*.plan"),
        *plan_cache.plans_folder(tmp_path).glob("*.json"),
    ]
    assert trt.cuda.left() == 0


def test_a_build_that_fails_says_why_in_one_line(
    builder: PlanBuilder, bundle: Bundle, trt: tensorrt_standin.TensorRt
) -> None:
    trt.cannot_build = True
    with pytest.raises(PlanError, match=r"cannot build .*: no kernel for node TopK_3$"):
        builder.ensure(bundle.tiers[0])


def test_timings_go_from_one_build_to_the_next_and_foreign_ones_are_dropped(
    builder: PlanBuilder, bundle: Bundle
) -> None:
    builder.ensure(bundle.tiers[0])
    (file,) = plan_cache.plans_folder(builder.cache_dir).glob("*.timings")
    assert file.read_bytes() == b"timings:"
    builder.ensure(bundle.tiers[1])
    assert file.read_bytes() == b"timings:timings:"
    file.write_bytes(b"of another version")
    builder.ensure(bundle.tiers[2])
    assert file.read_bytes() == b"timings:"


def test_of_two_that_want_a_plan_one_builds_it(
    builder: PlanBuilder,
    bundle: Bundle,
    trt: tensorrt_standin.TensorRt,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tier = bundle.tiers[0]
    key = plan_cache.make_key(bundle, tier, builder.library.target(builder.gpu), RECIPE)
    folder = plan_cache.plans_folder(builder.cache_dir)
    folder.mkdir()
    other = FileLock(folder / f"{key.name}.lock", thread_local=False)
    with ThreadPoolExecutor(1) as pool:
        with other:
            waiting = pool.submit(builder.ensure, tier)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            made = builder._build(key, tier)
        assert waiting.result(timeout=30) == (made, False)
    assert "waiting for another process to build it" in capsys.readouterr().out
    assert len(trt.configs) == 1


@pytest.mark.parametrize("broken", ["file", "full"])
def test_a_cache_that_cannot_be_written_is_told(
    builder: PlanBuilder, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "file":
        plan_cache.plans_folder(builder.cache_dir).write_text("no folder")
        reason = "File exists"
    else:

        def full(path: Path, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(atomic, "write_file", full)
        reason = "No space left on device"
    with pytest.raises(PcaeError, match=rf"cannot write the plan .* \({reason}\); choose another"):
        builder.ensure(bundle.tiers[0])


def test_what_is_missing_is_one_line(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> list[str]:
        raise nvidia.NoGpu("no NVIDIA driver here")

    monkeypatch.setattr(nvidia, "list_gpus", none)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_standin.TensorRt(Runtime()))
    for argv in ([], ["--dry-run"]):  # the real builder crashes without a GPU
        assert run(Command, ["tensorrt", str(bundle.root), *argv]) == 1
        assert capsys.readouterr().err == "pcae-export: no NVIDIA driver here\n"
    for package in tensorrt.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    assert run(Command, ["tensorrt", str(bundle.root)]) == 1
    assert "TensorRT is not installed: pip install" in capsys.readouterr().err


def test_wrong_flags_are_told(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Command, ["tensorrt", str(bundle.root), "--max-batch", "4"]) == 2
    assert "--opt-batch 8 is above --max-batch 4" in capsys.readouterr().err
    assert run(Command, ["tensorrt", str(bundle.root), "--parity-images", "8"]) == 2


@pytest.mark.gpu
def test_on_a_gpu(real: Bundle, tmp_path: Path) -> None:
    assert run(Command, ["tensorrt", str(real.root), "--cache-dir", str(tmp_path)]) == 0
    engine = TensorRtEngine(real, "cuda:0", tmp_path)
    for tier in real.tiers:
        expected = reference(real, tier)
        for batch in (1, 3, 8):
            found = engine.run(tier, PIXELS[:batch])
            np.testing.assert_allclose(found.vectors, expected[:batch], atol=0.1)
    engine.close()


# parity


@contextmanager
def no_error() -> Iterator[None]:
    yield


def answers(vectors: NDArray[Any], kept: NDArray[Any] | None = None) -> Output:
    return Output(vectors.astype(np.float32), () if kept is None else (kept.astype(np.int32),))


@pytest.mark.parametrize(("wrong", "passes"), [(0, True), (1, True), (2, False), (256, False)])
def test_one_image_in_two_hundred_may_change_class(
    bundle: Bundle, wrong: int, passes: bool
) -> None:
    theirs = np.tile(np.arange(10), (256, 1))
    ours = theirs.copy()
    ours[:wrong] = ours[:wrong, ::-1]
    with no_error() if passes else pytest.raises(PlanError, match=r"below 0\.995"):
        parity = compare_outputs(
            bundle, bundle.tiers[0], answers(ours), answers(theirs), 256, "toys"
        )
        assert parity.value == 1 - wrong / 256


def test_no_number_is_no_agreement(bundle: Bundle) -> None:
    theirs = np.tile(np.arange(10), (256, 1))
    ours = theirs.astype(np.float32)
    ours[:, 9] = np.nan
    with pytest.raises(PlanError, match=r"is 0\.0000"):
        compare_outputs(bundle, bundle.tiers[0], answers(ours), answers(theirs), 256, "toys")


@pytest.mark.parametrize(("noise", "passes"), [(0.001, True), (0.3, False), (np.nan, False)])
def test_features_are_judged_by_their_cosine(bundle: Bundle, noise: float, passes: bool) -> None:
    models = {
        name: model.model_copy(update={"answers": "features"})
        for name, model in bundle.manifest.models.items()
    }
    changes = {"models": models, "labels": ()}
    headless = replace(bundle, manifest=bundle.manifest.model_copy(update=changes))
    theirs = np.random.default_rng(0).standard_normal((64, 192))
    ours = theirs + noise * np.random.default_rng(1).standard_normal((64, 192))
    with no_error() if passes else pytest.raises(PlanError, match="mean cosine"):
        parity = compare_outputs(
            headless, bundle.tiers[0], answers(ours), answers(theirs), 64, "toys"
        )
        assert parity.measure == "mean cosine"
        assert 0 < parity.largest_difference < 0.01


def test_patches_alike_are_counted_in_any_order(bundle: Bundle) -> None:
    vectors = np.tile(np.arange(10), (2, 1))
    ours = answers(vectors, np.array([[3, 1, 2, 0], [4, 5, 6, 7]]))
    theirs = answers(vectors, np.array([[0, 1, 2, 3], [6, 7, 8, 9]]))
    assert compare_outputs(bundle, bundle.tiers[0], ours, theirs, 2, "toys").same_patches == 0.75


@pytest.mark.parametrize(("images", "sizes"), [(64, (1, 2, 4, 8)), (5, (1, 2, 4, 8)), (8, (1,))])
def test_every_image_and_every_bucket_is_run(images: int, sizes: tuple[int, ...]) -> None:
    batches = list(tensorrt_plans._batches(images, sizes))
    assert {len(rows) for rows in batches} >= set(sizes)
    assert set(np.concatenate(batches)) == set(range(images))
