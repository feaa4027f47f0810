"""The figures of docs/scheduling.md are what their program draws."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ("scheduling-load.svg", "scheduling-batches.svg")


@pytest.mark.slow
def test_the_figures_are_drawn_by_their_program(tmp_path: Path) -> None:
    program = ROOT / "benchmarks" / "scheduling_figures.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for name in FIGURES:
        shown = (ROOT / "docs" / name).read_text()
        assert shown == (tmp_path / name).read_text(), f"{name}: run {program.name}"
        words = "".join(ElementTree.fromstring(shown).itertext())
        assert all(each in words for each in ("requests", "time, ", "2026-", "k30"))
