"""The README's promises and docs/promises.md name tests: each must be there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROMISES = (ROOT / "README.md").read_text().split("## Promises")[1].split("\n## ")[0]
COMPLAINTS = (ROOT / "docs" / "promises.md").read_text()


def test_every_test_that_is_named_exists() -> None:
    defined = set[str]()
    for file in (ROOT / "tests").rglob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE))
    named = re.findall(r"`(test_\w+)`", PROMISES + COMPLAINTS)
    assert len(named) > 40
    rows = [row for row in PROMISES.splitlines() if row.startswith("| ")][2:]
    assert all("`test_" in row for row in rows)
    assert set(named) <= defined, set(named) - defined


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
