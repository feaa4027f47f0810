"""`pcae-export bundle` with checkpoints on the hub, against its double."""

from pathlib import Path
from typing import Any

import pytest

from pcae_export.commands import Export
from pcae_export.source import SourceOverrides, locate_source, read_source
from pcae_export.verify import MIN_IMAGES
from pcae_serve.command import run
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from tests.export.conftest import Made, make_tiny
from tests.support.exporting import bundled, fails
from tests.support.hub import Hub

NAME = "facebook/dinov2-small"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    checkpoints.save(make_tiny(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_name_in_place_of_a_path(
    hub: Hub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add(NAME, checkpoint).commit("main")
    line = f"hf://{NAME}, commit {commit}"
    tiers = ("--tier", "low=0.6", "--tier", f"high={NAME}@1.0", "--half", "none")
    made = bundled(Path(NAME), tmp_path / "out", *tiers)
    assert capsys.readouterr().err.splitlines()[0] == line
    assert f"\n\nMade from {line}.\n\n" in (made.root / "README.md").read_text()
    assert list(made.manifest.models) == ["vit"]  # SOURCE and the tier's are the same one
    assert made.manifest.labels


def test_what_fails_leaves_nothing(
    hub: Hub,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    hub.add(NAME, checkpoint, broken="model.safetensors")
    hub.add("me/configs", {"config.json": b"{}"})
    out = tmp_path / "new" / "out"
    for source, message in (
        (f"hf://{NAME}", f"hf://{NAME}: cannot reach the hub"),
        ("hf://me/configs", "hf://me/configs: there are no weights"),
        ("hf://me/none", "hf://me/none: the hub has no model of this name"),
        ("me/none", "checkpoint not found: me/none does not exist here; as a name on the hub, "),
        (f"hf://{NAME}@old", "has no branch, tag or commit 'old'"),
        ("me/none.pth", "checkpoint not found: me/none.pth does not exist"),
    ):
        assert message in fails(capsys, 1, "bundle", source, out)
        assert not out.parent.exists()
    message = fails(capsys, 2, "bundle", checkpoint, "hf://me/new")
    assert message == "pcae-export: OUT is a local folder, not hf://me/new"


def test_an_output_that_exists_is_refused_before_the_download(
    hub: Hub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME, checkpoint)
    assert "exists; choose another folder" in fails(capsys, 1, "bundle", NAME, tmp_path)
    assert not hub.requests


def test_remote_code_is_never_fetched(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / "modeling_own.py").write_text("raise SystemExit('ran')")
    hub.add(NAME, checkpoint)
    path, _ = locate_source(f"hf://{NAME}")
    assert not list(path.glob("*.py"))
    assert read_source(path, SourceOverrides()).checkpoint.labels
    hub.add(NAME, {"config.json": b'{"auto_map": {}}', "model.safetensors": b"?"})
    with pytest.raises(PcaeError):
        read_source(locate_source(f"hf://{NAME}")[0], SourceOverrides())


def test_a_bundle_by_name_is_verified(
    hub: Hub, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("PCAE_CACHE_DIR", str(tmp_path / "cache"))
    hub.add("me/toys", made.bundle.root)
    assert run(Export, ["verify", "hf://me/toys", "--images", str(MIN_IMAGES)]) == 0
    printed = capfd.readouterr()
    assert "hf://me/toys, model vit: parity holds" in printed.out
    assert "hf://me/toys, commit " in printed.err
    assert (tmp_path / "cache" / "bundles" / made.bundle.digest).is_dir()
