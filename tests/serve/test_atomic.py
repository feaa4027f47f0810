"""What a reader finds when a write fails or succeeds."""

import os
from pathlib import Path

import pytest

from pcae_serve import atomic


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.json"
    atomic.write_file(file, b"one")
    atomic.write_file(file, b"two")
    assert file.read_bytes() == b"two"
    assert list(file.parent.iterdir()) == [file]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    usual, file = tmp_path / "usual", tmp_path / "file"
    usual.write_bytes(b"")
    atomic.write_file(file, b"")
    assert file.stat().st_mode == usual.stat().st_mode


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    atomic.write_file(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "a").write_text(text)
    return path


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    target = folder(tmp_path / "out", "old")
    atomic.replace_folder(folder(tmp_path / "fresh", "new"), target)
    assert (target / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, fresh = folder(tmp_path / "out", "old"), folder(tmp_path / "fresh", "new")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self == fresh:
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        atomic.replace_folder(fresh, target)
    assert (target / "a").read_text() == "old"
