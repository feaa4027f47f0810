"""The processes that train together: one, without a process group, or those of torchrun."""

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
    """This process's rank and device, and collective operations with the others."""

    device: torch.device
    rank: int = 0
    size: int = 1
    host: Any = None  # a process group on the CPU, which needs no GPU sync

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.host)
        return values

    def any(self, value: bool) -> bool:
        """Return whether `value` is true in any process. Cheap: it needs no GPU sync."""
        if self.size == 1:
            return value
        answer = torch.tensor(value, dtype=torch.uint8)
        distributed.all_reduce(answer, distributed.ReduceOp.MAX, group=self.host)
        return bool(answer)


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the process group that torchrun's environment describes, and leave it at the end.

    device: cpu, cuda (each process its own) or cuda:N. Raise PcaeError if it does not exist.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device != "cpu" and not torch.cuda.is_available():
        raise PcaeError(f"there is no {device} on this machine; use --device cpu")
    if device == "cuda":  # torch wants a number
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    place = torch.device(device)
    if place.type == "cuda":
        if place.index >= torch.cuda.device_count():
            raise PcaeError(f"there is no {device}: number of GPUs: {torch.cuda.device_count()}")
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")  # TF32 outside of autocast
    if size == 1:
        yield World(place)
        return
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(place, rank, size, distributed.new_group(backend="gloo"))
    finally:
        distributed.destroy_process_group()
