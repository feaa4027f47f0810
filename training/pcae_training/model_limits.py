"""Bounds on a model's sizes, so that nothing is built, or looped over, from an absurd number."""

from math import isfinite
from typing import Any

#: Least and greatest value of each size, far above the largest published ViT (48 blocks of width
#: 6144 and 48 heads).
LIMITS = {
    "image_size": (1, 8192),
    "patch_size": (1, 8192),
    "channels": (1, 1024),
    "width": (1, 65_536),
    "depth": (1, 1000),
    "heads": (1, 1024),
    "classes": (0, 100_000),
    "registers": (0, 10_000),
    "projection": (0, 65_536),
}
MAX_MLP_RATIO = 64.0


def check_sizes(config: Any) -> None:
    """Raise ValueError if a size of a ViTConfig is not a whole number within its limits."""
    for name, (least, greatest) in LIMITS.items():
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= greatest:
            raise ValueError(
                f"{name.replace('_', ' ')} must be a whole number from {least} to {greatest},"
                f" not {_short(value)}"
            )
    ratio = config.mlp_ratio
    if not isinstance(ratio, int | float) or not 0 < ratio <= MAX_MLP_RATIO:
        raise ValueError(f"MLP ratio must be above 0 and up to {MAX_MLP_RATIO:g}, not {ratio!r}")
    epsilon = config.norm_eps
    if not isinstance(epsilon, int | float) or not isfinite(epsilon) or not 0 < epsilon < 1:
        raise ValueError(f"the epsilon of norms must be between 0 and 1, not {_short(epsilon)}")
    theta = config.rope_theta
    if not isinstance(theta, int | float) or not isfinite(theta) or theta < 0:
        raise ValueError(f"the theta of rotary positions must be 0 or more, not {_short(theta)}")
    if len(config.reduction_points) > config.depth:
        raise ValueError(
            f"{len(config.reduction_points)} reduction points are more than the {config.depth}"
            " blocks"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
