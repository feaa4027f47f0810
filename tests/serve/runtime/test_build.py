"""A service from settings alone."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from pcae_serve.bundle.reader import demo_path
from pcae_serve.errors import PcaeError
from pcae_serve.runtime.build import build_service
from pcae_serve.runtime.service import State
from pcae_serve.settings import Settings
from tests.support.bundles import write_bundle
from tests.support.hub import Hub


def test_there_is_one_engine_per_device_and_the_bundle_is_the_one_named(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle", name="mine")
    service = build_service(settings(bundle=bundle, backend="simulated", device="cuda:0,cuda:1"))
    assert service.state is State.STARTING
    assert service.bundle.manifest.name == "mine"
    assert service.device == "cuda:0, cuda:1"


def test_a_bundle_on_the_hub(
    settings: Callable[..., Settings], hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    commit = hub.add("me/b", write_bundle(tmp_path / "bundle", name="theirs")).commit("main")
    service = build_service(settings(bundle="hf://me/b", backend="simulated"))
    assert service.bundle.manifest.name == "theirs"
    assert f"bundle hf://me/b, commit {commit}" in caplog.messages
    assert service.bundle.root.is_relative_to(settings().cache_dir)
    with pytest.raises(PcaeError, match="hf://me/none: the hub has no model of this name"):
        build_service(settings(bundle="hf://me/none", backend="simulated"))


def test_a_reload_fetches_what_the_name_stands_for_now(
    settings: Callable[..., Settings], hub: Hub, tmp_path: Path
) -> None:
    async def scenario() -> tuple[str, str]:
        service = build_service(settings(bundle="hf://me/b", backend="simulated"))
        await service.start()
        hub.add("me/b", write_bundle(tmp_path / "new", name="new"))
        try:
            return (await service.reload()).bundle.manifest.name, service.bundle.manifest.name
        finally:
            await service.stop()

    hub.add("me/b", write_bundle(tmp_path / "old", name="old"))
    assert asyncio.run(scenario()) == ("new", "new")


def test_without_a_bundle_the_demo_is_served(settings: Callable[..., Settings]) -> None:
    service = build_service(settings(bundle=None, backend="simulated"))
    assert service.bundle.root == demo_path()
