"""Progress without a terminal: lines on standard error."""

from collections.abc import Iterator
from threading import Event

import pytest

from pcae_serve.loadtest import progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> "Lines":
    lines = Lines()
    monkeypatch.setattr(progress, "INTERVAL_S", 0.01)
    monkeypatch.setattr(progress, "report", lines)
    return lines


class Lines(list[str]):
    """What is reported, and a way to wait for the next line."""

    def __init__(self) -> None:
        super().__init__()
        self._reported = Event()

    def __call__(self, line: str) -> None:
        self.append(line)
        self._reported.set()

    def wait_for_next(self) -> None:
        self._reported.clear()
        assert self._reported.wait(60)


def test_track_reports_how_many_are_done(lines: Lines) -> None:
    def items() -> Iterator[int]:
        for item in range(3):
            lines.wait_for_next()
            yield item

    assert list(progress.track(items(), 3, "simulating")) == [0, 1, 2]
    assert lines[0].startswith("simulating: 0 of 3 after ")
    assert any("1 of 3" in line and "s left" in line for line in lines)


def test_status_reports_at_once_and_then_the_time(lines: Lines) -> None:
    with progress.status("computing"):
        assert lines[0] == "computing"
        lines.wait_for_next()
    assert "s so far" in lines[-1]


def test_short_work_reports_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track([1, 2], 2, "simulating")) == [1, 2]
    assert capsys.readouterr().err == ""
