"""pcae-export: what it prints, and the one line and exit code of each failure."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pcae_export.cli import Export
from pcae_serve.command import run


def fails(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    """Run, expect one line on stderr and that exit code; the line."""
    assert run(Export, [str(word) for word in argv]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "pcae-export:" in line]  # beside progress bars
    assert len(lines) == 1
    return lines[0]


def test_verify_proves_a_bundle_again(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Export, ["verify", str(made.bundle.root), "--eval-data", str(made.data)]) == 0
    out = capsys.readouterr().out
    assert "parity holds: 64 images" in out
    assert "full         1     64, 64, 64" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tier", "fast"], "'fast' is no NAME=RATIO"),
        (["--tier", "Fast=0.5"], "'Fast=0.5' is no NAME=RATIO"),
        (["--tier", "fast=1.5"], "keep ratio must be in"),
        (["--tier", "fast=nan"], "keep ratio must be a number"),
        (["--tier", "auto=0.5"], "no tier may be named 'auto'"),
        (["--tier", "elastic=0.5"], "no tier may be named 'elastic'"),
        (["--tier", "a=0.5", "--tier", "a=0.6"], "tier 'a' is given twice"),
        (["--limit", "0"], "--limit"),
        (["--parity-images", "63"], "--parity-images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    argv = ["bundle", made.checkpoint, tmp_path / "out", "--eval-data", made.data, *flags]
    assert message in fails(capsys, 2, *argv)
    assert not list(tmp_path.iterdir())


def test_missing_flag(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--eval-data" in fails(capsys, 2, "bundle", made.checkpoint, tmp_path / "out")


def test_what_cannot_be_done(
    made: Any, tmp_path: Path, write_images: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", ["--eval-data", made.data]
    words = [str(tmp_path / "none"), "config.json"]
    line = fails(capsys, 1, "bundle", tmp_path / "none", out, *data)
    assert all(word in line for word in words)

    argv = ["bundle", made.checkpoint, out, "--eval-data"]
    assert "cannot read split" in fails(capsys, 1, *argv, tmp_path / "none")
    assert "cannot read split 'train'" in fails(
        capsys, 1, *argv, made.data, "--eval-split", "train"
    )

    other = write_images(tmp_path / "other", ["bag", "coat", "sock"])
    assert "3 labels (bag, coat, sock), but the checkpoint 3 (bag, coat, shoe)" in fails(
        capsys, 1, *argv, other
    )
    few = write_images(tmp_path / "few", ["bag", "coat", "shoe"], each=2)
    assert "has 6 images, but parity is proven on 64" in fails(capsys, 1, *argv, few)

    line = fails(capsys, 1, "bundle", made.checkpoint, made.bundle.root, *data)
    assert "exists: choose another place, or replace it with --force" in line
    assert "leaves no patch" in fails(capsys, 1, *argv, made.data, "--tier", "none=0.01")
    assert not out.exists()
    line = fails(capsys, 1, "verify", tmp_path / "none", *data)
    assert "no bundle at" in line


def test_a_preprocessor_of_another_size(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.checkpoint, tmp_path / "odd")
    file = tmp_path / "odd" / "preprocessor_config.json"
    file.write_text(file.read_text().replace(": 16", ": 32"))
    line = fails(capsys, 1, "bundle", tmp_path / "odd", tmp_path / "out", "--eval-data", made.data)
    assert "makes images of 32 pixels, but its model takes 16" in line
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
