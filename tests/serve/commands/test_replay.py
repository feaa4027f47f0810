"""pcae-serve replay, as a person calls it, against real sockets."""

import csv
import gc
import io
import json
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest

from pcae_serve.cli import start
from pcae_serve.loadtest import replay
from tests.support.images import image_bytes
from tests.support.scripted_server import FULL_MS, TIERS, ScriptedServer, scripts, tier
from tests.support.server_process import server


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the load generator lags; invalid runs have a test of their own."""
    monkeypatch.setattr(replay, "MAX_LAG_S", 60.0)
    monkeypatch.setattr(replay, "PAUSE_S", 0.0)
    monkeypatch.setattr(replay, "POLL_S", 0.01)
    # what tests have imported stays excluded from garbage collection (see tests/conftest.py)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


def replayed(url: str, tmp_path: Path, *flags: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return the only row of the report, and the row of every request."""
    report, rows = tmp_path / "report.json", tmp_path / "rows.csv"
    given = ("replay", url, "--trace", "poisson", "--json", str(report), "--rows", str(rows))
    assert start([*given, *flags]) == 0
    [row] = json.loads(report.read_text())["rows"]
    with rows.open(newline="") as file:
        return row, list(csv.DictReader(file))


def test_a_real_server(bundle_dir: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "bright").mkdir()
    (folder / "1.png").write_bytes(image_bytes(250))
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--profile-s", "0.5")
    with server(*flags, cache=tmp_path / "cache") as (url, _):
        given = ("--rate", "40", "--requests", "30", "--mix", "2000", "--seeds", "2")
        row, rows = replayed(
            url, tmp_path, *given, "--images", str(tmp_path / "bright"), "--labels", "folders"
        )
    assert (row["offered"], len(rows)) == (30, 60)
    assert row["figures"]["attainment"]["mean"] > 0.9
    assert row["figures"]["effective_accuracy"]["mean"] == row["figures"]["attainment"]["mean"]
    assert row["figures"]["accuracy_recovered"]["mean"] > 0.5  # light load, large budgets
    assert row["policy"]
    assert {line["tier"] for line in rows} <= {"fast", "balanced", "full", ""}
    assert row["client"]["met_by_server"] > 0.9


def test_every_end_is_counted(
    scripted: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fates = (
        "answer 0.001", "answer 0.3", "overloaded 0.03", "dropped 0.03", "draining 0.03",
        "budget-too-small 0", "deadline-exceeded 0.001", "upload-timeout 0.001", "engine-failed 0",
        "hang-up 0",
    )  # fmt: skip
    folder = scripts(tmp_path / "images", *fates)
    given = ("--rate", "200", "--requests", "140", "--mix", "8", "--images", str(folder))
    row, rows = replayed(scripted.url, tmp_path, *given)
    by_status = {status: [r["end"] for r in rows if r["status"] == status] for status in (
        "200", "503", "422", "504", "408", "500", "0"
    )}  # fmt: skip
    assert set(by_status["200"]) == {"in_time", "late"}
    assert set(by_status["503"]) == {"rejected", "dropped", "failed"}
    assert set(by_status["422"]) == {"rejected"}
    assert set(by_status["504"]) == set(by_status["408"]) == {"expired"}
    assert set(by_status["500"]) == set(by_status["0"]) == {"failed"}
    figures = row["figures"]
    shares = ("attainment", "late", "rejected", "dropped", "expired", "failed")
    assert sum(figures[name]["mean"] for name in shares) == pytest.approx(1)
    counted = len([end for end in by_status["200"] if end == "in_time"])
    assert figures["attainment"]["mean"] == pytest.approx(counted / 140)
    # this server reports all of its answers as in time
    assert row["client"]["met_by_server"] == pytest.approx(len(by_status["200"]) / 140)
    assert 30 <= row["client"]["503_p50_ms"] <= row["client"]["503_p99_ms"]
    assert row["client"]["fault: connection lost"] == len(by_status["0"])
    out = capsys.readouterr().out
    assert "status 503" in out
    assert "connection lost" in out
    assert "its-own" in out


def test_requests_are_sent_whatever_becomes_of_earlier_ones(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    folder = scripts(tmp_path / "images", "gather 80")  # answered once all have arrived
    given = ("--rate", "400", "--requests", "80", "--mix", "1", "--images", str(folder))
    row, rows = replayed(scripted.url, tmp_path, *given)
    assert max(float(r["sent_s"]) for r in rows) < min(float(r["ended_s"]) for r in rows)
    assert scripted.connections > 80  # more than the budgets called for: opened during the run
    assert row["figures"]["failed"]["mean"] == 0


def test_a_connection_closed_meanwhile_costs_no_request(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    folder = scripts(tmp_path / "images", "close 0")
    given = ("--rate", "100", "--requests", "60", "--mix", "100", "--images", str(folder))
    row, _ = replayed(scripted.url, tmp_path, *given)
    assert row["figures"]["failed"]["mean"] == 0
    assert row["figures"]["accuracy_recovered"]["mean"] == pytest.approx(0)  # answered on "fast"


def test_a_missing_answer_is_a_failure_and_is_not_waited_for(
    scripted: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "GRACE_S", 1.0)
    folder = scripts(tmp_path / "images", "answer 0", "answer 600")
    (tmp_path / "labels.csv").write_text("file,label\n0.png,bright\n1.png,dark\n")
    given = ("--rate", "100", "--requests", "20", "--mix", "1", "--images", str(folder))
    row, rows = replayed(scripted.url, tmp_path, *given, "--labels", str(tmp_path / "labels.csv"))
    lost = [r for r in rows if r["status"] == "0"]
    assert row["figures"]["failed"]["mean"] == len(lost) / 20 > 0
    assert {r["ended_s"] for r in lost} == {""}
    assert {r["right"] for r in rows if r["status"] == "200"} == {"1"}


def test_requests_and_compute_time(scripted: ScriptedServer, tmp_path: Path) -> None:
    folder = scripts(tmp_path / "images", "answer 0")
    given = ("--rate", "100", "--requests", "40", "--mix", "3:0.5,8:0.5", "--images", str(folder))
    row, _ = replayed(scripted.url, tmp_path, *given)
    [_, *asked] = scripted.paths  # the first one is the test request
    assert set(asked) == {f"/classify?budget_ms={times * FULL_MS:.3f}&top_k=1" for times in (3, 8)}
    assert row["figures"]["wasted_late"]["mean"] == 0.25  # from the difference of two /metrics
    scripted.tiers = TIERS | {"answers": "features"}
    replayed(scripted.url, tmp_path, *given)
    assert scripted.paths[-1].startswith("/embed?budget_ms=")
    assert "top_k" not in scripted.paths[-1]


def test_a_load_is_relative_to_a_capacity(scripted: ScriptedServer, tmp_path: Path) -> None:
    folder = scripts(tmp_path / "images", "answer 0")
    given = ("--load", "0.5", "--capacity", "300", "--requests", "30", "--images", str(folder))
    row, _ = replayed(scripted.url, tmp_path, *given)
    assert (row["rate"], row["load"]) == (150, 0.5)


def test_a_lagging_load_generator_invalidates_the_run(
    scripted: ScriptedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(replay, "MAX_LAG_S", 0.0)
    folder = scripts(tmp_path / "images", "answer 0")
    report = tmp_path / "report.json"
    flags = ("--trace", "poisson", "--rate", "100", "--requests", "20", "--images", str(folder))
    assert start(["replay", scripted.url, *flags, "--json", str(report)]) == 1
    printed = capsys.readouterr()
    assert "INVALID" in printed.out
    assert "invalid run: the load generator lagged" in printed.err
    assert json.loads(report.read_text())["about"]["void"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ((), 2, "--rate"),
        (("--rate", "5", "--load", "1"), 2, "--load and --rate are mutually exclusive"),
        (("--rate", "5", "--pin", "4095"), 1, "--pin 4095"),
        (("--rate", "5", "--images", "nowhere"), 1, "nowhere"),
        (("--rate", "5", "--images", "bad"), 1, "415 as the test asked"),
    ],
)
def test_an_error_is_one_line(
    scripted: ScriptedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    scripts(tmp_path / "bad", "unsupported-type 0")
    monkeypatch.chdir(tmp_path)
    assert start(["replay", scripted.url, "--trace", "poisson", *flags]) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "https://example.org", "ftp:"])
def test_no_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(["replay", url, "--trace", "poisson", "--rate", "5", "--ready-s", "0"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert url[:5] in line


def test_a_server_that_is_still_measuring_is_waited_for(
    scripted: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.not_ready = 3
    folder = scripts(tmp_path / "images", "answer 0")
    replayed(scripted.url, tmp_path, "--rate", "100", "--requests", "5", "--images", str(folder))
    [line] = [line for line in capsys.readouterr().err.splitlines() if "ready" in line]
    assert line == f"{scripted.url} is not ready yet (measuring latencies); waiting up to 60 s"


def test_a_server_that_does_not_listen_yet_is_waited_for(
    scripted: ScriptedServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusals = iter([ConnectionRefusedError(111, "Connection refused")])

    def refuse_once(url: str, **options: Any) -> Any:
        for error in refusals:
            raise URLError(error)
        return urlopen(url, **options)

    monkeypatch.setattr(replay, "urlopen", refuse_once)
    folder = scripts(tmp_path / "images", "answer 0")
    replayed(scripted.url, tmp_path, "--rate", "100", "--requests", "5", "--images", str(folder))
    [line] = [line for line in capsys.readouterr().err.splitlines() if "ready" in line]
    assert line == f"{scripted.url} is not ready yet (connection refused); waiting up to 60 s"


def test_a_server_that_requires_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid(url: str, **_: Any) -> Any:
        if url.endswith("/readyz"):
            return io.BytesIO()
        raise HTTPError(url, 401, "Unauthorized", Message(), None)

    monkeypatch.setattr(replay, "urlopen", forbid)
    assert start(["replay", "http://127.0.0.1:9", "--rate", "5"]) == 1
    assert "requires an API key" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "0.05"])
def test_waiting_for_a_server_is_bounded(
    scripted: ScriptedServer, seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.not_ready = 10**6
    assert start(["replay", scripted.url, "--rate", "5", "--ready-s", seconds]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"pcae-serve: {scripted.url} is not ready: measuring latencies"


def test_a_server_without_latencies(
    scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.tiers = TIERS | {"tiers": [tier("full", 0.8, 1.0, latency_ms=None)]}
    assert start(["replay", scripted.url, "--rate", "5"]) == 1
    assert "has not measured its latencies" in capsys.readouterr().err
