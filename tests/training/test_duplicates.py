from pathlib import Path

import pytest

from pcae_training import duplicates
from pcae_training.duplicates import ImageFile, find_duplicates


def files(root: Path, *content: tuple[str, str, bytes]) -> list[ImageFile]:
    """Write files of (split, class, content)."""
    found = []
    for number, (split, label, body) in enumerate(content):
        path = root / f"{number}.png"
        path.write_bytes(body)
        found.append(ImageFile(str(path), split, label))
    return found


def test_identical_files_are_counted_by_where_they_are(tmp_path: Path) -> None:
    long = bytes(1000)
    found = find_duplicates(
        files(
            tmp_path,
            ("train", "a", b"one"), ("train", "a", b"one"), ("train", "b", b"one"),
            ("test", "a", b"one"), ("test", "a", b"two"), ("test", "b", b"two"),
            ("train", "a", b"1" + long), ("test", "a", b"2" + long),  # the same end
            ("train", "a", b"x"), ("test", "a", b"y"),
        ),
        "train",
    )  # fmt: skip
    assert (found.across, found.within, found.classes) == (3, 2, 2)
    assert len(found.notes) == 3
    assert find_duplicates([], "train") == duplicates.Duplicates()


def test_files_that_vanish_and_too_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = files(tmp_path, ("train", "a", b"one"), ("test", "a", b"one"))
    Path(some[1].path).unlink()
    assert find_duplicates(some, "train").across == 0
    monkeypatch.setattr(duplicates, "MAX_FILES", 1)
    assert find_duplicates(some, "train").notes == (
        "not checked for identical files: more than 1 files",
    )
