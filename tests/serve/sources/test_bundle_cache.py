"""Bundles on the hub, in the cache folder of the server."""

import hashlib
import os
from pathlib import Path

import pytest

from pcae_serve.bundle.reader import demo_path, load_bundle
from pcae_serve.sources import bundle_cache
from pcae_serve.sources.bundle_cache import keep_bundle
from pcae_serve.sources.locate import locate_bundle
from pcae_serve.sources.names import FetchError
from tests.support.bundles import write_bundle
from tests.support.hub import Hub

NAME = "me/bundle"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "made")


def locate(name: str, cache: Path) -> Path:
    lines: list[str] = []
    return locate_bundle(name, cache, lines.append)


def test_a_bundle_is_fetched_and_sealed(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    hub.add(NAME, bundle).revisions["main"]["other.bin"] = b"not in the manifest"
    cache = tmp_path / "cache"
    lines: list[str] = []
    found = locate_bundle(f"hf://{NAME}", cache, lines.append)
    assert load_bundle(found).digest == load_bundle(bundle).digest == found.name
    assert lines == [f"hf://{NAME}, commit {hub.repositories[NAME].commit('main')}"]
    assert "other.bin" not in hub.fetched()
    assert not [file for file in found.rglob("*") if file.is_symlink()]
    files = [file for file in found.rglob("*") if file.is_file()]
    assert {file.stat().st_nlink for file in files} == {2}  # no space is taken twice
    assert {path.name for path in found.parent.iterdir()} == {found.name}


@pytest.mark.slow
def test_the_demo_s_graphs_hold_their_references(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, demo_path())
    assert (
        load_bundle(locate(f"hf://{NAME}@main", tmp_path)).tiers == load_bundle(demo_path()).tiers
    )


def test_a_bundle_in_a_folder_of_a_repository(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    repository = hub.add(NAME, bundle)
    files = repository.revisions["main"]
    repository.revisions["main"] = {f"small/{name}": body for name, body in files.items()}
    assert load_bundle(locate(f"hf://{NAME}/small", tmp_path)).digest == load_bundle(bundle).digest
    with pytest.raises(FetchError, match=r"hf://me/bundle: there is no bundle\.json, so it is not"):
        locate(f"hf://{NAME}", tmp_path)


def test_offline_and_pinned(
    hub: Hub, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(NAME, bundle).commit("main")
    found = locate(f"hf://{NAME}@{commit}", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate(f"hf://{NAME}@{commit}", tmp_path / "cache") == found


def test_another_file_system_gets_a_copy(
    hub: Hub, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    hub.add(NAME, bundle)
    found = locate(f"hf://{NAME}", tmp_path / "cache")
    assert load_bundle(found).digest == load_bundle(bundle).digest


def test_a_copy_that_lacks_a_file_is_replaced(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    hub.add(NAME, bundle)
    found = locate(f"hf://{NAME}", tmp_path)
    next(found.rglob("*.onnx")).unlink()
    assert locate(f"hf://{NAME}", tmp_path) == found
    load_bundle(found)


def test_nothing_incomplete_is_left(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f.relative_to(bundle).as_posix(): f for f in bundle.rglob("*") if f.is_file()}
    digest = hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bundle_cache, "_link", full)
        with pytest.raises(FetchError, match=r"cannot keep the bundle in .* \(No space left"):
            keep_bundle(files, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "bundles").iterdir())
    assert keep_bundle(files, tmp_path / "cache").name == digest


def test_names_of_bundles(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server asks no hub because of a mistyped path."""
    monkeypatch.chdir(tmp_path)
    assert locate("bundles", tmp_path) == Path("bundles")
    assert locate("./bundles/two", tmp_path) == Path("bundles/two")
    with pytest.raises(FetchError, match=r"^no bundle at bundles/two: .* write hf://bundles/two"):
        locate("bundles/two", tmp_path)
    assert not hub.requests
    Path("bundles/two").mkdir(parents=True)
    assert locate("bundles/two", tmp_path) == Path("bundles/two")
