"""What a bundle or a backend cannot return."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pcae_serve.bundle.reader import load_bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.refusals import no_patches
from tests.support.bundles import backbone, write_bundle


def test_patches_need_a_dense_bundle_and_a_backend_that_returns_them(tmp_path: Path) -> None:
    plain = load_bundle(write_bundle(tmp_path / "plain", **backbone()))
    dense = load_bundle(write_bundle(tmp_path / "dense", **backbone(patch_width=6)))
    engine, other = SimulatedEngine(dense), SimpleNamespace(name="cuda", run=None)
    assert no_patches(dense, [engine]) is None
    assert "export it again with --dense" in str(no_patches(plain, [engine]))
    engines: list[Any] = [engine, other]
    assert "backend cuda does not return patches; use --backend" in str(no_patches(dense, engines))
