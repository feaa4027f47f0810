"""pcae-serve classify, as a person calls it: against the server, and one that keeps books."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pcae_serve.cli import start
from pcae_serve.commands.classify import Classify
from pcae_serve.commands.classify_on_server import MAX_IN_FLIGHT
from pcae_serve.schemas import Classification
from tests.support.bundles import write_bundle
from tests.support.images import image_bytes
from tests.support.server_process import COMMAND, server
from tests.support.stand_in import ANSWER, SIMULATED, reserved_port, stand_in

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real server, with the simulated engine."""
    root = tmp_path_factory.mktemp("served")
    flags = ("--bundle", str(write_bundle(root / "bundle")), *SIMULATED, "--budget-ms", "20000")
    with server(*flags, cache=root) as (url, _):
        yield url


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four images in the working directory, from dark to bright."""
    monkeypatch.chdir(tmp_path)
    for name, level in (("a.png", 0), ("b.png", 100), ("c.png", 150), ("d.png", 250)):
        Path(name).write_bytes(image_bytes(level))
    return ["a.png", "b.png", "c.png", "d.png"]


class Books:
    """What a stand-in was asked: queries, keys, and how many requests it had at the same time."""

    def __init__(self, **answer: Any) -> None:
        self.queries = list[dict[str, list[str]]]()
        self.keys = list[str | None]()
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()
        self._answer = json.dumps(ANSWER | answer).encode()

    def talk(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer, after as many milliseconds as the body says."""
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        with self._lock:
            self.queries.append(parse_qs(urlsplit(handler.path).query))
            self.keys.append(handler.headers["X-API-Key"])
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(int(body) / 1e3)
        with self._lock:
            self._now -= 1
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(self._answer)))
        handler.end_headers()
        handler.wfile.write(self._answer)


def test_a_line_for_each_file(url: str, files: list[str], capsys: Captured) -> None:
    assert start(["classify", *files, "--url", url, "--tier", "fast"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    pattern = r"(\S+)  (\w+) (0\.\d{4})  \((\w+), (\d+) ms(, late)?\)"
    lines = [re.fullmatch(pattern, line) for line in output.out.splitlines()]
    found = [line.group(1, 2, 4) for line in lines if line is not None]
    labels = ("dark", "dim", "light", "bright")
    assert found == [(file, label, "fast") for file, label in zip(files, labels, strict=True)]


def test_json_lines_hold_the_whole_answer(url: str, files: list[str], capsys: Captured) -> None:
    flags = ["--json", "--top-k", "2", "--budget-ms", "9000", "--min-tier", "balanced"]
    assert start(["classify", "--url", url, *flags, *files[2:]]) == 0
    output = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in output] == ["c.png", "d.png"]
    assert [line["predictions"][0]["label"] for line in output] == ["light", "bright"]
    assert all(len(line["predictions"]) == 2 for line in output)
    assert all(line["tier"] == "full" and line["met_budget"] for line in output)
    assert all(line["took_ms"] >= line["timings_ms"]["compute"] > 0 for line in output)


def test_a_file_that_fails_does_not_stop_the_others(
    url: str, files: list[str], capsys: Captured
) -> None:
    Path("empty.png").write_bytes(b"")
    Path("folder").mkdir()
    names = ["nowhere.png", files[0], "empty.png", "folder", files[3]]
    assert start(["classify", "--url", url, *names]) == 1
    output = capsys.readouterr()
    assert [line.split("  ")[0] for line in output.out.splitlines()] == ["a.png", "d.png"]
    assert output.err.splitlines() == [
        "pcae-serve: folder: a folder without images",
        "pcae-serve: nowhere.png: No such file or directory",
        "pcae-serve: empty.png: the request body is empty; send the image file's bytes",
    ]


def test_a_table_is_continued(url: str, files: list[str], capsys: Captured) -> None:
    command = ["classify", "--url", url, "--out", "r.csv"]
    assert start([*command, *files[:2], "nowhere.png"]) == 0
    assert "nowhere.png: No such file or directory" in capsys.readouterr().err
    assert start([*command, *files]) == 0
    assert "2 images" in capsys.readouterr().err
    rows = [line.split(",") for line in Path("r.csv").read_text().splitlines()[1:]]
    labels = ("dark", "dim", "light", "bright")
    assert [(row[0], row[2]) for row in rows] == list(zip(files, labels, strict=True))
    assert start(["classify", *files, "--out", "r.csv"]) == 1
    assert "was written with bundle none, not" in capsys.readouterr().err


def test_a_refusal_is_printed_for_each_file(url: str, files: list[str], capsys: Captured) -> None:
    assert start(["classify", *files[:2], "--url", url, "--tier", "turbo"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert [line.split(": ")[1] for line in output.err.splitlines()] == files[:2]
    assert output.err.count("choose one of fast, balanced, full") == 2


def test_no_server_listens(files: list[str], capsys: Captured) -> None:
    with reserved_port() as (_, port):
        assert start(["classify", files[0], "--url", f"http://127.0.0.1:{port}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pcae-serve: a.png: cannot connect to http://127.0.0.1:")
    assert start(["classify", files[0], "--url", "ftp://here"]) == 1
    assert "not an address" in capsys.readouterr().err


def test_standard_input_and_names_of_any_kind(url: str, files: list[str]) -> None:
    names = ["a, b.png", 'say "x".png', " c ", "[d]", "null", "-e.png"]
    for name in names:
        Path(name).write_bytes(image_bytes(100))
    command = (*COMMAND, "classify", "--url", url, "--json", "-", *names[:-1], "--", names[-1])
    done = subprocess.run(command, input=image_bytes(250), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    output = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["file"] for line in output] == ["-", *names]
    assert [line["predictions"][0]["label"] for line in output] == ["bright"] + ["dim"] * len(names)


def test_a_reader_of_only_the_first_line_ends_the_command_quietly(tmp_path: Path) -> None:
    file, books = tmp_path / "wait", Books()
    file.write_text("100")
    with stand_in(books.talk) as (url, _):
        command = (*COMMAND, "classify", "--url", url, *[str(file)] * 200)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert b"dim 0.9000" in process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(timeout=30) == 1
    assert len(books.queries) < 200


def test_several_images_are_in_flight_and_printed_in_order(
    tmp_path: Path, capsys: Captured
) -> None:
    books, together = Books(), threading.Barrier(MAX_IN_FLIGHT, timeout=20)
    names = [str(tmp_path / str(i)) for i in range(3 * MAX_IN_FLIGHT)]
    for name in names:
        Path(name).write_text("100" if name is names[0] else "0")

    def talk(handler: BaseHTTPRequestHandler) -> None:
        together.wait()  # passes only while all the others are inside, too
        books.talk(handler)

    with stand_in(talk) as (url, connections):
        assert start(["classify", "--url", url, *names]) == 0
    assert books.most <= MAX_IN_FLIGHT
    assert len(connections) <= MAX_IN_FLIGHT
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == names


def test_the_flags_reach_the_server(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key, books = tmp_path / "0", tmp_path / "key", Books()
    file.write_text("0")
    key.write_text("# the first of two\n\nfrom-file name=batch\nanother-key\n")
    monkeypatch.setenv("PCAE_API_KEY", "")  # as good as none
    with stand_in(books.talk) as (url, _):
        ask = ["classify", str(file), "--url", url]
        assert start(ask) == 0
        assert books.queries[0] == {"tier": ["auto"], "top_k": ["1"], "explain": ["false"]}
        monkeypatch.setenv("PCAE_API_KEY", "from-variable")
        assert start(ask) == 0
        more = ["--tier", "full", "--min-tier", "fast", "--budget-ms", "9000", "--top-k", "3"]
        assert start([*ask, "--api-key-file", str(key), *more]) == 0
        output = {name: values[0] for name, values in books.queries[2].items()}
        assert 8000 < float(output.pop("budget_ms")) <= 9000
        assert output == {"tier": "full", "min_tier": "fast", "top_k": "3", "explain": "false"}
        assert books.keys == [None, "from-variable", "from-file"]
        for content in (None, b"", b" \n# none\n", b"\xff"):
            if content is not None:
                key.write_bytes(content)
            wrong = key if content is not None else tmp_path / "nowhere"
            assert start([*ask, "--api-key-file", str(wrong)]) == 1
            [line] = capsys.readouterr().err.splitlines()
            assert line.startswith(f"pcae-serve: --api-key-file {wrong}: ")
    assert len(books.keys) == 3


def test_a_late_answer_is_marked(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "0"
    file.write_text("0")
    with stand_in(Books(met_budget=False).talk) as (url, _):
        assert start(["classify", str(file), "--url", url]) == 0
    assert capsys.readouterr().out.endswith(" ms, late)\n")


@pytest.mark.parametrize(
    ("met_budget", "budget_ms", "took_ms", "late"),
    [
        (True, None, 60.0, False),
        (True, 100.0, 60.0, False),
        (True, 40.0, 60.0, True),  # the server met it, the way back did not
        (False, 100.0, 60.0, True),
    ],
)
def test_an_answer_is_late_for_the_server_or_here(
    met_budget: bool, budget_ms: float | None, took_ms: float, late: bool
) -> None:
    answer = Classification.model_validate(ANSWER | {"met_budget": met_budget})
    line = Classify(files=["a.png"], budget_ms=budget_ms)._line("a.png", answer, took_ms)
    assert line == f"a.png  dim 0.9000  (fast, 60 ms{', late' if late else ''})"


@pytest.mark.parametrize(
    ("words", "output"),
    [
        ([], "name the images: pcae-serve classify FILE…"),
        (["--"], "name the images: pcae-serve classify FILE…"),
        (["a", "--port", "9"], "unrecognized arguments: --port"),
        (["a", "-v"], "unrecognized arguments: -v"),
        (["-", "a", "-"], "standard input (-) can be read only once"),
        (["a", "--top-k", "0"], "--top-k: "),
        (["a", "--budget-ms", "nan"], "--budget-ms: "),
        (["a", "--budget-ms", "-1"], "--budget-ms: "),
        (["a", "--url", "x", "--bundle", "b"], "--bundle cannot be used with --url"),
        (
            ["a", "--url", "x", "--out", "a.csv", "--total-time", "9s"],
            "--total-time cannot be used",
        ),
        (["a", "--api-key-file", "k"], "--api-key-file needs --url"),
        (["a", "--overwrite"], "--overwrite needs --out"),
        (["a", "--explain", "b"], "--explain needs --out"),
        (["a", "--total-time", "9s"], "--total-time needs --out"),
        (["-", "--out", "a.csv"], "standard input (-) cannot be used with --out"),
        (["a", "--json", "--out", "a.csv"], "--json cannot be used with --out"),
        (["a", "--total-time", "soon"], "--total-time: 'soon' is not a duration"),
        (
            ["a", "--out", "a.csv", "--total-time", "9s", "--tier", "full"],
            "--total-time cannot be used with --tier",
        ),
        (
            ["a", "--out", "a.csv", "--total-time", "9s", "--budget-ms", "9"],
            "--total-time cannot be used with --budget-ms",
        ),
    ],
)
def test_a_wrong_call(words: list[str], output: str, capsys: Captured) -> None:
    assert start(["classify", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pcae-serve: {output}")


def test_without_the_extra(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pcae_serve.client", raising=False)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    assert start(["classify", "a.png", "--url", "localhost:8000"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == "pcae-serve: pcae-serve classify --url needs httpx2: pip install '.[client]'"


def test_the_command_is_in_the_help(capsys: Captured) -> None:
    assert start(["--help"]) == 0
    assert "classify images, here or on a running server" in capsys.readouterr().out
    assert start(["classify", "--help"]) == 0
    output = capsys.readouterr().out
    assert "classify [options] FILE..." in output
    for flag in ("url", "tier", "budget-ms", "min-tier", "top-k", "json", "api-key-file"):
        assert f"--{flag} " in output.replace(",", " ")
    for flag in ("out", "overwrite", "strict", "total-time", "explain", "bundle", "backend"):
        assert f"--{flag} " in output.replace(",", " ").replace("\n", " ")
