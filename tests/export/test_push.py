"""`pcae-export push`, against a double of the hub."""

import json
import shutil
from pathlib import Path

import pytest

from pcae_export.commands import Export
from pcae_serve.bundle.reader import file_sha256, load_bundle
from pcae_serve.command import run
from pcae_serve.sources.locate import locate_bundle
from tests.support.bundles import write_bundle
from tests.support.exporting import fails
from tests.support.hub import Hub

pytestmark = pytest.mark.usefixtures("token")


@pytest.fixture
def token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = write_bundle(tmp_path / "toys", name="toys")
    (root / "README.md").write_text("# toys\n")
    manifest = json.loads((root / "bundle.json").read_text())
    manifest["files"]["README.md"] = file_sha256(root / "README.md")
    (root / "bundle.json").write_text(json.dumps(manifest))
    return root


def test_a_bundle_is_uploaded_and_comes_back(
    hub: Hub, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "notes.txt").write_text("not in the manifest")
    assert run(Export, ["push", str(bundle), "me/toys", "--private"]) == 0
    commit = hub.repositories["me/toys"].commit("main")
    assert capsys.readouterr().out.splitlines() == [
        f"uploaded {bundle} to hf://me/toys, commit {commit}",
        f"serve it with: pcae-serve --bundle hf://me/toys@{commit}",
    ]
    listed = {"bundle.json", *load_bundle(bundle).manifest.files}
    assert hub.repositories["me/toys"].revisions["main"].keys() == listed
    assert hub.repositories["me/toys"].private
    assert hub.repositories["me/toys"].revisions["main"]["README.md"] == b"# toys\n"
    lines: list[str] = []
    found = locate_bundle(f"hf://me/toys@{commit}", tmp_path / "cache", lines.append)
    assert load_bundle(found).digest == load_bundle(bundle).digest


def test_another_bundle_replaces_it(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    files = hub.add("me/toys", bundle).revisions["main"]
    manifest = json.loads(files["bundle.json"])
    manifest["files"]["models/vit/old.onnx"] = "0" * 64
    files |= {"bundle.json": json.dumps(manifest).encode(), "models/vit/old.onnx": b"old"}
    files |= {"LICENSE": b"mine", ".gitattributes": b""}
    assert run(Export, ["push", str(bundle), "hf://me/toys"]) == 0
    listed = {"bundle.json", *load_bundle(bundle).manifest.files}
    assert hub.repositories["me/toys"].revisions["main"].keys() == {
        *listed, "LICENSE", ".gitattributes",
    }  # fmt: skip


def test_other_files_are_kept_unless_forced(
    hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("me/model", {"model.safetensors": b"mine", "README.md": b"mine"})
    line = fails(capsys, 1, "push", bundle, "me/model")
    assert "hf://me/model has other files, such as model.safetensors, and no bundle.json" in line
    assert run(Export, ["push", str(bundle), "me/model", "--force"]) == 0
    files = hub.repositories["me/model"].revisions["main"]
    assert files["model.safetensors"] == b"mine"
    assert "bundle.json" in files


def test_what_cannot_be_uploaded(
    hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = shutil.copytree(bundle, bundle.with_name("damaged"))
    (damaged / "README.md").write_text("changed")
    for folder, name, message in (
        (bundle, "toys", "hf://toys is not a model on the hub"),
        (bundle, "me/toys/folder", "to a whole repository, not to hf://me/toys/folder"),
        (bundle.with_name("none"), "me/toys", "no bundle at"),
        (damaged, "me/toys", "was changed after export"),
        (bundle, "others/toys", "the hub refuses it (HTTP 403: no rights in this namespace"),
        (bundle, "me/toys@none", "has no branch, tag or commit 'none'"),
    ):
        assert message in fails(capsys, 1, "push", folder, name)
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert "rejects the token in HF_TOKEN" in fails(capsys, 1, "push", bundle, "me/toys")
    monkeypatch.delenv("HF_TOKEN")
    line = fails(capsys, 1, "push", bundle, "me/toys")
    assert line.endswith(
        "hf://me/toys: uploading needs a token; set HF_TOKEN to one that may write"
    )
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode is on" in fails(capsys, 1, "push", bundle, "me/toys")
    assert hub.repositories["me/toys"].revisions["main"] == {}
