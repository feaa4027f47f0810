"""Soak test: 30 minutes at 80 % of the server's capacity, recording memory, files and threads.

    python benchmarks/soak.py --minutes 30 [--rate R] [--json FILE]

On two cores: the server on one, the load generator on the other. Without --rate, a short run above
capacity measures the answers in time per second; the soak runs at 80 % of that.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np

BIN = Path(sys.executable).parent
PORT = 8078
URL = f"http://127.0.0.1:{PORT}"
#: Budgets in multiples of the full tier's latency, with shares.
MIX = "8:0.7,50:0.3"
OVERLOAD_RATE, SHARE = 150, 0.8


def replay(rate: float, requests: int, folder: Path, name: str) -> dict[str, float]:
    out, rows = folder / f"{name}.json", folder / f"{name}.csv"
    command = [str(BIN / "pcae-serve"), "replay", URL, "--pin", "1", "--trace", "poisson"]
    command += ["--mix", MIX, "--rate", f"{rate:.3f}", "--requests", str(requests)]
    done = subprocess.run(
        [*command, "--json", str(out), "--rows", str(rows)], capture_output=True, text=True
    )
    if not out.exists():
        sys.exit(done.stderr)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
    [row] = json.loads(out.read_text())["rows"]
    return {name: figure["mean"] for name, figure in row["figures"].items() if figure}


def sample(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    return {
        "time_s": time.monotonic(),
        "rss_mb": int(fields["VmRSS"].split()[0]) / 1024,
        "threads": int(fields["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["taskset", "-c", "0", str(BIN / "pcae-serve"), "--port", str(PORT)]
        command += ["--threads", "1", "--decode-threads", "1", "--cache-dir", name]
        log = (folder / "server.log").open("w")
        server = subprocess.Popen([*command, "--no-access-log"], stderr=log)
        try:
            soak(arguments, server.pid, folder)
        finally:
            server.terminate()
            print("exit code of the server:", server.wait(60))


def soak(arguments: argparse.Namespace, pid: int, folder: Path) -> None:
    for _ in range(120):
        try:
            urlopen(f"{URL}/readyz").close()
            break
        except OSError:
            time.sleep(0.5)
    rate = arguments.rate
    if rate is None:
        rate = (
            SHARE * replay(OVERLOAD_RATE, 10 * OVERLOAD_RATE, folder, "overload")["goodput_per_s"]
        )
    print(f"{rate:.1f} requests per second for {arguments.minutes:g} minutes")
    samples, done = [sample(pid)], threading.Event()

    def watch() -> None:
        while not done.wait(5):
            samples.append(sample(pid))

    threading.Thread(target=watch, daemon=True).start()
    figures = replay(rate, int(60 * rate * arguments.minutes), folder, "soak")
    done.set()
    content = {"rate": rate, "figures": figures, "windows": windows(folder / "soak.csv")}
    content["samples"] = samples
    for name in ("rss_mb", "files", "threads"):
        values = np.array([reading[name] for reading in samples])
        tenth = max(1, len(values) // 10)
        first, last = np.median(values[tenth : 2 * tenth]), np.median(values[-tenth:])
        print(
            f"{name}: {first:.1f} in the second tenth, {last:.1f} in the last"
            f" ({100 * (last / first - 1):+.1f} %), maximum {values.max():.1f}"
        )
    print(json.dumps(figures))
    for window in content["windows"]:
        print("  ".join(f"{key} {value:.1f}" for key, value in window.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content))


def windows(path: Path, count: int = 10) -> list[dict[str, float]]:
    """Return latency percentiles of the answers in `count` parts of the run."""
    with path.open() as file:
        took_ms = [
            1e3 * (float(row["ended_s"]) - float(row["scheduled_s"]))
            for row in csv.DictReader(file)
            if row["status"] == "200"
        ]
    parts = np.array_split(np.array(took_ms), count)
    return [
        {f"p{q}_ms": float(np.percentile(part, q)) for q in (50, 95, 99)}
        for part in parts
        if len(part)
    ]


if __name__ == "__main__":
    main()
