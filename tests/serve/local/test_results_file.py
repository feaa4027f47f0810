"""Tables that a later run continues, also after a crash at any byte."""

import json
from pathlib import Path

import pytest

from pcae_serve.errors import PcaeError
from pcae_serve.local.results_file import ResultsFile
from pcae_serve.local.row_formats import Row
from pcae_serve.schemas import Prediction

SETTINGS = {"bundle": "b", "tier": "auto"}
NAMES = ["plain.png", 'a "quoted", one.png', "two\nlines.png", '"', "ü.png"]


def row(name: str) -> Row:
    return Row(name, "full", (Prediction(label=f"{name}, a label", index=1, probability=0.5),))


def write(path: Path, names: list[str]) -> set[str]:
    """Write what is missing; return what was there."""
    with ResultsFile(path, SETTINGS, top_k=2) as results:
        before = set(results.finished)
        for name in names:
            if name not in before:
                results.write(row(name))
        results.finish()
    return before


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_cut_off_at_any_byte_is_completed(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"r.{suffix}"
    write(path, NAMES)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = write(path, NAMES)
        assert path.read_bytes() == whole
        assert kept == set(NAMES[: len(kept)])
    assert write(path, NAMES) == set(NAMES)


def test_a_parquet_file_grows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "r.parquet"
    assert write(path, NAMES[:2]) == set()
    assert write(path, NAMES) == set(NAMES[:2])
    table = parquet.read_table(path).to_pylist()
    assert [each["file"] for each in table] == NAMES
    assert [each["label"] for each in table] == [f"{name}, a label" for name in NAMES]
    assert {each["label_2"] for each in table} == {None}
    path.write_bytes(b"PAR1 damaged")
    with pytest.raises(PcaeError, match="cannot be read"):
        write(path, NAMES)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("r.csv", b"another,header\n", "another header"),
        ("r.csv", None, "is damaged after byte"),
        ("r.jsonl", b'{"file": 3}\n', "is damaged after byte 0"),
        ("r.jsonl", b"[]\n", "is damaged"),
        ("r.jsonl", b"\xff\n", "is damaged"),
    ],
)
def test_a_damaged_file_is_not_continued(
    name: str, content: bytes | None, match: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, NAMES)
    content = path.read_bytes() + b"too,few,columns\n" if content is None else content
    path.write_bytes(content)
    with pytest.raises(PcaeError, match=match):
        write(path, NAMES)
    assert path.read_bytes() == content


def test_only_one_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    with ResultsFile(path, SETTINGS, top_k=1) as results:
        results.write(row("a"))
        results.finish()
        for overwrite in (False, True):
            with pytest.raises(PcaeError, match="another process is writing this file"):
                ResultsFile(path, SETTINGS, top_k=1, overwrite=overwrite)
    with ResultsFile(path, SETTINGS, top_k=1) as results:
        assert results.finished == {"a"}


def test_rows_are_on_disk_after_a_second(tmp_path: Path) -> None:
    path, now_s = tmp_path / "r.csv", 0.0
    with ResultsFile(path, SETTINGS, top_k=1, clock=lambda: now_s) as results:
        results.write(row("a"))
        assert len(path.read_bytes().splitlines()) == 1
        now_s = 1.5
        results.write(row("b"))
        assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("content", ["[]", "not JSON", '{"version": 2}'])
def test_settings_that_are_not_understood(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    write(path, NAMES)
    (tmp_path / "r.csv.run.json").write_text(content)
    with pytest.raises(PcaeError, match="choose another name, or --overwrite"):
        write(path, NAMES)
    with ResultsFile(path, SETTINGS, top_k=2, overwrite=True) as results:
        assert results.finished == set()
    assert json.loads((tmp_path / "r.csv.run.json").read_text())["tier"] == "auto"


def test_an_empty_file_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.touch()
    assert write(path, NAMES) == set()
