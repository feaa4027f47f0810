"""The MLP of a transformer block, with the activations of published ViTs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: GELU exactly, as the sigmoid that OpenAI's CLIP was trained with, or as Google's tanh; SiLU.
Activation = Literal["gelu", "quick-gelu", "gelu-tanh", "silu"]


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate GELU by a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "quick-gelu": quick_gelu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activate = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.activate(self.fc1(x)))
        return x


class GatedMlp(nn.Module):
    """Two linear layers, whose activated outputs are factors of a third's (SwiGLU, if SiLU).

    The first layer has both, the activated ones first, under one name as in timm.
    """

    def __init__(self, width: int, hidden: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activate = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        x = self.fc2(self.activate(gate) * value)
        return x
