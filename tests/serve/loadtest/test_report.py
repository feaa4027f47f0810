"""Figures of hand-made outcomes, and the table, JSON and plot."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.quality import wilson_interval
from pcae_serve.errors import PcaeError
from pcae_serve.loadtest import plot_style, report
from pcae_serve.loadtest.report import Figures, Row, figures, summarise
from pcae_serve.loadtest.simulator import End, Outcome
from pcae_serve.scheduling.tiers import TierTable

TIER_TABLE = TierTable(("fast", "balanced", "full"), (0.6, 0.7, 0.8))


def outcome(*ends: tuple[int, int, float], **changes: Any) -> Outcome:
    """Return an outcome of requests a second apart: (end, tier, seconds until the end)."""
    n = len(ends)
    arrival_s = np.arange(n, dtype=float)
    return Outcome(
        arrival_s,
        np.ones(n),
        np.array([end for end, _, _ in ends], np.int8),
        np.array([tier for _, tier, _ in ends], np.int16),
        arrival_s + [seconds for *_, seconds in ends],
        **changes,
    )


FIVE = (
    (End.IN_TIME, 0, 0.1),
    (End.IN_TIME, 2, 0.3),
    (End.LATE, 2, 1.5),
    (End.REJECTED, -1, 0.02),
    (End.EXPIRED, -1, 1.0),
)


def row(policy: str = "greedy", load: float = 1.0, *runs: Figures, **changes: Any) -> Row:
    its_runs = runs or (figures(outcome(*FIVE), TIER_TABLE, (0, 1, 2)),)
    return Row(policy, "poisson", "mixed", load, 100 * load, 5, its_runs, **changes)


def test_every_offered_request_counts() -> None:
    found = figures(outcome(*FIVE, span_s=4.0), TIER_TABLE, (0, 1, 2))
    assert found.attainment == pytest.approx(2 / 5)
    assert found.mean_accuracy == pytest.approx(0.7)
    assert found.accuracy_recovered == pytest.approx(0.5)
    assert found.effective_accuracy == pytest.approx(0.4 * 0.7)
    assert found.goodput_per_s == pytest.approx(2 / 4)
    assert (found.rejected, found.dropped, found.expired, found.late) == (0.2, 0, 0.2, 0.2)
    assert found.response_p50_ms == pytest.approx(200)  # of two answers, without the late one
    assert found.response_mean_ms == pytest.approx(200)
    assert found.rejection_p99_ms == pytest.approx(20)


def test_what_is_recovered_lies_between_the_tiers_allowed() -> None:
    found = figures(outcome((End.IN_TIME, 1, 0.1)), TIER_TABLE, (1, 2))
    assert found.accuracy_recovered == pytest.approx(0)
    assert figures(outcome((End.IN_TIME, 1, 0.1)), TIER_TABLE, (1,)).accuracy_recovered is None


def test_a_failure_is_a_miss() -> None:
    found = figures(outcome((End.FAILED, -1, 0.1), (End.IN_TIME, 2, 0.1)), TIER_TABLE, (0, 1, 2))
    assert (found.attainment, found.failed) == (0.5, 0.5)


def test_with_labels_only_right_answers_in_time_are_worth_something() -> None:
    right = np.array([True, False, True, True, True])
    found = figures(outcome(*FIVE), TIER_TABLE, (0, 1, 2), right)
    assert found.effective_accuracy == pytest.approx(1 / 5)  # late and refused ones are not
    # of the two answers in time one is right, whatever their tiers are on average
    assert found.mean_accuracy == pytest.approx(1 / 2)


def test_nothing_in_time_has_no_accuracy() -> None:
    found = figures(outcome((End.REJECTED, -1, 0.0)), TIER_TABLE, (0, 1, 2))
    assert (found.attainment, found.effective_accuracy) == (0, 0)
    assert (found.accuracy_recovered, found.mean_accuracy, found.response_p99_ms) == (
        None,
        None,
        None,
    )


def test_waste_is_a_share_of_the_busy_time() -> None:
    busy = outcome(*FIVE, busy_s=2.0, late_s=0.5, padding_s=0.1, batches=[1, 3])
    found = figures(busy, TIER_TABLE, (0, 1, 2))
    assert (found.wasted_late, found.wasted_cancelled) == (0.25, 0)
    assert found.wasted_padding == pytest.approx(0.05)
    assert found.mean_batch == 2
    assert figures(outcome(*FIVE), TIER_TABLE, (0, 1, 2)).wasted_late is None


def test_seeds_give_a_t_interval() -> None:
    found = summarise([0.7, 0.8, 0.9])
    half = 4.3027 * 0.1 / 3**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.8 - half, 0.8 + half), 1e-4)
    assert summarise([0.7, 0.8, 0.9], bounded=True).high == 1
    assert summarise([0.7]).low is None


def test_one_seed_has_wilsons_interval_and_several_the_other() -> None:
    attained = row().summary("attainment")
    assert attained is not None
    assert (attained.low, attained.high) == wilson_interval(0.4, 5)
    run = row().runs[0]
    again = row("greedy", 1.0, run, dataclasses.replace(run, attainment=0.4)).summary("attainment")
    assert again is not None
    assert (again.low, again.high) == (0.4, 0.4)


def test_a_figure_that_one_seed_lacks_is_that_of_the_others() -> None:
    run = row().runs[0]
    both = row("greedy", 1.0, run, dataclasses.replace(run, accuracy_recovered=None))
    found = both.summary("accuracy_recovered")
    assert found is not None
    assert found.mean == pytest.approx(0.5)


def test_the_table_has_the_most_important_figures_first(capsys: pytest.CaptureFixture[str]) -> None:
    report.show([row(), row("nexus:fastest"), row(load=2.0)], ["on a toy"])
    out = capsys.readouterr().out
    places = [out.index(word) for word in ("attainment", "recovered %", "accuracy %", "goodput")]
    assert places == sorted(places)
    assert "40.0 (11.8–76.9)" in out  # noqa: RUF001
    assert out.count("nexus:fastest") == 1
    assert "load 2" in out
    assert "answers in time / offered" in out
    assert out.rstrip().endswith("on a toy")


def test_the_table_has_failures_only_if_there_are_any(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report.show([row()], [])
    assert "failed %" not in capsys.readouterr().out
    report.show([row("greedy", 1.0, dataclasses.replace(row().runs[0], failed=0.125))], [])
    assert "12.5" in capsys.readouterr().out


def test_json_holds_every_seed(tmp_path: Path) -> None:
    run = row().runs[0]
    rows = [row("greedy", 1.0, run, run, client={"lag_p99_ms": 0.5})]
    report.write_json(tmp_path / "r.json", rows, {"command": "test"}, labels=True)
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["formulas"]["effective accuracy"] == "correct answers in time / offered"
    [one] = content["rows"]
    assert one["figures"]["attainment"] == {"mean": 0.4, "low": 0.4, "high": 0.4}
    assert list(one["figures"])[:3] == ["attainment", "accuracy_recovered", "effective_accuracy"]
    assert len(one["by_seed"]) == one["seeds"] == 2
    assert one["client"] == {"lag_p99_ms": 0.5}


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(PcaeError, match="cannot write"):
        report.write_json(tmp_path / "no" / "r.json", [row()], {})
    with pytest.raises(PcaeError, match="cannot write"):
        report.write_png(tmp_path / "no" / "r.png", [row()], "")


def test_the_plot(tmp_path: Path) -> None:
    nothing = figures(outcome((End.REJECTED, -1, 0.0)), TIER_TABLE, (0, 1, 2))
    rows = [row(), row("slackfit"), row(load=2.0), row("slackfit", 2.0, nothing)]
    report.write_png(tmp_path / "r.png", rows, "a toy")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_states_how_many_requests_and_when(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    captions = []
    monkeypatch.setattr(plot_style, "write_caption", lambda _, text: captions.append(text))
    report.write_png(
        tmp_path / "r.png", [row("greedy", 1.0, row().runs[0], row().runs[0])], "a toy"
    )
    assert re.fullmatch(r"a toy; n = 5 requests . 2 seeds; 20\d\d-\d\d-\d\d", captions[0])


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    report.require("pcae-serve simulate")
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(PcaeError, match=r"needs rich: pip install '\.\[simulate\]'"):
        report.require("pcae-serve simulate")
