"""What a run writes down as it goes: metrics.jsonl, TensorBoard events, a progress bar.

    RUN/run.json        the whole configuration, versions and hardware of the last start
    RUN/metrics.jsonl   a line per report: step, epoch, loss, learning rate, images a second …
    RUN/tensorboard/    the same figures as curves

It knows names and numbers, nothing of what they measure. Only the main process writes.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pcae_training.output import write_whole

METRICS, CONFIGURATION, EVENTS = "metrics.jsonl", "run.json", "tensorboard"


class Journal:
    """One run's log from `step` on; lines of later steps, of a run that was killed, are dropped."""

    def __init__(
        self, folder: Path, configuration: Mapping[str, Any], *, step: int, images: int, total: int
    ) -> None:
        """images: how many the run has seen before `step`; total: how many it will have seen."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"settings": dict(configuration), "started": now(), **surroundings()}
        write_whole(folder / CONFIGURATION, (json.dumps(content, indent=2) + "\n").encode())
        file = folder / METRICS
        lines = file.read_bytes().splitlines() if file.exists() and step else []
        write_whole(file, b"".join(line + b"\n" for line in lines if _step(line) <= step))
        self._metrics = file.open("a", encoding="utf-8", buffering=1)  # whole lines
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=step or None)
        self._bar = tqdm(total=total, initial=images, unit="img", unit_scale=True, smoothing=0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._metrics.close()
        self._events.close()

    def advance(self, images: int, title: str) -> None:
        """Move the bar on."""
        self._bar.set_description_str(title, refresh=False)
        self._bar.update(images)

    def report(self, step: int, figures: Mapping[str, float | int]) -> None:
        """Write `figures` after `step` steps, and show them behind the bar."""
        self._metrics.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        short = {name: f"{value:.4g}" for name, value in figures.items() if name in ("loss", "lr")}
        self._bar.set_postfix(short)

    def tell(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stderr)


def surroundings() -> dict[str, Any]:
    """The machine and the versions that a run is on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
    }


def now() -> str:
    """The time as ISO 8601, to the second, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _step(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off where the writer was killed
        return sys.maxsize
