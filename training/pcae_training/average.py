"""A moving average of a model's weights."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(nn.Module):
    """An exponential moving average of another module's parameters and buffers.

    It gives the last `1 / (1 - decay)` steps most of the weight. At the start of a run the decay
    is lower, `(1 + n) / (10 + n)` after n steps, so that random initial weights are forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module, parameters: Sequence[Tensor] | None = None) -> None:
        """Take in the weights after an optimiser step, without waiting for the device.

        parameters: those to take in, if they are not the module's own.
        """
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        new = list(module.parameters() if parameters is None else parameters)
        average(list(self.module.parameters()), new, None)
        for own, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(buffer)

    def get_extra_state(self) -> Tensor:
        """Return the number of updates, int64, for the state dict."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the number of updates."""
        self.updates = int(state)
