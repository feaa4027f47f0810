"""Low-rank adapters (LoRA, arXiv 2106.09685): few numbers to train, and a plain model to save.

A layer of weights W computes with W + factor B A. Only A [rank, inputs] and B [outputs, rank] are
trained; B begins at zero, so the model begins as it was. Merged, the model is a plain one.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcae_training.block import Block
from pcae_training.model import VisionTransformer

AdapterTargets = Literal["attention", "all"]

#: Names of the adapted layers in a block.
TARGETS: Mapping[AdapterTargets, tuple[str, ...]] = {
    "attention": ("attn.qkv", "attn.proj"),
    "all": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
}

#: Prefixes of parameters that are always trained in full: the final norm and the heads.
FULL = ("head", "norm.", "fc_norm.")


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter. Weight and bias keep their names and values."""

    def __init__(self, layer: nn.Linear, rank: int, factor: float) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias, self.factor = layer.weight, layer.bias, factor
        self.adapter_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.adapter_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.adapter_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = self.factor * F.linear(x, self.adapter_a)
        return super().forward(x) + F.linear(low, self.adapter_b)

    @torch.no_grad()
    def merge(self) -> Tensor:
        """Return the weights with the adapter added, [outputs, inputs]."""
        return torch.addmm(self.weight, self.adapter_b, self.adapter_a, alpha=self.factor)


def adapt(
    model: VisionTransformer,
    rank: int,
    alpha: float,
    targets: AdapterTargets = "attention",
    new: Collection[str] = (),
) -> None:
    """Add adapters to the linear layers of all blocks, and freeze what is not trained, in place.

    alpha / rank is the factor of what an adapter adds. new: names of parameters that have learnt
    nothing yet; they are trained in full. Raise ValueError if the rank is too large.
    """
    largest = model.config.width - 1
    if rank > largest:
        raise ValueError(f"--lora {rank} is too large for width {largest + 1}; at most {largest}")
    for i, block in enumerate(cast(Collection[Block], model.blocks)):
        for name in TARGETS[targets]:
            if f"blocks.{i}.{name}.weight" not in new:
                parent, _, own = name.rpartition(".")
                layer = AdaptedLinear(block.get_submodule(name), rank, alpha / rank)  # type: ignore[arg-type]
                setattr(block.get_submodule(parent), own, layer)
    for name, parameter in model.named_parameters():
        trained = name in new or name.startswith(FULL) or ".adapter_" in name
        parameter.requires_grad_(trained)


def merged_parameters(model: VisionTransformer) -> dict[str, Tensor]:
    """Return the parameters of the plain model that computes the same, in its order."""
    merged = {n: p.detach() for n, p in model.named_parameters() if ".adapter_" not in n}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32 in weights that are saved
    try:
        for name, layer in _adapted(model):
            merged[f"{name}.weight"] = layer.merge()
    finally:
        torch.set_float32_matmul_precision(precision)
    return merged


def merge(model: VisionTransformer) -> VisionTransformer:
    """Return a plain model that computes the same; it shares the weights that are not adapted."""
    with torch.device("meta"):
        plain = VisionTransformer(model.config)
    plain.load_state_dict(merged_parameters(model), assign=True)
    return plain.requires_grad_(False).eval()


def load_merged(model: VisionTransformer, plain: VisionTransformer) -> None:
    """Make a model, if adapted, equal to a plain one: with its weights, and nothing added to them.

    The model is not to be trained any further.
    """
    state = plain.state_dict()
    for name, layer in _adapted(model):
        state[f"{name}.adapter_a"] = layer.adapter_a
        state[f"{name}.adapter_b"] = torch.zeros_like(layer.adapter_b)
    model.load_state_dict(state)


def describe_adapters(model: VisionTransformer) -> str:
    """Return a text on the number and size of the adapters."""
    layers = [layer for _, layer in _adapted(model)]
    size = sum(layer.adapter_a.numel() + layer.adapter_b.numel() for layer in layers)
    rank, factor = layers[0].adapter_a.shape[0], layers[0].factor
    return f"{len(layers)} of rank {rank}, factor {factor:g}, {size:,} parameters"


def _adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module
