"""The processes that train together: one, or as many as torchrun started.

It knows ranks and devices, nothing of models. One process needs no process group and gets none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from pcae_serve.errors import PcaeError


@dataclass(frozen=True)
class World:
    """This process among those that share every global batch."""

    device: torch.device
    rank: int = 0
    size: int = 1
    host: Any = None  # a process group of CPUs, which asks no GPU

    @property
    def main(self) -> bool:
        """Whether this process writes, prints and reports."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every process holds, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.host)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is so in any process. Cheap enough for every step; it waits for no GPU."""
        if self.size == 1:
            return value
        answer = torch.tensor(value, dtype=torch.uint8)
        distributed.all_reduce(answer, distributed.ReduceOp.MAX, group=self.host)
        return bool(answer)


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world that torchrun's environment describes, left again at the end.

    device: cpu, cuda (each process its own) or cuda:N. Raises PcaeError where it is not there.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device != "cpu" and not torch.cuda.is_available():
        raise PcaeError(f"there is no {device} on this machine: use --device cpu")
    if device == "cuda":  # torch wants a number
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    place = torch.device(device)
    if place.type == "cuda":
        if place.index >= torch.cuda.device_count():
            raise PcaeError(f"there is no {device}: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    if size == 1:
        yield World(place)
        return
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(place, rank, size, distributed.new_group(backend="gloo"))
    finally:
        distributed.destroy_process_group()
