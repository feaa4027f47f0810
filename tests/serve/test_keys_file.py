"""The format of keys files, which server and client read alike."""

import os
from pathlib import Path

import pytest

from pcae_serve.api.auth import Keys
from pcae_serve.commands.classify import Classify
from pcae_serve.keys_file import read_keys

KEY, OTHER = "3f9a-0123456789abcdef", "81c2-0123456789abcdef"


def test_a_line_has_a_key_and_options(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"\ufeff# ours\n\n  {KEY} \r\n{OTHER}\tname=ingest  weight=2 rate=50\n")
    assert read_keys(file) == [
        (3, KEY, {}),
        (4, OTHER, {"name": "ingest", "weight": "2", "rate": "50"}),
    ]


@pytest.mark.parametrize("rest", ["secret", "note=x", "name=", "name=a name=b", "name = x"])
def test_another_form_is_refused_without_showing_it(tmp_path: Path, rest: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n{OTHER} {rest}\n")
    with pytest.raises(ValueError, match=r"^line 2: only name=…, weight=…, rate=…") as raised:
        read_keys(file)
    assert "secret" not in str(raised.value)


def test_an_option_is_not_taken_for_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\nname=ingest-of-photographs {OTHER}\n")
    with pytest.raises(ValueError, match=r"^line 2: the key comes first"):
        read_keys(file)


def test_the_client_sends_a_key_that_the_server_accepts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text(f"# ours\n{KEY} name=ingest\n")
    command = Classify.model_validate({"files": ["a.png"], "url": "http://a", "api_key_file": file})
    assert command._key() == KEY
    assert KEY in Keys.read(file)
    assert not caplog.records


def test_a_file_that_is_too_large_is_refused_and_a_pipe_is_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="larger than 1 MB"):
        read_keys(Path("/dev/zero"))
    reading, writing = os.pipe()  # as in --api-keys-file <(a-password-manager)
    os.write(writing, f"{KEY}\n".encode())
    os.close(writing)
    assert [line.key for line in read_keys(Path(f"/dev/fd/{reading}"))] == [KEY]
    os.close(reading)
