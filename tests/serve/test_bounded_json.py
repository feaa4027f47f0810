import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcae_serve.bounded_json import parse_json, read_json
from tests.support.odd_files import JSON

SIMPLE = st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.text(max_size=5)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
DOCUMENTS = st.recursive(
    SIMPLE | NUMBERS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(DOCUMENTS)
def test_valid_documents_are_read_as_by_the_standard_library(document: object) -> None:
    for ascii_only in (True, False):
        text = json.dumps(document, ensure_ascii=ascii_only)
        assert parse_json(text.encode()) == document
        assert parse_json(b"\xef\xbb\xbf" + text.encode()) == document


@pytest.mark.parametrize("case", JSON)
def test_documents_beyond_the_bounds_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, word = JSON[case]
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=word) as caught:
        read_json(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_32_levels_and_a_whole_surrogate_pair_are_read() -> None:
    assert parse_json(b"[" * 32 + b"]" * 32)
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"


@given(st.binary(max_size=60))
def test_bytes_of_any_kind_are_read_or_refused(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        json.dumps(parse_json(raw), allow_nan=False).encode()
