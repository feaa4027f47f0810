import re
from pathlib import Path

import pytest

from pcae_serve.bounded_file import open_regular, read_bounded, read_regular
from tests.support.odd_files import KINDS


def test_a_regular_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    link = tmp_path / "link"
    link.symlink_to(file)
    assert read_regular(link, 5) == read_bounded(file, 5) == b"12345"
    for read in (read_regular, read_bounded):
        with pytest.raises(OSError, match=re.escape("larger than 4e-06 MB")):
            read(file, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_anything_else_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    make, words = KINDS[kind]
    make(tmp_path / "x")  # a short name: a socket's path has at most 108 bytes
    with pytest.raises(OSError) as caught:  # noqa: PT011  its strerror is checked
        open_regular(tmp_path / "x")
    assert re.search(words, caught.value.strerror or "")


def test_an_endless_device_is_read_up_to_the_limit() -> None:
    with pytest.raises(OSError, match="larger than 1 MB"):
        read_bounded(Path("/dev/zero"), 1_000_000)
