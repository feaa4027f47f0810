"""What changes as training goes on: the learning rate, and how much of the drop ratio is in force.

Pure functions of progress in [0, 1]; they know neither model nor data.
"""

import math


def ramped(keep_ratio: float, progress: float, start: float = 0.10, length: float = 0.25) -> float:
    """The keep ratio in force at `progress` on the way to `keep_ratio` (paper, section 4.2).

    Nothing is dropped up to `start`; the drop ratio then rises linearly over `length`, and
    `keep_ratio` itself holds from `start + length` on. The paper says "gradually"; the straight
    line is our reading. Rounded to 4 decimals, since token arithmetic is exact.
    """
    if progress >= start + length:
        return keep_ratio
    if progress <= start:
        return 1.0
    share = (progress - start) / length
    return max(keep_ratio, round(1 - (1 - keep_ratio) * share, 4))


def cosine(progress: float, warmup: float = 0.05, final: float = 0.0) -> float:
    """The factor on the peak learning rate: up a line over `warmup`, down a cosine to `final`."""
    if progress < warmup:
        return progress / warmup
    phase = (progress - warmup) / max(1 - warmup, 1e-9)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(phase, 1.0)))
