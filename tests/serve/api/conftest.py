"""Servers in process, shared by the tests of a module: no port, no graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pcae_serve.bundle.reader import load_bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from tests.support.apps import quick, serving
from tests.support.bundles import backbone, manifest, write_bundle


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server whose model answers with 4 classes, on three tiers of 10, 20 and 40 ms."""
    with _served(tmp_path_factory.mktemp("classes")) as client:
        yield client


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server whose model has no head and answers with 8 features."""
    models = {"vit": manifest({})["models"]["vit"] | {"answers": "features"}}
    with _served(tmp_path_factory.mktemp("features"), labels=[], models=models) as client:
        yield client


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The same with patch grids [4, 4, 6]; the state of a patch is its number, from 1."""
    with _served(tmp_path_factory.mktemp("dense"), **backbone(patch_width=6)) as client:
        yield client


@pytest.fixture(scope="module")
def multi_label(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server whose model gives 4 independent labels."""
    models = {"vit": manifest({})["models"]["vit"] | {"answers": "labels"}}
    with _served(tmp_path_factory.mktemp("labels"), models=models) as client:
        yield client


@contextmanager
def _served(folder: Path, **changes: Any) -> Iterator[TestClient]:
    served = load_bundle(write_bundle(folder / "bundle", **changes))
    known = Settings(cache_dir=folder, profile_s=0.1, max_body_mb=0.1, budget_ms=20_000)
    engine = SimulatedEngine(served, seconds=quick)
    with serving(Service(known, served, [engine])) as client:
        yield client


@pytest.fixture(scope="module")
def instant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("instant")
    served = load_bundle(write_bundle(root / "bundle"))
    engine = SimulatedEngine(served, seconds=lambda tier, _: tier.macs * 1e-7)
    # time enough on a slow machine: what is late is not what is looked for
    known = Settings(cache_dir=root, profile_s=0.1, budget_ms=20_000, policy="nexus:fast")
    with serving(Service(known, served, [engine])) as client:
        yield client
