"""A service from settings alone."""

from collections.abc import Callable
from pathlib import Path

from pcae_serve.bundle.reader import demo_path
from pcae_serve.runtime.build import build_service
from pcae_serve.runtime.service import State
from pcae_serve.settings import Settings
from tests.support.bundles import write_bundle


def test_there_is_one_engine_per_device_and_the_bundle_is_the_one_named(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle", name="mine")
    service = build_service(settings(bundle=bundle, backend="simulated", device="cuda:0,cuda:1"))
    assert service.state is State.STARTING
    assert service.bundle.manifest.name == "mine"
    assert service.device == "cuda:0, cuda:1"


def test_without_a_bundle_the_demo_is_served(settings: Callable[..., Settings]) -> None:
    service = build_service(settings(bundle=None, backend="simulated"))
    assert service.bundle.root == demo_path()
