"""docs/promises.md and SECURITY.md name tests: each must exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text()
PROMISES, COMPLAINTS = PAGE.split("\n## ")[:2]


def test_every_named_test_exists() -> None:
    defined = set[str]()
    for file in (ROOT / "tests").rglob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE))
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 40
    assert set(named) <= defined, set(named) - defined


def test_every_promise_names_a_test() -> None:
    rows = [row for row in PROMISES.splitlines() if row.startswith("| ")][2:]
    assert len(rows) > 10
    assert all("`test_" in row for row in rows)


def test_every_complaint_has_an_answer() -> None:
    rows = re.findall(r"^\| L(\d+) \| .+ \| (.+) \|$", COMPLAINTS, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 21))
    for number, answer in rows:
        known = "`test_" in answer or "out of scope" in answer or "as L1" in answer
        assert known or "not measured" in answer, number


def test_the_files_that_security_names_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10
    for name in named:
        assert list((ROOT / "tests").rglob(name)), name
