"""Attacks in short form: what a polite client sees while each of them runs.

The bounds are generous, because other processes may use the cores. Without the protection that an
attack tests, attainment is near 0, or recovery takes minutes.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from benchmarks.attacks import __main__ as program
from benchmarks.attacks.base import Answer, Attack, Target, connect, post
from benchmarks.attacks.polite import Seen, probe_livez
from benchmarks.attacks.registry import ATTACKS

ROOT = Path(__file__).parents[2]
SECONDS = 6
MEMORY_MB = 300

#: Attacks that do their harm by being answered, and how often at least in that time.
ANSWERED = {"pinned": 5, "pinned-balanced": 5, "greedy-batches": 5, "greedy-singles": 5}


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run one attack as a person would, and return its report."""
    cores = sorted(os.sched_getaffinity(0))
    flags = ["--seconds", f"{SECONDS}", "--memory-mb", f"{MEMORY_MB}", "--recovery-s", "30"]
    flags += ["--server-core", f"{cores[0]}", "--client-core", f"{cores[-1]}"]
    command = [sys.executable, "-m", "benchmarks.attacks", "--only", name, *flags]
    report = folder / "report.json"
    done = subprocess.run(
        [*command, "--json", str(report)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(report.read_text())
    return content


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_a_polite_client_is_served_under_attack(name: str, tmp_path: Path) -> None:
    [row] = run(name, tmp_path)["rows"]
    assert row["alive"], row
    assert row["attainment"] >= 0.4, row
    assert row["livez_max_ms"] < 5000, row
    assert row["recovery_s"] < 15, row
    assert row["peak_mb"] < row["rest_mb"] + MEMORY_MB + 200, row
    assert (row["tracebacks"], row["log_mb"] < 1) == (0, True), row
    assert row["attacker"].get("200", 0) >= ANSWERED.get(name, 0), row


@pytest.mark.slow
def test_no_kept_connection_loses_a_request_at_a_stop(tmp_path: Path) -> None:
    seen = run(program.DRAIN, tmp_path)[program.DRAIN]
    assert seen["200"] > 0
    assert seen.get("lost", 0) == 0, seen


def test_every_attack_has_a_name_and_one_line() -> None:
    for name, kind in ATTACKS.items():
        assert kind.name == name
        assert "\n" not in kind.about
        assert kind.polite.startswith("budget_ms=")


T = TypeVar("T")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


def with_server(handler: Handler, client: Callable[[Target], Coroutine[Any, Any, T]]) -> T:
    async def main() -> T:
        async with await asyncio.start_server(handler, "127.0.0.1") as server:
            return await client(Target(server.sockets[0].getsockname()[1], "secret"))

    return asyncio.run(main())


async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer 503 to the first request of a connection, 200 to the next, then close."""
    for status in (b"503 Busy", b"200 OK"):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        await reader.readexactly(length)
        body = b"yes" if b"Authorization: Bearer secret" in head else b""
        fields = b"Content-Length: %d\r\nConnection: close" % len(body)
        writer.write(b"HTTP/1.1 %s\r\n%s\r\n\r\n%s" % (status, fields, body))
    writer.close()
    await writer.wait_closed()


def test_answers_are_read_one_after_the_other() -> None:
    async def client(target: Target) -> list[Answer]:
        async with connect(target) as connection:
            answers = []
            for body in (b"image", b"other"):
                head = target.head("POST /classify", f"Content-Length: {len(body)}")
                await connection.send(head + body)
                answers.append(await connection.answer())
            return answers

    answers = with_server(answering, client)
    fields = {"content-length": "3", "connection": "close", "": ""}
    assert answers == [Answer(503, fields), Answer(200, fields)]


def test_what_is_not_answered_in_time_is_a_miss() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        await writer.wait_closed()

    async def refused(target: Target) -> int:
        return await post(target, "/classify", b"image")

    assert with_server(answering, refused) == 503
    seen = with_server(silent, lambda target: probe_livez(target, 0.5))
    assert seen.attainment == 0
    assert len(seen.seconds) == 2


def test_percentiles_and_attainment_count_every_request() -> None:
    seen = Seen(seconds=[0.001 * i for i in range(1, 101)], in_time=95)
    assert seen.attainment == 0.95
    assert [seen.percentile_ms(share) for share in (0.5, 0.99, 1)] == pytest.approx([51, 100, 100])
    assert Seen().attainment == Seen().percentile_ms(0.5) == 0


@pytest.mark.parametrize("kind", [ATTACKS[name] for name in ("exif", "tiff-rationals", "webp")])
def test_an_image_of_an_attack_has_the_size_that_it_states(kind: type[Attack]) -> None:
    body = kind().body  # type: ignore[attr-defined]
    megabytes = {"exif": 5, "tiff-rationals": 18.4, "webp": 0}[kind.name]
    assert len(body) / 1e6 == pytest.approx(megabytes, abs=0.1)
