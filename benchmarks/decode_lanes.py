"""What a decoder process costs per image, compared with a thread; and what an idle one takes.

    python benchmarks/decode_lanes.py [--rounds 20] [--json FILE]

Both lanes decode the same file in turn; figures are medians of the differences and quartiles.
"""

import argparse
import asyncio
import io
import json
import os
import time
from pathlib import Path
from statistics import median, quantiles

import numpy as np
from PIL import Image

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.runtime.decode_call import decode_image
from pcae_serve.runtime.decode_processes import DecodeProcesses
from pcae_serve.runtime.decode_worker import Request

PREPROCESS = Preprocess(224, 256, (0.5,) * 3, (0.5,) * 3)
MEGA = 1_000_000


def photograph(width: int, height: int, kind: str) -> bytes:
    """Return a file of about a photograph's entropy."""
    noise = np.random.default_rng(0).normal(128, 40, (height // 8, width // 8, 3))
    picture = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((width, height))
    options = {"quality": 92} if kind != "PNG" else {"compress_level": 3}
    picture.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measure(rounds: int) -> dict[str, object]:
    processes = DecodeProcesses(1)
    rows = []
    start_s = time.perf_counter()
    small = photograph(64, 64, "JPEG")
    await processes.decode(Request(PREPROCESS, small, MEGA, MEGA, 10.0))
    first_s = time.perf_counter() - start_s
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    idle_mb = resident_mb(int(children[0]))
    for kind, width, height in [
        ("JPEG", 4000, 3000), ("JPEG", 8000, 6000), ("PNG", 4000, 3000), ("WEBP", 4000, 3000),
    ]:  # fmt: skip
        body = photograph(width, height, kind)
        request = Request(PREPROCESS, body, 50 * MEGA, 1 << 30, 60.0)
        thread, process = [], []
        for _ in range(rounds):
            start_s = time.perf_counter()
            call = asyncio.to_thread(decode_image, PREPROCESS, body, 50 * MEGA, 1 << 30)
            one = await call
            thread.append(1e3 * (time.perf_counter() - start_s))
            start_s = time.perf_counter()
            other = await processes.decode(request)
            process.append(1e3 * (time.perf_counter() - start_s))
            assert np.array_equal(one, other)
        more = [b - a for a, b in zip(thread, process, strict=True)]
        low, _, high = quantiles(more, n=4)
        row = {
            "file": f"{kind} {width}x{height}",
            "mb": round(len(body) / 1e6, 1),
            "thread_ms": round(median(thread), 1),
            "process_ms": round(median(process), 1),
            "more_ms": round(median(more), 1),
            "quartiles_ms": [round(low, 1), round(high, 1)],
        }
        rows.append(row)
        print(row, flush=True)
    await processes.stop()
    return {
        "rounds": rounds,
        "first_image_ms": round(1e3 * first_s),
        "idle_mb": idle_mb,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare decoder processes with threads.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments.rounds))
    print(
        f"first image in a new process {results['first_image_ms']} ms, idle {results['idle_mb']} MB"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
