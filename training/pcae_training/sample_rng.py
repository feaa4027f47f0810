"""Random numbers for the samples of a step: masks, crops, drop path, budgets.

Every number depends on the seed, the step, its purpose and the sample's index in the step's global
batch, never on the number of processes or on earlier draws. So several processes train exactly as
one, and a resumed run needs no generator state.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleRng:
    """Random numbers for samples `start` to `stop` of a global batch of `batch_size` samples.

    They are drawn on the CPU: the same for every device, and known without a device sync.
    """

    seed: int
    step: int
    batch_size: int
    start: int = 0
    stop: int | None = None  # None: to the end

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Draw float32 [stop - start, *shape] in [0, 1); equal for equal `purpose`."""
        numbers = torch.rand(self.batch_size, *shape, generator=self._generator(purpose))
        return numbers[self.start : self.stop]

    def draw_shared(self, purpose: str) -> float:
        """Draw one number in [0, 1) for the whole global batch."""
        return torch.rand((), generator=self._generator(purpose)).item()

    def _generator(self, purpose: str) -> torch.Generator:
        return generator(self.seed, self.step, purpose)


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by all parts of `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def drop_path_factors(
    rng: SampleRng, depth: int, rate: float, device: torch.device
) -> Tensor | None:
    """Return the factors on each sample's residual branches, [depth, 2, B]; None at rate 0.

    The drop rate rises linearly from 0 in the first block to `rate` in the last; branches that are
    kept are scaled up by 1 / (1 - their drop rate) (arXiv 1603.09382).
    """
    if rate == 0:
        return None
    keep = 1 - torch.linspace(0, rate, depth)[:, None]  # [depth, 1]
    factors = (rng.uniform("drop path", depth, 2) < keep) / keep
    return to_device(factors.permute(1, 2, 0), device)


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy CPU `numbers` to `device` without a sync: a GPU copies pinned memory asynchronously."""
    if device.type == "cuda":
        numbers = numbers.contiguous().pin_memory()
    return numbers.to(device, non_blocking=True)
