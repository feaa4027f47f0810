"""Memory of the server before, during and after bursts of large uploads.

    python benchmarks/bursts.py [--source DIR] [--requests 200] [--mb 20] [--rounds 3] [--json FILE]

Each burst sends all requests at once, each a photograph with random bytes behind its end. The
server runs from --source, which may be another checkout, with the demo bundle. Printed: the
statuses, the peak of resident memory, and resident memory three seconds after each burst.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.server_process import ANY_PORT, ready  # noqa: E402

#: Budget of a request: long, as it is memory that is measured and not time.
BUDGET_MS = 120_000
#: Time after a burst for the server to return memory.
QUIET_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, default=ROOT, help="checkout to run the server from")
    parser.add_argument("--requests", type=int, default=200, help="requests per burst")
    parser.add_argument("--mb", type=float, default=20, help="size of each body")
    parser.add_argument("--rounds", type=int, default=3, help="bursts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    body = photograph(int(options.mb * 1e6))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.source.resolve(), Path(folder), body, options)
    if options.json:
        options.json.write_text(json.dumps({"source": str(options.source), "rows": rows}, indent=1))


def photograph(length: int) -> bytes:
    """Return a JPEG file of 1 megapixel, filled up to `length` bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (125, 125, 3), np.uint8)
    Image.fromarray(noise).resize((1000, 1000)).save(file := BytesIO(), "JPEG", quality=50)
    return file.getvalue() + os.urandom(max(0, length - len(file.getvalue())))


def measure(
    source: Path, folder: Path, body: bytes, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run the server and the bursts; return one row at rest and one per burst."""
    log = folder / "server.log"
    flags = [*ANY_PORT, "--cache-dir", str(folder / "cache"), "--queue-limit", "10000"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pcae_serve", *flags],
            stderr=file,
            text=True,
            cwd=source,
            env=os.environ | {"PYTHONPATH": str(source)},
        )
    with ready(process, log) as url:
        rows = [row("at rest", process.pid, Counter())]
        for number in range(options.rounds):
            statuses = burst(int(url.rsplit(":", 1)[1]), body, options.requests)
            time.sleep(QUIET_S)
            rows.append(row(f"burst {number + 1}", process.pid, statuses))
    return rows


def burst(port: int, body: bytes, count: int) -> Counter[str]:
    """Send the body `count` times at once; return how many requests had each status."""
    statuses = Counter[str]()

    def send() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=2 * BUDGET_MS / 1e3)
        try:
            connection.request("POST", f"/classify?budget_ms={BUDGET_MS}", body)
            statuses[str(connection.getresponse().status)] += 1
        except (OSError, HTTPException) as error:
            statuses[type(error).__name__] += 1
        finally:
            connection.close()

    threads = [threading.Thread(target=send) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def row(name: str, pid: int, statuses: Counter[str]) -> dict[str, Any]:
    """Print and return resident memory now and at its peak, in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines())
    resident, peak = (int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    print(f"{name:10} resident {resident:7.0f} MiB   peak {peak:7.0f} MiB   {dict(statuses)}")
    return {"name": name, "resident_mib": resident, "peak_mib": peak, "statuses": statuses}


if __name__ == "__main__":
    main()
