"""Without a terminal, progress is a line at the start and one every ten seconds of work."""

import pytest

from pcae_export.progress import Progress


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Progress("verifying", 40, "graphs", clock=lambda: now) as progress:
        for _ in range(35):
            now += 1.0
            progress.update()
    assert capsys.readouterr().err.splitlines() == [
        f"verifying: {done} of 40 graphs" for done in (0, 10, 20, 30)
    ]


def test_a_total_that_is_known_late(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Progress("building", 0, "steps", clock=lambda: now) as progress:
        progress.reset(3)
        now = 11.0
        progress.describe("timing kernels")
        progress.update()
    assert capsys.readouterr().err.splitlines() == ["building", "building: 1 of 3 steps"]
