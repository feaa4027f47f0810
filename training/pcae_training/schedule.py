"""What changes as training goes on: the learning rate, and how much of the drop ratio is in force.

Pure functions of progress in [0, 1]; they know neither model nor data.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

from pcae_serve.bundle.tokens import parse_keep_ratio


def ladder(keep_ratio: float, rungs: int = 4) -> tuple[float, ...]:
    """Keep ratios from 1.0 down to `keep_ratio` in `rungs` even steps, rounded to 2 decimals.

    A ramp that goes down a short ladder meets few tensor shapes, each of which costs a compiled
    graph, or the kernels that a CPU library makes for it.
    """
    lowest = parse_keep_ratio(keep_ratio)
    between = [round(float(1 - (1 - lowest) * Fraction(i, rungs)), 2) for i in range(rungs)]
    return tuple(dict.fromkeys([*(k for k in between if k > keep_ratio), keep_ratio]))


def ramped(
    ladder: Sequence[float], progress: float, start: float = 0.10, length: float = 0.25
) -> float:
    """The lowest keep ratio of a falling `ladder` in force at `progress` (paper, section 4.2).

    Nothing is dropped up to `start`; the bound on the drop ratio then rises linearly over
    `length`, and all of the ladder is in force from `start + length` on. The paper says
    "gradually"; the straight line is our reading.
    """
    if progress >= start + length:
        return ladder[-1]
    share = max(0.0, progress - start) / length if length else 0.0
    bound = 1 - (1 - ladder[-1]) * share
    return next((k for k in reversed(ladder) if k >= bound - 1e-9), ladder[0])


def cosine(progress: float, warmup: float = 0.05, final: float = 0.0) -> float:
    """The factor on the peak learning rate: up a line over `warmup`, down a cosine to `final`."""
    if progress < warmup:
        return progress / warmup
    phase = (progress - warmup) / max(1 - warmup, 1e-9)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(phase, 1.0)))


def momentum(steps: int, longest: float = 0.9999, share: float = 0.08) -> float:
    """EMA momentum for a run of `steps` optimiser steps: the paper's 0.9999, or less.

    0.9999 averages over 10,000 steps, 8 % of the paper's shortest run (100 epochs of ImageNet at
    batch 1024); a short run averages over the same share of its own.
    """
    return min(longest, 1 - 1 / max(1.0, share * steps))
