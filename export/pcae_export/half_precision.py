"""Check that a model can run in half precision, before graphs for GPUs are written.

ONNX Runtime computes half-precision graphs in float32 on a CPU, so comparing them with torch shows
nothing about overflow. Here the traced computation (`graph.Elastic`) runs in torch with the tensors
that the graphs hold in half precision kept in float64:

    range       the largest value that each of them takes on the calibration images, exactly
    arithmetic  on a few images, with every such tensor rounded to the half precision, as a GPU does
                (it sums products in float32)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pcae_export import weights
from pcae_export.graph import Elastic
from pcae_export.measure import cosine
from pcae_export.progress import Progress
from pcae_serve.bundle.manifest import HalfRange
from pcae_serve.engines.base import Pixels
from pcae_serve.errors import PcaeError
from pcae_training.block import Attention
from pcae_training.checkpoint import Checkpoint
from pcae_training.rotary import Rotation

Half = Literal["float16", "bfloat16"]

#: Largest finite number of each precision.
LARGEST: Mapping[Half, float] = {
    "float16": torch.finfo(torch.float16).max,
    "bfloat16": torch.finfo(torch.bfloat16).max,
}
#: Other images may reach this many times the largest value of the calibration images.
MARGIN = 2.0
#: Calibration images at the largest token counts, and at each other.
RANGE_IMAGES, OTHER_IMAGES = 32, 8
#: Images computed with every tensor rounded.
ROUNDED_IMAGES = 4
BATCH = 4
#: Minimum cosine of an image's rounded output to the exact one, where nothing is dropped.
COSINE = 0.99

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class HalfError(PcaeError):
    """The model cannot run in the half precision asked for."""


@dataclass(frozen=True)
class HalfChoice:
    """The precision of a model's graphs for GPUs, and what it was chosen by."""

    half: Half
    range: HalfRange
    note: str | None = None  # for the user, if it is not float16 by default


def choose_half(
    checkpoint: Checkpoint,
    pixels: Pixels,
    counts: Sequence[Sequence[int]],
    wanted: Literal["auto", "float16", "bfloat16"],
) -> HalfChoice:
    """Return the half precision that a model can run in: float16, or bfloat16 if that overflows.

    pixels: calibration images uint8 [N, H, W, 3]. counts: token counts of the model's tiers.
    wanted: "auto", or the only precision to try. Raise HalfError if the precision is not good
    enough.
    """
    stored = {n: t.float() for n, t in weights.to_half(checkpoint.model.state_dict()).items()}
    model = deepcopy(checkpoint.model).eval()
    model.load_state_dict(stored)
    computed = Elastic(model, checkpoint.preprocess, torch.float64, _PlainAttention)
    # 2: see `graph.Elastic`
    stages = sorted({tuple(max(2, m) for m in tokens) for tokens in counts}, reverse=True)
    progress = Progress("proving half precision", len(stages), "token counts")
    with progress, torch.inference_mode():
        found = _Values()
        for number, tokens in enumerate(stages):
            images = pixels[: OTHER_IMAGES if number else RANGE_IMAGES]
            _run(computed, images, tokens, found)
            progress.update()
        largest, tensor = found.largest
        measured = HalfRange(largest=largest, tensor=tensor, images=len(pixels[:RANGE_IMAGES]))
        overflow = (
            f"{tensor} reaches {largest:,.0f} on {measured.images} images, and float16 ends at"
            f" {LARGEST['float16']:,.0f}"
        )
        fits = largest * MARGIN <= LARGEST["float16"]
        if wanted == "float16" and not fits:
            raise HalfError(
                f"float16 is not safe for this model: {overflow}; give --half bfloat16, or none"
            )
        half: Half = "bfloat16" if wanted == "bfloat16" or not fits else "float16"
        _check_rounded(computed, pixels[:ROUNDED_IMAGES], stages, half)
    note = f"graphs for GPUs are in bfloat16: {overflow}" if not fits else None
    return HalfChoice(half, measured, note if wanted == "auto" else None)


def _check_rounded(
    computed: Elastic, pixels: Pixels, stages: Sequence[tuple[int, ...]], half: Half
) -> None:
    """Raise HalfError if outputs with rounded tensors are not finite, or differ too much."""
    for number, tokens in enumerate(stages):
        rounded = _run(computed, pixels, tokens, _Values(_DTYPES[half]))
        if not rounded.isfinite().all():
            raise HalfError(
                f"in {half} some outputs are not finite at {tokens} tokens; give --half none"
            )
        if number == 0:  # the largest counts; others may keep other patches
            exact = _run(computed, pixels, tokens, _Values())
            with np.errstate(invalid="ignore"):  # rounding may leave zeros; NaN fails below
                nearest = float(cosine(rounded.float().numpy(), exact.float().numpy()).min())
            if not nearest >= COSINE:
                raise HalfError(
                    f"in {half} outputs have a cosine of {nearest:.4f} to those in float32, below"
                    f" {COSINE}; give --half none"
                )


def _run(computed: Elastic, pixels: Pixels, tokens: Sequence[int], values: "_Values") -> Tensor:
    """Return the outputs [N, width] for pixels uint8 [N, H, W, 3]."""
    counts = torch.tensor(tokens, dtype=torch.int64)
    outputs = []
    with values.record(computed):
        for batch in np.array_split(pixels, range(BATCH, len(pixels), BATCH)):
            outputs.append(computed(torch.from_numpy(batch), counts)[0])
    return torch.cat(outputs)


class _PlainAttention(Attention):
    """Attention in the operators of the graphs for TensorRT, which round the most."""

    def forward(
        self, x: Tensor, bias: Tensor | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        q, k, v = self.split(x, rotation)
        scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float()  # [B, heads, N, N]
        if bias is not None:
            scores = scores + bias
        mixed = scores.softmax(dim=-1).to(x.dtype) @ v
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return projected


@dataclass
class _Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the largest float64 value that each module computes; round the results if asked to."""

    round_to: torch.dtype | None = None
    by_module: dict[str, float] = field(default_factory=dict)
    _modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def largest(self) -> tuple[float, str]:
        """Return the largest value and the module that computes it."""
        tensor = max(self.by_module, key=lambda name: self.by_module[name])
        return self.by_module[tensor], tensor

    @contextmanager
    def record(self, model: nn.Module) -> Iterator[None]:
        """Record while open, attributing values to the modules of `model`."""
        hooks = []
        for name, module in model.named_modules():
            label = name.removeprefix("model.") or "the model"
            hooks += [
                module.register_forward_pre_hook(self._enter(label)),
                module.register_forward_hook(lambda *_: self._leave()),
            ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, label: str) -> Callable[..., None]:
        return lambda *_: self._modules.append(label)

    def _leave(self) -> None:
        self._modules.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not isinstance(found, Tensor) or found.dtype != torch.float64 or func.is_view:
            return found
        name = self._modules[-1] if self._modules else "the model"
        if found.numel():
            # the mean of no dropped patches is 0 / 0; it is not used
            value = float(found.nan_to_num(0.0, 0.0, 0.0).abs().max())
            self.by_module[name] = max(self.by_module.get(name, 0.0), value)
        return found if self.round_to is None else found.to(self.round_to).to(torch.float64)
