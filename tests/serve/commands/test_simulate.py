"""pcae-serve simulate, as a person calls it, with small cells, in this process if possible."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcae_serve.cli import start
from pcae_serve.loadtest import platforms
from pcae_serve.loadtest.simulation import resolve_policies
from pcae_serve.scheduling.policies import registry
from pcae_serve.settings import MAX_BATCH

SMALL = ("--requests", "200", "--seeds", "2", "--trace", "poisson")


def simulated(tmp_path: Path, *flags: str, small: bool = True) -> dict[str, Any]:
    """Run the command; return the JSON that it wrote."""
    file = tmp_path / "report.json"
    given = ("--jobs", "1", *(SMALL if small else ()), *flags, "--json", str(file))
    assert start(["simulate", *given]) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def error_line(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = start(["simulate", "--jobs", "1", *SMALL, *flags])
    [line] = capsys.readouterr().err.strip().splitlines()
    return code, line


def test_a_low_load_is_attained_on_the_tier_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = simulated(tmp_path, "--policy", "fixed:fastest,fixed:best", "--load", "0.05")
    fastest, best = report["rows"]
    assert (fastest["policy"], best["policy"]) == ("fixed:fastest", "fixed:best")
    assert fastest["figures"]["attainment"]["mean"] > 0.98
    assert fastest["figures"]["accuracy_recovered"]["mean"] == pytest.approx(0, abs=1e-9)
    assert best["figures"]["accuracy_recovered"]["mean"] == pytest.approx(1)
    assert (
        best["figures"]["response_p50_ms"]["mean"] > fastest["figures"]["response_p50_ms"]["mean"]
    )
    out = capsys.readouterr().out
    assert "load 0.05" in out
    assert "Load 1: " in out


def test_cells_are_policies_by_traces_by_loads(tmp_path: Path) -> None:
    flags = ("--policy", "greedy", "--policy", "nexus:fastest+drop", "--load", "0.2,0.4")
    report = simulated(tmp_path, *flags, "--trace", "gamma-4", "--seeds", "1")
    cells = {(row["policy"], row["trace"], round(row["load"], 6)) for row in report["rows"]}
    assert len(cells) == len(report["rows"]) == 8
    assert ("nexus:fastest+drop", "gamma-4", 0.4) in cells
    assert {row["seeds"] for row in report["rows"]} == {1}


def test_a_seed_gives_the_same_figures_in_any_number_of_processes(tmp_path: Path) -> None:
    one = simulated(tmp_path, "--policy", "greedy", "--load", "0.5,1")
    two = simulated(tmp_path, "--policy", "greedy", "--load", "0.5,1", "--jobs", "2")
    assert one["rows"] == two["rows"]
    first, second = one["rows"][0]["by_seed"]
    assert first != second


def test_more_load_and_a_rate_in_its_place(tmp_path: Path) -> None:
    report = simulated(tmp_path, "--policy", "greedy", "--load", "0.5,3")
    low, high = (row["figures"]["attainment"]["mean"] for row in report["rows"])
    assert low > high + 0.1
    rate = report["rows"][0]["rate"]
    again = simulated(tmp_path, "--policy", "greedy", "--rate", str(rate))
    assert again["rows"][0]["by_seed"] == report["rows"][0]["by_seed"]


def test_a_file_is_played_at_its_own_pace(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("arrival_s,budget_ms\n" + "".join(f"{i / 10},1000\n" for i in range(11)))
    flags = ("--policy", "fixed:best", "--trace", str(file), "--seeds", "1")
    [row] = simulated(tmp_path, *flags, small=False)["rows"]
    assert (row["rate"], row["offered"]) == (pytest.approx(10), 11)
    assert row["figures"]["attainment"]["mean"] == 1


def test_devices_batches_queue_and_decoding_reach_the_scheduler(tmp_path: Path) -> None:
    base = ("--policy", "fixed:fastest", "--rate", "12000", "--seeds", "1")
    [one] = simulated(tmp_path, *base)["rows"]
    [two] = simulated(tmp_path, *base, "--devices", "2")["rows"]
    assert two["figures"]["attainment"]["mean"] > one["figures"]["attainment"]["mean"]
    [single] = simulated(tmp_path, *base, "--max-batch", "1")["rows"]
    assert single["figures"]["mean_batch"]["mean"] == 1
    [short] = simulated(tmp_path, *base, "--max-batch", "1", "--queue-limit", "1")["rows"]
    assert short["figures"]["rejected"]["mean"] > 0.5
    [slow] = simulated(tmp_path, "--policy", "fixed:fastest", "--rate", "20", "--decode-ms", "5")[
        "rows"
    ]
    assert slow["figures"]["response_p50_ms"]["mean"] > 6.9
    [shared] = simulated(tmp_path, "--policy", "fixed:fastest", "--rate", "20", "--host-ms", "5")[
        "rows"
    ]
    assert shared["figures"]["response_p50_ms"]["mean"] > 6.9


def test_the_price_of_waiting_reaches_the_policy(tmp_path: Path) -> None:
    base = ("--profile", "cpu", "--policy", "pace,greedy", "--rate", "40")
    free, greedy = simulated(tmp_path, *base, "--waiting-price", "0")["rows"]
    dear, same = simulated(tmp_path, *base, "--waiting-price", "3")["rows"]
    assert greedy["by_seed"] == same["by_seed"]
    mean_ms = [row["figures"]["response_mean_ms"]["mean"] for row in (free, dear)]
    assert mean_ms[1] < mean_ms[0] / 2
    accuracy = [row["figures"]["mean_accuracy"]["mean"] for row in (free, dear)]
    assert accuracy[1] < accuracy[0]


def test_an_unknown_capacity_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    def clairvoyant(budgets_s: Any, shares: Any, seconds: Any) -> float:
        asked.append((budgets_s, shares, seconds))
        return 100.0

    monkeypatch.setattr("pcae_serve.loadtest.capacity.capacity", clairvoyant)
    flags = ("--policy", "greedy", "--load", "0.5", "--mix", "4:0.25,16:0.75")
    report = simulated(tmp_path, *flags, "--devices", "2")
    assert report["about"]["capacity_per_s"] == 200
    assert report["rows"][0]["rate"] == 100
    [(budgets_s, shares, seconds)] = asked
    full_s = platforms.read("gpu").full_s
    assert budgets_s == pytest.approx([4 * full_s, 16 * full_s])
    assert shares == pytest.approx([0.25, 0.75])
    assert np.shape(seconds) == (6, MAX_BATCH)
    report = simulated(tmp_path, *flags, "--capacity", "40")
    assert report["rows"][0]["rate"] == 20
    simulated(tmp_path, "--policy", "greedy", "--rate", "50", "--mix", "4")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--load", "1", "--rate", "5"), 2, "--load and --rate are mutually exclusive"),
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
def test_an_error_is_one_line(
    flags: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, line = error_line(capsys, *flags)
    assert got == code
    assert words in line


def test_all_is_every_policy_of_the_registry() -> None:
    found = resolve_policies(["all", "greedy"], platforms.read("gpu").tier_table)
    assert {spec.partition(":")[0] for spec in found} == set(registry.NAMES)
    assert len(found) == len(set(found))
    assert "nexus:fastest" in found


def test_ctrl_c_ends_it_quietly_and_progress_is_printed_without_a_terminal() -> None:
    script = (
        "from pcae_serve.loadtest import progress; progress.INTERVAL_S = 0.01;"
        " from pcae_serve.cli import main; main()"
    )
    flags = ("--policy", "greedy", "--jobs", "2", "--requests", "1000000", "--load", "0.5")
    with subprocess.Popen(
        (sys.executable, "-c", script, "simulate", *flags),
        stderr=subprocess.PIPE,
        text=True,
        # background jobs of a shell ignore SIGINT, and their children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("simulating: 0 of 3 after ")
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
