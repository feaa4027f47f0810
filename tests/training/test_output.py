import os
from pathlib import Path

import pytest

from pcae_serve.errors import PcaeError
from pcae_training.output import check_writable, write_whole


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep" / "file.json"
    write_whole(file, b"one")
    assert file.read_bytes() == b"one"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PcaeError, match=r"cannot write .*file\.json: No space left on device"):
        write_whole(file, b"two")
    assert file.read_bytes() == b"one"
    assert list(file.parent.iterdir()) == [file]


def test_a_file_takes_another_ones_place(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_whole(file, b"one, and long")
    write_whole(file, b"two")
    assert file.read_bytes() == b"two"


def test_a_file_in_place_of_its_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PcaeError, match=r"^cannot write .*x\.json: (File exists|Not a directory)$"):
        write_whole(tmp_path / "file" / "x.json", b"one")


def test_a_place_that_can_be_written_to_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    for file in (Path("there"), Path("new"), tmp_path / "not" / "yet" / "there"):
        check_writable(file)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_a_place_that_cannot_be_written_to_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PcaeError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(PcaeError, match="file is not a writable folder"):
        check_writable(tmp_path / "file" / "deep" / "x.json")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may always write
    with pytest.raises(PcaeError, match=f"{tmp_path} is not a writable folder"):
        check_writable(tmp_path / "deep" / "x.json")
