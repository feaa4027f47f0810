"""A server whose engine does what an image says: python -m tests.support.faulty BUNDLE [flags].

The brightness of a batch's first image is a command. While there is a file BROKEN, every batch
fails; while there is NOMAKE, no engine can be made; one made while there is HANGS hangs when it is
tried. Some waits are as long as the environment says. All else is the server as it ships.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pcae_serve.api import connection
from pcae_serve.api.auth import Keys
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.command import run
from pcae_serve.commands import serve
from pcae_serve.engines.base import Engine, Output, Pixels, run_directly
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import StartError
from pcae_serve.observability import logs
from pcae_serve.runtime import service, tier_health, worker
from pcae_serve.runtime.service import Service

RAISE, NAN, HANG, STUCK, JUMP, SLOW = 10, 30, 50, 70, 90, 110
DAY_S = 86_400.0
made = 0
real_time, ahead_s = time.time, DAY_S


def jumping() -> float:
    """The wall clock, a day ahead and a day behind by turns."""
    global ahead_s
    ahead_s = -ahead_s
    return real_time() + ahead_s


def there(name: str) -> bool:
    return Path(os.environ.get(name, "")).is_file()


class Faulty(SimulatedEngine):
    """Raises, answers with NaN, hangs until it is terminated, or for good; or moves the clock."""

    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        super().__init__(bundle, device, lambda tier, batch: 0.002 + 0.002 * batch)
        self._ended = threading.Event()
        self._hangs = there("HANGS")

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        command = int(pixels[0].mean())
        if command == RAISE or there("BROKEN"):
            raise RuntimeError("device-side assert triggered\nand more")
        if command in (HANG, STUCK):
            print("the engine hangs", file=sys.stderr, flush=True)
        if command == HANG or self._hangs:
            self._ended.wait()
            raise RuntimeError("terminated")
        if command == SLOW:
            time.sleep(0.8)
        if command == STUCK:
            threading.Event().wait()
        if command == JUMP:
            time.time = jumping
        output = super().run(tier, pixels)
        return output._replace(vectors=output.vectors * np.nan) if command == NAN else output

    def terminate(self) -> None:
        self._ended.set()


def make(served: Bundle, device: int, through: Callable[[Engine], Engine] = run_directly) -> Engine:
    global made
    if there("NOMAKE"):
        raise StartError("no memory")
    made += 1
    print(f"engine {made} made", file=sys.stderr, flush=True)
    return Faulty(served)


class Serve(serve.Serve):
    def cli_cmd(self) -> None:
        logs.configure(self.log_format, self.log_level)
        with serve.listen(self.host, self.port) as listener:
            served = load_bundle(Path(self.bundle) if self.bundle else demo_path())
            faulty = Service(self, served, [make(served, 0)], make)
            serve.serve(faulty, listener, Keys.read(None), Keys.read(self.admin_keys_file))


def main(argv: Sequence[str]) -> int:
    retry_s = float(os.environ.get("RETRY_S", worker.RETRY_S))
    tier_health.PROBE_INTERVAL_S = worker.RETRY_S = retry_s
    worker.TERMINATE_S = float(os.environ.get("TERMINATE_S", worker.TERMINATE_S))
    connection.HEAD_S = float(os.environ.get("HEAD_S", connection.HEAD_S))
    connection.LINGER_S = float(os.environ.get("LINGER_S", connection.LINGER_S))
    connection.READ_S = float(os.environ.get("READ_S", connection.READ_S))
    service.BATCH_S = float(os.environ.get("BATCH_S", service.BATCH_S))
    return run(Serve, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
