"""Latency that the service adds to one image on an idle machine, besides decoding and compute.

    python benchmarks/idle.py [--requests 1000]

Sends the demo bundle's sample image to the service in process, without HTTP, one at a time: the
queue, the scheduler's events, and the way to the device's thread and back. Milliseconds.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

import numpy as np

from pcae_serve.bundle.reader import demo_path, load_bundle
from pcae_serve.engines.loader import load_configured_engine
from pcae_serve.runtime.requests import InferenceRequest
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings

WARM_UP = 50  # requests before those that count
SAMPLES = Path(__file__).parents[1] / "docs" / "samples"


async def measure(requests: int) -> None:
    body = min(SAMPLES.glob("*.png")).read_bytes()
    bundle = load_bundle(demo_path())
    with tempfile.TemporaryDirectory() as cache:
        settings = Settings(cache_dir=Path(cache))
        engine = load_configured_engine(settings, bundle)
        service = Service(settings, bundle, [engine])
        await service.start()
        loop, rows = asyncio.get_running_loop(), []

        for _ in range(WARM_UP + requests):
            with service.offer(InferenceRequest(loop.time(), 1000.0)) as offered:
                answer = await offered.run(body)
            done_s = loop.time()
            begin_s = done_s - answer.total_s
            await asyncio.sleep(0.005)  # let the machine become idle
            direct_s = loop.time()
            engine.run(answer.tier, np.zeros((1, 28, 28, 3), np.uint8))
            direct_s = loop.time() - direct_s
            added_s = done_s - begin_s - answer.decode_s - answer.compute_s
            rows.append((answer.queue_s, added_s, answer.compute_s - direct_s))
        await service.stop()
    print(f"{requests} images, milliseconds            median      p99")
    names = ("waiting for the device", "all but decode and compute", "compute, less a direct call")
    for name, values in zip(names, np.array(rows[WARM_UP:]).T, strict=True):
        middle, last = 1e3 * np.percentile(values, (50, 99))
        print(f"{name:<30} {middle:10.3f} {last:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    asyncio.run(measure(parser.parse_args().requests))


if __name__ == "__main__":
    main()
