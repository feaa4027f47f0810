"""Random numbers for the samples of a step: masks, crops, drop path, budgets.

Every number depends on the seed, the step, what it is for and the sample's place in the step's
global batch; never on how many processes share that batch, nor on what was drawn before. So two
processes train as one does, and a resumed run needs no generator's state. It knows nothing of what
the numbers are used for.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleRng:
    """The draws for samples `start` to `stop` of a global batch of `batch_size` samples.

    They are made on the CPU: the same there as for a GPU, and known without waiting for it.
    """

    seed: int
    step: int
    batch_size: int
    start: int = 0
    stop: int | None = None  # None: to the end

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """float32 [stop - start, *shape] in [0, 1); the same `purpose` gives the same numbers."""
        numbers = torch.rand(self.batch_size, *shape, generator=self._generator(purpose))
        return numbers[self.start : self.stop]

    def shared(self, purpose: str) -> float:
        """One number in [0, 1) for the whole global batch."""
        return torch.rand((), generator=self._generator(purpose)).item()

    def _generator(self, purpose: str) -> torch.Generator:
        return generator(self.seed, self.step, purpose)


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by everything in `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def drop_path_factors(
    draws: SampleRng, depth: int, rate: float, device: torch.device
) -> Tensor | None:
    """What each sample's branches are multiplied by: [depth, 2, B]; None at rate 0.

    A branch of block i is dropped at a rate that rises linearly from 0 to `rate` in the last block,
    and scaled up where it is not (arXiv 1603.09382).
    """
    if rate == 0:
        return None
    keep = 1 - torch.linspace(0, rate, depth)[:, None]  # [depth, 1]
    factors = (draws.uniform("drop path", depth, 2) < keep) / keep
    return sent(factors.permute(1, 2, 0), device)


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """CPU numbers on `device`, without waiting for it: a GPU copies pinned memory by itself."""
    if device.type == "cuda":
        numbers = numbers.contiguous().pin_memory()
    return numbers.to(device, non_blocking=True)
