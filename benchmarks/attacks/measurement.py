"""One attack from start to recovery, as one row of the table."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attacks import polite
from benchmarks.attacks.base import Attack, Target
from benchmarks.attacks.polite import Seen
from benchmarks.attacks.server import ServerProcess, serving

ROOT = Path(__file__).parents[2]
#: What the polite client offers of the server's capacity, and at most per second: its own core is
#: shared with the attacker.
SHARE, MAX_RATE = 0.3, 40.0
SETTLE_S = 3.0  # from the end of an attack until what the server keeps is read
KEYS = ("attacker-0123456789abcdef", "polite-0123456789abcdef")


@dataclass(frozen=True)
class Options:
    """How to measure."""

    source: Path
    seconds: float = 30.0
    server_core: int | None = 0
    client_core: int | None = 1
    recovery_s: float = 60.0  # at most
    memory_mb: float = 300.0  # for all requests, if the source tree has that setting
    capacity_s: float = 3.0


@dataclass(frozen=True)
class Row:
    """What an attack did."""

    attack: str
    rate: float  # polite requests per second
    attainment: float
    statuses: dict[str, int]
    attacker: dict[str, int]  # statuses that it got
    p50_ms: float
    p99_ms: float
    livez_p99_ms: float
    livez_max_ms: float
    rest_mb: float
    peak_mb: float
    kept_mb: float  # some seconds after the attack
    recovery_s: float  # until polite requests are answered in time again
    log_mb: float
    tracebacks: int
    alive: bool


def measure(attack: type[Attack], options: Options) -> Row:
    """Start a server, attack it for some seconds, and return what a polite client saw."""
    if options.client_core is not None:
        os.sched_setaffinity(0, {options.client_core})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(
            options.source,
            folder,
            _flags(attack, options, folder),
            core=options.server_core,
            descriptors=attack.descriptors,
        ) as server:
            return asyncio.run(_measure(attack, options, server))


async def _measure(attack: type[Attack], options: Options, server: ServerProcess) -> Row:
    attacker, own = KEYS if attack.needs_keys else (None, None)
    target, query = Target(server.port, own), attack.polite
    image = (ROOT / "pcae_serve" / "sample.png").read_bytes()
    capacity = await polite.measure_capacity(target, query, image, options.capacity_s)
    rate = min(SHARE * capacity, MAX_RATE)
    rest_mb = server.memory_mb()
    with _attacking(attack, Target(server.port, attacker)) as attacker_statuses:
        server.peak_mb = 0.0
        seen, livez = await asyncio.gather(
            polite.ask_politely(target, query, image, rate, options.seconds),
            polite.probe_livez(target, options.seconds),
        )
    recovery_s = await polite.time_to_recover(target, query, image, options.recovery_s)
    await asyncio.sleep(SETTLE_S)
    return _row(attack, rate, seen, livez, attacker_statuses, rest_mb, recovery_s, server)


def _row(
    attack: type[Attack],
    rate: float,
    seen: Seen,
    livez: Seen,
    attacker: dict[str, int],
    rest_mb: float,
    recovery_s: float,
    server: ServerProcess,
) -> Row:
    return Row(
        attack=attack.name,
        rate=round(rate, 1),
        attainment=round(seen.attainment, 4),
        statuses=dict(seen.statuses.most_common()),
        attacker=attacker,
        p50_ms=round(seen.percentile_ms(0.5), 1),
        p99_ms=round(seen.percentile_ms(0.99), 1),
        livez_p99_ms=round(livez.percentile_ms(0.99), 1),
        livez_max_ms=round(livez.percentile_ms(1), 1),
        rest_mb=round(rest_mb),
        peak_mb=round(server.peak_mb),
        kept_mb=round(server.memory_mb()),
        recovery_s=round(recovery_s, 1),
        log_mb=round(server.log_mb(), 2),
        tracebacks=server.tracebacks(),
        alive=server.process.poll() is None,
    )


def _flags(attack: type[Attack], options: Options, folder: Path) -> list[str]:
    flags = ["--profile-s", "2", *attack.flags]
    if "memory_mb:" in (options.source / "pcae_serve" / "settings.py").read_text():
        flags += ["--memory-mb", f"{options.memory_mb:g}"]
    if attack.needs_keys:
        keys = folder / "keys"
        keys.touch(0o600)
        keys.write_text("".join(f"{key}\n" for key in KEYS))
        flags += ["--api-keys-file", str(keys)]
    return flags


@contextmanager
def _attacking(attack: type[Attack], target: Target) -> Iterator[dict[str, int]]:
    """Attack for as long as the block runs; afterwards the yielded dict has the statuses."""
    statuses: dict[str, int] = {}
    arguments = [attack.name, str(target.port), *([target.key] if target.key else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.attacks.attacker", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n", "the attacker did not start"
        time.sleep(1)  # all of its connections are open
        yield statuses
    finally:
        process.stdin.close()
        try:
            process.wait(10)
            statuses |= json.loads(process.stdout.read() or b"{}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
