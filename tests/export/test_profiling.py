"""pcae-export profile: what it keeps, prints and refuses. Times come from a simulated engine."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_export import keep_ratios, profiling
from pcae_export.keep_ratios import SuggestedTier, Suggestion
from pcae_export.profile_chart import _quality, draw_profile
from pcae_export.profiling import Profile, Row
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.command import config, run
from pcae_serve.engines.loader import load_engine
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime import latency_profile


class Command(BaseSettings):
    """The command as a part of pcae-export."""

    model_config = config("pcae-export")

    profile: CliSubCommand[Profile]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return load_bundle(demo_path())


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCAE_CACHE_DIR", str(tmp_path / "cache"))


def test_the_server_starts_from_what_the_command_measured(
    demo: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        latency_profile, "MAX_OFF", float("inf")
    )  # however this machine's pace changes
    argv = ["profile", str(demo.root), "--seconds", "0.6", "--batches", "2,1"]
    report = tmp_path / "report.json"
    flags = ["--backend", "onnxruntime", "--threads", "1", "--json", str(report)]
    assert run(Command, [*argv, *flags, "--suggest", "2", "--lowest", "0.96"]) == 0
    out = capsys.readouterr().out
    assert "onnxruntime on cpu, threads per batch: 1" in out
    assert "--tier full=1" in out

    engine = load_engine("onnxruntime", demo, "cpu", 1)
    kept = latency_profile.load(demo, engine, tmp_path / "cache", limit_s=0.01)
    written = json.loads(report.read_text())
    assert latency_profile.Profile.model_validate(written["profile"]) == kept
    names = [tier.name for tier in demo.tiers]
    assert [row["tier"] for row in written["rows"][: len(names)]] == names
    assert written["rows"][0]["of_macs"] > 0
    assert written["suggestion"]["tiers"][-1]["keep_ratio"] == 1


def test_settings_left_out_are_the_servers(
    demo: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PCAE_BACKEND", "simulated")
    argv = ["profile", str(demo.root), "--seconds", "0.1", "--batches", "1"]
    assert run(Command, [*argv, "--suggest", "0"]) == 0
    out = capsys.readouterr().out
    assert "simulated on cpu" in out
    assert "--tier" not in out
    assert latency_profile.read(demo, SimulatedEngine(demo), tmp_path / "cache")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--batches", "2,4"], 2, "include 1"),
        (["--batches", "0,1"], 2, "must be 1 or more and include 1"),
        (["--batches", "one"], 2, "whole numbers such as 1,4,8"),
        (["--seconds", "0"], 2, "--seconds"),
        (["--lowest", "1.5"], 2, "--lowest"),
        (["--suggest", "-1"], 2, "--suggest"),
        (["--backend", "abacus"], 2, "--backend"),
        (["--device", "tpu"], 2, "--device"),
        (["--batches", "1,33"], 1, "above the server's largest batch 32"),
        (["--seconds", "0.05", "--cache-dir", "/dev/null"], 1, "choose another --cache-dir"),
        (["--seconds", "0.05", "--json", "/dev/null/x"], 1, "cannot write /dev/null/x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_told_in_one_line(
    demo: Bundle, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    argv = ["profile", str(demo.root), *flags]
    assert run(Command, argv if "--backend" in flags else [*argv, "--backend", "simulated"]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "pcae-export:" in line]
    assert len(lines) == 1  # beside progress bars
    assert message in lines[0]


def test_a_chart_of_a_profile(demo: Bundle) -> None:
    bare = [tier.model_copy(update={"accuracy": None}) for tier in demo.tiers]
    for tiers in (demo.tiers, bare):
        chart = draw_profile(tiers, {1: [1.0, 2.0, 3.0, 4.0], 8: [0.5, 1.0, 2.0, 3.0]}, "a", "b")
        with Image.open(io.BytesIO(chart)) as picture:
            assert picture.size == (960, 690)
    assert _quality(bare)[0] == "keep ratio"
    heading, values, bars = _quality(demo.tiers)
    assert heading == "top-1, % (n = 10,000)"
    assert values[0] == pytest.approx(87.15)
    assert bars is not None
    assert bars[0][0] == pytest.approx(0.67, abs=0.01)


def test_ratios_are_of_the_same_round(demo: Bundle) -> None:
    slow = np.array([[1.0], [3.0], [1.0]])  # one round of three on a busy machine
    tiers = (demo.tiers[0], demo.tiers[-1])
    rounds = {1: slow * [0.25, 1.0], 8: slow * [2.0, 8.0]}
    rows = profiling.compare_tiers(tiers, rounds, peak=None)
    assert [(row.tier, row.batch) for row in rows[1:3]] == [("full", 1), (tiers[0].name, 8)]
    low = rows[2]
    assert (low.runs, low.p50_ms, low.image_ms, low.images_per_s) == (3, 2000.0, 250.0, 4.0)
    assert (low.speed, low.speed_low, low.speed_high) == (4.0, 4.0, 4.0)
    macs = tiers[1].macs / tiers[0].macs
    assert low.of_macs == pytest.approx(4.0 / macs)
    assert low.p95_ms is low.p99_ms is low.peak_share is None


def test_a_share_of_peak_counts_two_operations_a_mac(demo: Bundle) -> None:
    full = demo.tiers[-1]
    peak = 8 * full.macs  # FLOP/s
    rows = profiling.compare_tiers([full], {2: np.full((5, 1), 1.0)}, peak)
    assert rows[0].peak_share == pytest.approx(2 * 2 / 8)
    assert "50.0%" in profiling.format_table(rows)


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "tier": "low", "batch": 1, "runs": 150, "p50_ms": 10.0, "p95_ms": 11.0, "p99_ms": 12.5,
        "image_ms": 10.0, "images_per_s": 100.0, "speed": 2.0, "speed_low": 1.9,
        "speed_high": 2.1, "mac_ratio": 2.5, "peak_share": None,
    }  # fmt: skip
    return Row(**(values | changes))


def test_the_table_marks_what_is_not_known_and_what_is_too_good() -> None:
    sure, unsure, good = row(), row(runs=12, p95_ms=None, p99_ms=None), row(speed=2.6)
    head, *lines = profiling.format_table([sure, unsure, good]).splitlines()
    assert "of peak" not in head
    assert lines[0].split()[:6] == ["low", "1", "150", "10.00", "11.00", "12.50"]
    assert lines[1].split()[3:6] == ["10.00", "—", "—"]
    assert [line.endswith("!") for line in lines] == [False, False, True]


def test_notes_say_how_sure_the_table_is() -> None:
    text = "\n".join(
        profiling.format_notes([row(), row(batch=4, runs=24, p99_ms=None)], (1, 4, 8), 60.0)
    )
    assert "batch 8: no round completed in time" in text
    assert "p99 needs 100 (about --seconds 242)" in text  # 25 rounds with the first took 60 s
    assert "is above the slowest of 150 is 22%" in text  # 0.99^150
    assert "1.02" not in text
    assert "above 1.02 of the MAC ratio" in "\n".join(
        profiling.format_notes([row(speed=2.6)], (1,), 60.0)
    )
    assert not any("—" in note for note in profiling.format_notes([row()], (1,), 60.0))


@pytest.mark.parametrize(
    ("changes", "swept", "first"),
    [
        (
            {"noise": None},
            True,
            "2 rounds of 3 keep ratios are too few to distinguish steps from noise",
        ),
        ({"noise": 0.01}, True, "no step exceeds the trend and the noise (1.0%)"),
        ({"noise": 0.01, "steps": (0,)}, True, "the latency jumps above keep ratio 0.3"),
        ({"noise": 0.01}, False, "from the bundle's own: tensorrt has one graph per tier"),
    ],
    ids=["few-rounds", "line", "staircase", "static-graphs"],
)
def test_a_suggestion_names_its_reason(changes: dict[str, Any], swept: bool, first: str) -> None:
    values: dict[str, Any] = {
        "rounds": 2, "noise": 0.01, "keep_ratios": (0.3, 0.6, 1.0), "seconds": (0.01, 0.02, 0.03),
        "steps": (),
        "tiers": (SuggestedTier("k30", 0.3, 0.01, True), SuggestedTier("full", 1.0, 0.03, False)),
    }  # fmt: skip
    lines = list(
        profiling.format_suggestion(Suggestion(**(values | changes)), 3, "tensorrt", swept, 60.0)
    )
    assert first in lines[0]
    assert lines[1] == "  --tier k30=0.3     10.00 ms  just below a step"
    assert lines[2] == "  --tier full=1      30.00 ms"
    assert lines[3] == "  2 of 3: other ratios take the same time on this machine"


def test_a_static_engine_is_not_swept(demo: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Static(SimulatedEngine):
        name = "tensorrt"

    def refuse(*arguments: object) -> None:
        raise AssertionError("a static graph runs no other counts")

    monkeypatch.setattr(keep_ratios, "sweep_tiers", refuse)
    command = Profile(bundle=demo.root, suggest=4)
    timed = {1: np.tile([0.01, 0.015, 0.02, 0.03], (9, 1))}
    found = command._suggest(demo, Static(demo), timed, 1.0)
    assert [tier.name for tier in found.tiers] == [tier.name for tier in demo.tiers]
