"""pcae-serve simulate, as a person calls it; small cells, in this process where that will do."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.reader import load_bundle
from pcae_serve.cli import start
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import StartError
from pcae_serve.loadtest import platforms, simulation
from pcae_serve.runtime import latency_profile
from pcae_serve.scheduling.policies import registry
from pcae_serve.settings import MAX_BATCH

SMALL = ("--requests", "200", "--seeds", "2", "--trace", "poisson")


def simulated(tmp_path: Path, *flags: str, small: bool = True) -> dict[str, Any]:
    """What the command wrote as JSON."""
    file = tmp_path / "report.json"
    given = ("--jobs", "1", *(SMALL if small else ()), *flags, "--json", str(file))
    assert start(["simulate", *given]) == 0
    told: dict[str, Any] = json.loads(file.read_text())
    return told


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = start(["simulate", "--jobs", "1", *SMALL, *flags])
    [line] = capsys.readouterr().err.strip().splitlines()
    return code, line


def test_a_low_load_is_attained_and_tiers_are_worth_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = simulated(tmp_path, "--policy", "fixed:fastest,fixed:best", "--load", "0.05")
    fastest, best = told["rows"]
    assert (fastest["policy"], best["policy"]) == ("fixed:fastest", "fixed:best")
    assert fastest["figures"]["attainment"]["mean"] > 0.98
    assert fastest["figures"]["accuracy_recovered"]["mean"] == pytest.approx(0, abs=1e-9)
    assert best["figures"]["accuracy_recovered"]["mean"] == pytest.approx(1)
    assert best["figures"]["p50_ms"]["mean"] > fastest["figures"]["p50_ms"]["mean"]
    out = capsys.readouterr().out
    assert "load 0.05" in out
    assert "Load 1 is" in out


def test_cells_are_policies_by_traces_by_loads(tmp_path: Path) -> None:
    flags = ("--policy", "greedy", "--policy", "nexus:fastest+drop", "--load", "0.2,0.4")
    told = simulated(tmp_path, *flags, "--trace", "gamma-4", "--seeds", "1")
    cells = {(row["policy"], row["trace"], round(row["load"], 6)) for row in told["rows"]}
    assert len(cells) == len(told["rows"]) == 8
    assert ("nexus:fastest+drop", "gamma-4", 0.4) in cells
    assert {row["seeds"] for row in told["rows"]} == {1}


def test_a_seed_gives_the_same_figures_in_any_number_of_processes(tmp_path: Path) -> None:
    one = simulated(tmp_path, "--policy", "greedy", "--load", "0.5,1")
    two = simulated(tmp_path, "--policy", "greedy", "--load", "0.5,1", "--jobs", "2")
    assert one["rows"] == two["rows"]
    first, second = one["rows"][0]["by_seed"]
    assert first != second


def test_more_load_and_a_rate_in_its_place(tmp_path: Path) -> None:
    told = simulated(tmp_path, "--policy", "greedy", "--load", "0.5,3")
    low, high = (row["figures"]["attainment"]["mean"] for row in told["rows"])
    assert low > high + 0.1
    rate = told["rows"][0]["rate"]
    again = simulated(tmp_path, "--policy", "greedy", "--rate", str(rate))
    assert again["rows"][0]["by_seed"] == told["rows"][0]["by_seed"]


def test_a_file_is_played_at_its_own_pace(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("arrival_s,budget_ms\n" + "".join(f"{i / 10},1000\n" for i in range(11)))
    flags = ("--policy", "fixed:best", "--trace", str(file), "--seeds", "1")
    [row] = simulated(tmp_path, *flags, small=False)["rows"]
    assert (row["rate"], row["offered"]) == (pytest.approx(10), 11)
    assert row["figures"]["attainment"]["mean"] == 1


def test_devices_batches_queue_and_decoding_reach_the_machine(tmp_path: Path) -> None:
    base = ("--policy", "fixed:fastest", "--rate", "12000", "--seeds", "1")
    [one] = simulated(tmp_path, *base)["rows"]
    [two] = simulated(tmp_path, *base, "--devices", "2")["rows"]
    assert two["figures"]["attainment"]["mean"] > one["figures"]["attainment"]["mean"]
    [single] = simulated(tmp_path, *base, "--max-batch", "1")["rows"]
    assert single["figures"]["mean_batch"]["mean"] == 1
    [short] = simulated(tmp_path, *base, "--max-batch", "1", "--queue-limit", "1")["rows"]
    assert short["figures"]["refused"]["mean"] > 0.5
    [slow] = simulated(tmp_path, "--policy", "fixed:fastest", "--rate", "20", "--decode-ms", "5")[
        "rows"
    ]
    assert slow["figures"]["p50_ms"]["mean"] > 6.9
    [shared] = simulated(tmp_path, "--policy", "fixed:fastest", "--rate", "20", "--host-ms", "5")[
        "rows"
    ]
    assert shared["figures"]["p50_ms"]["mean"] > 6.9


def test_capacity_is_worked_out_where_nobody_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()

    def clairvoyant(budgets_s: Any, shares: Any, seconds: Any) -> float:
        asked.append((budgets_s, shares, seconds))
        return 100.0

    monkeypatch.setattr("pcae_serve.loadtest.capacity.capacity", clairvoyant)
    flags = ("--policy", "greedy", "--load", "0.5", "--mix", "4:0.25,16:0.75")
    told = simulated(tmp_path, *flags, "--devices", "2")
    assert told["about"]["capacity_per_s"] == 200
    assert told["rows"][0]["rate"] == 100
    [(budgets_s, shares, seconds)] = asked
    full_s = platforms.read("gpu").full_s
    assert budgets_s == pytest.approx([4 * full_s, 16 * full_s])
    assert shares == pytest.approx([0.25, 0.75])
    assert np.shape(seconds) == (6, MAX_BATCH)
    told = simulated(tmp_path, *flags, "--capacity", "40")
    assert told["rows"][0]["rate"] == 20
    simulated(tmp_path, "--policy", "greedy", "--rate", "50", "--mix", "4")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--load", "1", "--rate", "5"), 2, "--load and --rate"),
        (("--load", "0"), 2, "--load"),
        (("--requests", "0"), 2, "--requests"),
        (("--seeds", "0"), 2, "--seeds"),
        (("--policy", "gredy"), 1, "gredy"),
        (("--policy", "fixed:quick"), 1, "k30"),
        (("--trace", "twitter"), 1, "azure-code"),
        (("--mix", "3:x"), 1, "multiples"),
        (("--profile", "nowhere.json"), 1, "gpu, cpu, machine"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    flags: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, line = refused(capsys, *flags)
    assert got == code
    assert words in line


def test_all_is_every_name_of_the_catalogue() -> None:
    found = simulation.resolve(["all", "greedy"], platforms.read("gpu").tier_table)
    assert {spec.partition(":")[0] for spec in found} == set(registry.NAMES)
    assert len(found) == len(set(found))
    assert "nexus:fastest" in found


def test_ctrl_c_ends_it_without_a_word() -> None:
    command = (sys.executable, "-m", "pcae_serve", "simulate", "--policy", "greedy", "--jobs", "2")
    with subprocess.Popen(
        (*command, "--requests", "1000000", "--load", "0.5"),
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore Ctrl-C, and hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        time.sleep(2.5)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=10)
    assert process.returncode == 130, told
    assert "Traceback" not in told


# ---- platforms ----


@pytest.mark.parametrize("name", platforms.NAMES)
def test_the_ready_made_platforms_span_five_points(name: str) -> None:
    platform = platforms.read(name)
    accuracy = platform.tier_table.accuracy
    assert list(accuracy) == sorted(accuracy)
    assert accuracy[-1] - accuracy[0] >= 0.05
    ones = [tier[1].p50 for tier in platform.seconds(4)]
    assert ones == sorted(ones)
    assert platform.capacity_per_s["mixed"] > 0
    assert platform.source


def test_beyond_the_largest_batch_measured_the_line_goes_on() -> None:
    points = ({"batch": 1, "p50_s": 1.0, "p99_s": 1.1}, {"batch": 2, "p50_s": 1.5, "p99_s": 1.65})
    tier = {"name": "one", "accuracy": 0.5, "points": points}
    platform = platforms.Platform.model_validate({"source": "toy", "tiers": [tier]})
    [seconds] = platform.seconds(4)
    assert [seconds[batch].p50 for batch in (1, 2, 4)] == pytest.approx([1, 1.5, 2.5])
    assert seconds[4].p99 == pytest.approx(2.75)


def test_a_measured_profile_takes_its_accuracies_from_the_bundle(
    bundle_dir: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(bundle_dir)
    rounds = {1: np.full((3, 3), 0.01), 2: np.full((3, 3), 0.015)}
    measured = latency_profile.summarise(bundle, SimulatedEngine(bundle), rounds)
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"profile": measured.model_dump(mode="json"), "rows": []}))
    platform = platforms.read(str(file), bundle_dir)
    assert platform.tier_table.accuracy == (0.80, 0.85, 0.90)
    assert platform.full_s == pytest.approx(0.01)
    with pytest.raises(StartError, match="--bundle"):
        platforms.read(str(file))  # the demo has other tiers


def test_a_file_that_is_no_profile_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"tiers": []}')
    with pytest.raises(StartError, match="is no profile"):
        platforms.read(str(tmp_path / "x.json"))
