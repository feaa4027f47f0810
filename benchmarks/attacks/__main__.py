"""Run attacks and print a table: python -m benchmarks.attacks --help."""

import argparse
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from benchmarks.attacks.drain import LOST, measure_drain
from benchmarks.attacks.measurement import ROOT, Options, Row, measure
from benchmarks.attacks.registry import ATTACKS

DRAIN = "drain"
COLUMNS = (
    "| attack | polite/s | attainment | p50, p99 ms | `/livez` p99, max ms | memory MB at rest,"
    " peak, kept | recovered after | polite statuses | attacker's |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, default=ROOT, help="source tree to serve from")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each attack")
    parser.add_argument("--only", nargs="+", choices=[*ATTACKS, DRAIN], default=[*ATTACKS, DRAIN])
    parser.add_argument("--memory-mb", type=float, default=300.0, help="for all requests")
    parser.add_argument("--recovery-s", type=float, default=60.0, help="wait for it at most")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    options = Options(
        source=arguments.source.resolve(),
        seconds=arguments.seconds,
        server_core=arguments.server_core,
        client_core=arguments.client_core,
        recovery_s=arguments.recovery_s,
        memory_mb=arguments.memory_mb,
    )
    print(*COLUMNS, sep="\n", flush=True)
    rows = []
    for name in arguments.only:
        if name != DRAIN:
            rows.append(measure(ATTACKS[name], options))
            print(line(rows[-1]), flush=True)
    report = {
        "commit": commit(options.source),
        "options": {name: str(value) for name, value in asdict(options).items()},
        "attacks": {name: kind.about for name, kind in ATTACKS.items()},
        "rows": [asdict(row) for row in rows],
    }
    if DRAIN in arguments.only:
        seen = measure_drain(options)
        report[DRAIN] = dict(seen)
        print(f"\nSIGTERM, 24 connections that stay open: {seen[LOST]} lost; {dict(seen)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def line(row: Row) -> str:
    """Return a row of the Markdown table."""
    statuses, attacker = (
        ", ".join(f"{count} x {status}" for status, count in counts.items())
        for counts in (row.statuses, row.attacker)
    )
    troubles = [f"log {row.log_mb:.1f} MB"] if row.log_mb > 1 else []
    troubles += [f"{row.tracebacks} tracebacks"] if row.tracebacks else []
    troubles += [] if row.alive else ["server ended"]
    cells = (
        row.attack,
        f"{row.rate:.0f}",
        f"{row.attainment:.1%}",
        f"{row.p50_ms:.0f}, {row.p99_ms:.0f}",
        f"{row.livez_p99_ms:.0f}, {row.livez_max_ms:.0f}",
        f"{row.rest_mb:.0f}, {row.peak_mb:.0f}, {row.kept_mb:.0f}",
        f"{row.recovery_s:.1f} s",
        "; ".join([statuses, *troubles]),
        attacker,
    )
    return f"| {' | '.join(cells)} |"


def commit(source: Path) -> str:
    """Return the commit of a source tree, or `unknown`."""
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
