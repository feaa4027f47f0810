"""pcae-serve replay, as a person calls it, against real sockets: the server, and a stand-in.

The stand-in does what the "image" it is sent says, so that every fate of a request can be had.
"""

import asyncio
import csv
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcae_serve.cli import start
from pcae_serve.loadtest import replay
from pcae_serve.loadtest.load_generator import Sent, send
from pcae_serve.loadtest.replay import Answer, Record, in_hand
from pcae_serve.loadtest.report import FAILED
from pcae_serve.loadtest.simulator import End
from pcae_serve.loadtest.workload import Workload
from pcae_serve.scheduling.tiers import TierTable
from tests.support.images import image_bytes
from tests.support.server_process import server

FULL_MS = 20.0


def tier(name: str, top1: float, ms: float, **changes: Any) -> dict[str, Any]:
    latency_ms = {"1": ms, "8": 4 * ms}
    quality = {"accuracy": {"top1": top1}, "agreement": None, "fidelity": None}
    return {"name": name, "dominated": False, "latency_ms": latency_ms} | quality | changes


TOLD = {
    "bundle": "toy", "backend": "stand-in", "backend_version": "1", "device": "cpu",
    "policy": "its-own", "answers": "logits", "labels": ["dark", "bright"],
    "tiers": [tier("fast", 0.6, 5.0), tier("full", 0.8, FULL_MS)],
}  # fmt: skip


class StandIn:
    """An HTTP server on a thread; what it is asked to do stands in the body: `verb seconds`."""

    def __init__(self) -> None:
        self.paths = list[str]()
        self.connections = 0
        self.compute = 0  # times that /metrics was read
        self.told: dict[str, Any] = TOLD
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve)
        self._ready = threading.Event()

    def __enter__(self) -> "StandIn":
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        listener = await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=1000)
        self.port = listener.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._ready.set()
        await self._stop.wait()
        listener.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        if method == "GET":
            body = json.dumps(self.told)
            if path == "/metrics":
                body = (
                    f'pcae_compute_seconds_total{{tier="fast"}} {self.compute}.0\n'
                    f'pcae_wasted_compute_seconds_total{{reason="late"}} {self.compute / 4}\n'
                )
                self.compute += 1
            writer.write(reply(200, body, "Connection: close\r\n"))
            return False
        self.paths.append(path)
        length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
        verb, seconds = (await reader.readexactly(length)).decode().split()
        await asyncio.sleep(float(seconds))
        answer = {"tier": "full", "met_budget": True, "predictions": [{"index": 1}]}
        match verb:
            case "answer":
                writer.write(reply(200, json.dumps(answer)))
            case "close":  # the next request finds the connection closed
                writer.write(reply(200, json.dumps(answer | {"tier": "fast"})))
                return False
            case "hang-up":
                return False
            case status:
                writer.write(reply(int(status), json.dumps({"detail": "no such luck"})))
        return True


def reply(status: int, body: str, headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body.encode()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as running:
        yield running


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that tests run on may be busy: whether a run is void has a test of its own."""
    monkeypatch.setattr(replay, "MAX_LAG_S", 60.0)
    monkeypatch.setattr(replay, "PAUSE_S", 0.0)
    monkeypatch.setattr(replay, "PATIENCE_S", 0.5)


def images(folder: Path, *bodies: str) -> Path:
    """A folder of so-called images: each says what is to become of it."""
    folder.mkdir(exist_ok=True)
    for i, body in enumerate(bodies):
        (folder / f"{i}.png").write_text(body)
    return folder


def replayed(url: str, tmp_path: Path, *flags: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The report's only row, and every request's."""
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
        given = ("--rate", "100", "--requests", "60", "--mix", "400", "--seeds", "2")
        row, rows = replayed(
            url, tmp_path, *given, "--images", str(tmp_path / "bright"), "--labels", "folders"
        )
    assert (row["offered"], len(rows)) == (60, 120)
    assert row["figures"]["attainment"]["mean"] > 0.9
    assert row["figures"]["effective_accuracy"]["mean"] == row["figures"]["attainment"]["mean"]
    assert row["figures"]["accuracy_recovered"]["mean"] > 0.9  # an idle machine, a wide budget
    assert row["policy"]
    assert {line["tier"] for line in rows} <= {"fast", "balanced", "full", ""}
    assert row["client"]["met_by_server"] > 0.9


def test_every_fate_is_told(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fates = ("answer 0.001", "answer 0.3", "503 0.03", "422 0", "504 0.001", "500 0", "hang-up 0")
    folder = images(tmp_path / "images", *fates)
    given = ("--rate", "200", "--requests", "140", "--mix", "8", "--images", str(folder))
    row, rows = replayed(stand_in.url, tmp_path, *given)
    by_status = {status: [r["end"] for r in rows if r["status"] == status] for status in (
        "200", "503", "422", "504", "500", "0"
    )}  # fmt: skip
    assert set(by_status["200"]) == {"in_time", "late"}
    assert set(by_status["503"]) == set(by_status["422"]) == {"refused"}
    assert set(by_status["504"]) == {"expired"}
    assert set(by_status["500"]) == set(by_status["0"]) == {"failed"}
    figures = row["figures"]
    shares = ("attainment", "late", "refused", "expired", "failed")
    assert sum(figures[name]["mean"] for name in shares) == pytest.approx(1)
    counted = len([end for end in by_status["200"] if end == "in_time"])
    assert figures["attainment"]["mean"] == pytest.approx(counted / 140)
    # its own clock began as it read the head: the server calls all of its answers timely
    assert row["client"]["met_by_server"] == pytest.approx(len(by_status["200"]) / 140)
    assert 30 <= row["client"]["503_p50_ms"] <= row["client"]["503_p99_ms"]
    assert row["client"]["fault: connection lost"] == len(by_status["0"])
    out = capsys.readouterr().out
    assert "status 503" in out
    assert "connection lost" in out
    assert "its-own" in out


def test_requests_leave_whatever_becomes_of_earlier_ones(stand_in: StandIn, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "answer 0.4")
    given = ("--rate", "400", "--requests", "80", "--mix", "1", "--images", str(folder))
    row, rows = replayed(stand_in.url, tmp_path, *given)
    assert max(float(r["sent_s"]) for r in rows) < min(float(r["ended_s"]) for r in rows)
    assert stand_in.connections > 80  # more than the budgets called for: they opened on the way
    assert row["figures"]["late"]["mean"] == 1
    assert row["figures"]["p50_ms"]["mean"] >= 400


def test_times_count_from_when_a_request_was_due(tmp_path: Path, stand_in: StandIn) -> None:
    request = b"POST / HTTP/1.1\r\nContent-Length: 12\r\n\r\nanswer 0.001"
    sent = send("127.0.0.1", stand_in.port, [request] * 3, [0.0, 0.0, 0.2], 3, 5.0)
    assert (sent.status == 200).all()
    assert (sent.sent_s >= [0, 0, 0.2]).all()
    assert 0.2 < sent.ended_s[2] < 1
    assert (sent.ended_s > sent.sent_s).all()


def test_a_late_sender_cannot_make_a_server_look_quick() -> None:
    load = Workload(np.array([0.0, 1.0]), np.array([0.5, 0.5]))
    sent = Sent(
        np.array([0.9, np.nan]), np.array([1.0, np.nan]), np.array([200, 0], np.int16), [b""] * 2
    )
    run = Record("poisson", 1.0, 0, load, sent, [Answer("full", True, 0), None], None, {})
    outcome = run.outcome(TierTable(("fast", "full"), (0.6, 0.8)))
    assert outcome.end.tolist() == [End.LATE, FAILED]  # 0.1 s on the wire, 1.0 s since it was due
    assert outcome.end_s[0] - outcome.arrival_s[0] == 1.0
    assert run.lag_s[0] == 0.9


def test_a_connection_closed_meanwhile_costs_no_request(stand_in: StandIn, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "close 0")
    given = ("--rate", "100", "--requests", "60", "--mix", "100", "--images", str(folder))
    row, _ = replayed(stand_in.url, tmp_path, *given)
    assert row["figures"]["failed"]["mean"] == 0
    assert row["figures"]["accuracy_recovered"]["mean"] == pytest.approx(0)  # it said "fast"


def test_no_answer_is_a_failure_and_is_not_waited_for(stand_in: StandIn, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "answer 0", "answer 60")
    (tmp_path / "labels.csv").write_text("file,label\n0.png,bright\n1.png,dark\n")
    given = ("--rate", "100", "--requests", "20", "--mix", "1", "--images", str(folder))
    row, rows = replayed(stand_in.url, tmp_path, *given, "--labels", str(tmp_path / "labels.csv"))
    lost = [r for r in rows if r["status"] == "0"]
    assert row["figures"]["failed"]["mean"] == len(lost) / 20 > 0
    assert {r["ended_s"] for r in lost} == {""}
    assert {r["right"] for r in rows if r["status"] == "200"} == {"1"}


def test_what_is_asked_for(stand_in: StandIn, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "answer 0")
    given = ("--rate", "100", "--requests", "40", "--mix", "3:0.5,8:0.5", "--images", str(folder))
    row, _ = replayed(stand_in.url, tmp_path, *given)
    [_, *asked] = stand_in.paths  # the first one tries whether the server takes such images
    assert set(asked) == {f"/classify?budget_ms={times * FULL_MS:.3f}&top_k=1" for times in (3, 8)}
    assert row["figures"]["wasted_late"]["mean"] == 0.25  # by the difference of two /metrics
    stand_in.told = TOLD | {"answers": "features"}
    replayed(stand_in.url, tmp_path, *given)
    assert stand_in.paths[-1].startswith("/embed?budget_ms=")
    assert "top_k" not in stand_in.paths[-1]


def test_a_load_is_relative_to_a_capacity(stand_in: StandIn, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "answer 0")
    given = ("--load", "0.5", "--capacity", "300", "--requests", "30", "--images", str(folder))
    row, _ = replayed(stand_in.url, tmp_path, *given)
    assert (row["rate"], row["load"]) == (150, 0.5)


def test_a_sender_that_lags_voids_the_run(
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(replay, "MAX_LAG_S", 0.0)
    folder = images(tmp_path / "images", "answer 0")
    report = tmp_path / "report.json"
    flags = ("--trace", "poisson", "--rate", "100", "--requests", "20", "--images", str(folder))
    assert start(["replay", stand_in.url, *flags, "--json", str(report)]) == 1
    told = capsys.readouterr()
    assert "VOID" in told.out
    assert "void: the sender fell" in told.err
    assert json.loads(report.read_text())["about"]["void"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ((), 2, "--rate"),
        (("--rate", "5", "--load", "1"), 2, "--load and --rate"),
        (("--rate", "5", "--pin", "4095"), 1, "--pin 4095"),
        (("--rate", "5", "--images", "nowhere"), 1, "nowhere"),
        (("--rate", "5", "--images", "bad"), 1, "415 no such luck"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    images(tmp_path / "bad", "415 0")
    monkeypatch.chdir(tmp_path)
    assert start(["replay", stand_in.url, "--trace", "poisson", *flags]) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "https://example.org", "ftp:"])
def test_no_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(["replay", url, "--trace", "poisson", "--rate", "5"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert url[:5] in line


def test_a_server_that_has_not_measured_yet(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.told = TOLD | {"tiers": [tier("full", 0.8, 1.0, latency_ms=None)]}
    assert start(["replay", stand_in.url, "--rate", "5"]) == 1
    assert "/readyz" in capsys.readouterr().err


def test_connections_are_as_many_as_budgets_let_be_in_hand() -> None:
    load = Workload(np.array([0.0, 1.0, 2.0, 9.0]), np.array([1.5, 1.5, 1.5, 1.0]))
    assert in_hand(load) == 2
    assert in_hand(Workload(np.zeros(5), np.ones(5))) == 5
