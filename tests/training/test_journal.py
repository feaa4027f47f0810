import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
    event_accumulator,
)

from pcae_training.journal import Journal


def journal(folder: Path, step: int = 0) -> Journal:
    return Journal(folder, {"lr": 0.1, "out": "x"}, step=step, images=step * 10, total=50)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_figures_go_to_a_line_and_a_curve(tmp_path: Path) -> None:
    with journal(tmp_path) as log:
        log.advance(10, "epoch 1")
        log.report(1, {"loss": 2.5, "lr": 0.1})
        log.report(2, {"loss": 1.5, "lr": 0.2})
    assert lines(tmp_path) == [
        {"step": 1, "loss": 2.5, "lr": 0.1},
        {"step": 2, "loss": 1.5, "lr": 0.2},
    ]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]


def test_the_whole_configuration_lies_beside_it(tmp_path: Path) -> None:
    with journal(tmp_path):
        pass
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["settings"] == {"lr": 0.1, "out": "x"}
    assert set(written["versions"]) == {"python", "torch"}
    assert written["machine"]["threads"] >= 1


def test_lines_from_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    with journal(tmp_path) as log:
        for step in (1, 2, 3):
            log.report(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the writer was killed here
    with journal(tmp_path, step=2) as log:
        log.report(3, {"loss": 30.0})
    assert lines(tmp_path) == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0},
    ]  # fmt: skip


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    with journal(tmp_path) as log:
        log.report(1, {"loss": 1.0})
    with journal(tmp_path):
        pass
    assert lines(tmp_path) == []


def test_progress_shows_loss_and_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with journal(tmp_path, step=2) as log:
        log.advance(10, "epoch 1/2")
        log.report(3, {"loss": 0.25, "lr": 0.001, "unreadable": 0})
        log.write("epoch 1  top1 0.5")
    shown = capsys.readouterr().err
    assert "epoch 1/2:" in shown
    assert "30.0/50.0" in shown
    assert "loss=0.25, lr=0.001" in shown
    assert "unreadable" not in shown
    assert "epoch 1  top1 0.5" in shown
