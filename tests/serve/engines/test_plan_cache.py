import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pcae_serve.bundle.reader import Bundle, file_sha256, load_bundle
from pcae_serve.engines import plan_cache
from pcae_serve.engines.plan_cache import GpuTarget, Key, Plan, PlanParity, Recipe
from pcae_serve.errors import BundleError, StartError
from tests.support.bundles import manifest, write_bundle

TARGET = GpuTarget(
    library="tensorrt", version="11.4.0", gpu="NVIDIA Stand-in", compute_capability="9.0"
)
DATA = b"engine"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    root = write_bundle(tmp_path / "bundle")
    files = json.loads((root / "bundle.json").read_text())["files"]
    files |= {f"models/vit/{name}.tensorrt.onnx": "" for name in ("fast", "balanced", "full")}
    for path in files:
        if path.endswith("tensorrt.onnx"):
            graph = b"\x12" + bytes([len(path)]) + path.encode()  # names its producer: the path
            (root / path).write_bytes(graph)
            files[path] = file_sha256(root / path)
    (root / "bundle.json").write_text(json.dumps(manifest(files)))
    return load_bundle(root)


def written(cache: Path, key: Key, minutes: int = 0, data: bytes = DATA) -> Plan:
    """A plan of that key in the cache, built some minutes after noon."""
    plan_cache.plans_folder(cache).mkdir(parents=True, exist_ok=True)
    plan = Plan(
        key=key,
        sha256=plan_cache.digest(data),
        built=datetime(2026, 11, 24, 12, tzinfo=UTC) + timedelta(minutes=minutes),
        build_s=2.5,
        driver="13.1",
        shapes={"min": (1, 8, 8, 3), "opt": (8, 8, 8, 3), "max": (32, 8, 8, 3)},
        fused_attention=12,
        parity=PlanParity(
            images=64,
            data_set="toys",
            measure="top-1 agreement",
            value=1.0,
            largest_difference=0.01,
            same_patches=0.99,
        ),
    )
    plan_cache.write_plan(cache, plan, data)
    return plan


def test_buckets_are_powers_of_two_and_the_largest_batch() -> None:
    assert plan_cache.batch_buckets(1) == (1,)
    assert plan_cache.batch_buckets(2) == (1, 2)
    assert plan_cache.batch_buckets(24) == (1, 2, 4, 8, 16, 24)
    assert plan_cache.batch_buckets(32) == (1, 2, 4, 8, 16, 32)


def test_what_is_written_is_found_and_read(bundle: Bundle, tmp_path: Path) -> None:
    key = plan_cache.make_key(bundle, bundle.tiers[0], TARGET, Recipe())
    plan = written(tmp_path, key)
    assert plan_cache.load_plan(tmp_path, key) == plan
    assert plan_cache.find_plan(tmp_path, bundle, bundle.tiers[0], TARGET, 32) == plan
    assert plan_cache.read_plan(tmp_path, plan) == DATA
    names = {file.name for file in plan_cache.plans_folder(tmp_path).iterdir()}
    assert names == {f"{key.name}.plan", f"{key.name}.json"}  # nothing half-written


@pytest.mark.parametrize(
    "change",
    [
        {"bundle": "another"},
        {"tier": "full"},
        {"graph": "another"},
        {"target": TARGET.model_copy(update={"version": "11.5.0"})},
        {"target": TARGET.model_copy(update={"library": "tensorrt_rtx"})},
        {"target": TARGET.model_copy(update={"gpu": "NVIDIA L4"})},
        {"recipe": Recipe(max_batch=16)},
        {"recipe": Recipe(optimization_level=5)},
    ],
    ids=str,
)
def test_a_key_changes_with_everything_a_plan_depends_on(
    bundle: Bundle, change: dict[str, Any]
) -> None:
    key = plan_cache.make_key(bundle, bundle.tiers[0], TARGET, Recipe())
    assert key.model_copy(update=change).name != key.name
    assert key.model_copy().name == key.name


@pytest.mark.parametrize(
    "change",
    [
        {"bundle": "another"},
        {"tier": "full"},
        {"graph": "another"},
        {"target": TARGET.model_copy(update={"gpu": "NVIDIA L4"})},
    ],
    ids=str,
)
def test_a_plan_of_something_else_is_not_found(
    bundle: Bundle, tmp_path: Path, change: dict[str, Any]
) -> None:
    tier = bundle.tiers[0]
    written(tmp_path, plan_cache.make_key(bundle, tier, TARGET, Recipe()).model_copy(update=change))
    with pytest.raises(StartError, match=r"no TensorRT plan of tier 'fast' .*run 'pcae-export"):
        plan_cache.find_plan(tmp_path, bundle, tier, TARGET)


def test_the_newest_plan_that_takes_the_batch_is_found(bundle: Bundle, tmp_path: Path) -> None:
    def key(**recipe: int) -> Key:
        return plan_cache.make_key(bundle, bundle.tiers[0], TARGET, Recipe(**recipe))

    written(tmp_path, key(max_batch=64), minutes=0)
    later = written(tmp_path, key(max_batch=64, optimization_level=5), minutes=1)
    written(tmp_path, key(max_batch=16), minutes=2)
    assert plan_cache.find_plan(tmp_path, bundle, bundle.tiers[0], TARGET, 32) == later
    with pytest.raises(StartError, match="takes batches of at most 64 images, not 128; serve with"):
        plan_cache.find_plan(tmp_path, bundle, bundle.tiers[0], TARGET, 128)


def test_a_damaged_plan_is_told_and_a_damaged_sidecar_is_none(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = plan_cache.make_key(bundle, bundle.tiers[0], TARGET, Recipe())
    plan = written(tmp_path, key)
    (plan_cache.plans_folder(tmp_path) / f"{key.name}.plan").write_bytes(DATA[:-1])
    with pytest.raises(StartError, match=r"is damaged .*; run 'pcae-export tensorrt'"):
        plan_cache.read_plan(tmp_path, plan)
    (plan_cache.plans_folder(tmp_path) / f"{key.name}.plan").unlink()
    with pytest.raises(StartError, match="cannot read"):
        plan_cache.read_plan(tmp_path, plan)
    (plan_cache.plans_folder(tmp_path) / f"{key.name}.json").write_text("{")
    assert plan_cache.load_plan(tmp_path, key) is None
    assert "ignoring its plan" in caplog.text


def test_a_write_that_fails_leaves_neither_plan_nor_sidecar(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = plan_cache.make_key(bundle, bundle.tiers[0], TARGET, Recipe())
    plan = written(tmp_path, key)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        plan_cache.write_plan(tmp_path, plan, b"another")
    assert plan_cache.load_plan(tmp_path, key) is None
    assert not list(plan_cache.plans_folder(tmp_path).glob("*.part"))


def test_a_bundle_without_graphs_for_tensorrt_is_told(bundle_dir: Path, tmp_path: Path) -> None:
    bundle = load_bundle(bundle_dir)
    with pytest.raises(BundleError, match=r"has no fast\.tensorrt\.onnx"):
        plan_cache.find_plan(tmp_path, bundle, bundle.tiers[0], TARGET)
