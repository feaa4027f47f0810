"""Record a training run: metrics.jsonl, TensorBoard events, progress on standard error.

    RUN/run.json        the whole configuration, versions and hardware of the last start
    RUN/data.json       the images used, by split and class, and the files left out
    RUN/metrics.jsonl   a line per report: step, epoch, loss, learning rate, images/s …
    RUN/tensorboard/    the same figures as curves

Only the main process records.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.tensorboard import SummaryWriter

from pcae_training.output import write_whole
from pcae_training.progress import Progress

#: The figures that are shown with the progress, and their names there.
SHOWN = {
    "loss": "loss",
    "lr": "lr",
    "features/rank": "rank",
    "features/rank_start": "rank at start",
}
METRICS, CONFIGURATION, EVENTS = "metrics.jsonl", "run.json", "tensorboard"
DATA = "data.json"


class Journal:
    """The records of one run. Lines of steps after `step`, left by a killed run, are dropped."""

    def __init__(
        self,
        folder: Path,
        configuration: Mapping[str, Any],
        *,
        step: int,
        images: int,
        total: int,
        data: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Open the records to continue after `step`.

        data: inventories, as JSON. images: images processed up to `step`. total: images processed
        when the run ends.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = {"settings": dict(configuration), "started": now(), **describe_machine()}
        write_whole(folder / CONFIGURATION, (json.dumps(content, indent=2) + "\n").encode())
        if data:
            write_whole(folder / DATA, (json.dumps(data, indent=2) + "\n").encode())
        file = folder / METRICS
        lines = file.read_bytes().splitlines() if file.exists() and step else []
        write_whole(file, b"".join(line + b"\n" for line in lines if _step(line) <= step))
        self._metrics = file.open("a", encoding="utf-8", buffering=1)  # whole lines
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=step or None)
        self._shown: dict[str, float] = {}
        self._progress = Progress("training", total, done=images, announce=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)
        self._metrics.close()
        self._events.close()

    def advance(self, images: int, title: str) -> None:
        """Add `images` to the progress."""
        self._progress.update(images, title)

    def report(self, step: int, figures: Mapping[str, float | int]) -> None:
        """Record `figures` after `step` steps; those of SHOWN go to the progress too."""
        self._metrics.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        shown = {SHOWN[name]: value for name, value in figures.items() if name in SHOWN}
        if shown:
            self._shown |= shown  # figures are reported at different steps
            self._progress.show(self._shown)

    def write(self, text: str) -> None:
        """Print a line without disturbing the progress bar."""
        self._progress.write(text)


def describe_machine() -> dict[str, Any]:
    """Return the command, versions and hardware of this process."""
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
    """Return the time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _step(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off by a killed writer
        return sys.maxsize
