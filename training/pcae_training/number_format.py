"""The number format of a run's arithmetic: float32, or bfloat16 by autocast."""

from typing import Literal

import torch

#: Values of --precision. auto: bf16 where the processor has instructions for it.
Precision = Literal["fp32", "bf16", "auto"]

PRECISION_HELP = (
    "bf16 uses autocast, and weights stay float32; auto: bf16 on GPUs that have it and CPUs with"
    " AMX or AVX512-BF16, else fp32"
)


def choose_dtype(precision: Precision, device: str) -> torch.dtype:
    """Return the dtype of --precision on a device, such as cpu or cuda:1."""
    if precision == "auto":
        return torch.bfloat16 if is_bfloat16_fast(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def is_bfloat16_fast(device: str) -> bool:
    """Return whether bfloat16 is faster than float32: on CPUs without instructions it is not."""
    if device.startswith("cuda"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def describe_slow(precision: Precision, device: str) -> str | None:
    """Return a warning if --precision bf16 is slower than fp32 here."""
    if precision != "bf16" or is_bfloat16_fast(device):
        return None
    return (
        f"warning: {device} has no instructions for bfloat16, so --precision bf16 is about 6 times"
        " slower than fp32; --precision auto uses it only where it is fast"
    )
