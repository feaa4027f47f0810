import sys

import pytest

from pcae_training.progress import Progress, format_duration


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_log_gets_a_line_every_30_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("epoch 1/2", 1000, done=400, announce=True, clock=clock) as progress:
        for _ in range(10):
            clock.now += 10
            progress.show({"loss": 0.25, "lr": 1e-3})
            progress.update(10)
        progress.update(100, "epoch 2/2")
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/2: 400 of 1,000 images",
        "epoch 1/2: 430 of 1,000 images (43%), loss 0.25, lr 0.001, 1 images/s, 10 min left",
        "epoch 1/2: 460 of 1,000 images (46%), loss 0.25, lr 0.001, 1 images/s, 9 min left",
        "epoch 1/2: 490 of 1,000 images (49%), loss 0.25, lr 0.001, 1 images/s, 8 min left",
    ]


def test_short_work_logs_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("decoding", 20, clock=clock) as progress:
        clock.now += 29
        progress.update(20)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("epoch 1/2", 50, done=20, announce=True, clock=clock) as progress:
        clock.now += 60
        progress.update(10)
        progress.show({"loss": 0.25})
        progress.write("epoch 1  top1 0.5")
    shown = capsys.readouterr().err
    assert "epoch 1/2:" in shown
    assert "30.0/50.0" in shown
    assert "loss=0.25" in shown
    assert "epoch 1  top1 0.5\n" in shown
    assert "left" not in shown


def test_only_the_first_of_several_processes_shows_it(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with Progress("evaluating", 20, announce=True, clock=clock) as progress:
        clock.now += 60
        progress.update(10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"), (59, "59 s"), (59.6, "1 min"), (3599, "1 h"), (12_000, "3 h 20 min"),
        (170_000, "47 h 13 min"), (180_000, "2 d 2 h"), (172_800, "2 d"),
    ],
)  # fmt: skip
def test_a_duration_has_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
