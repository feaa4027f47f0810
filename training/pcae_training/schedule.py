"""Schedules of the learning rate, the lowest keep ratio and the EMA momentum."""

import math
from collections.abc import Sequence
from fractions import Fraction

from pcae_serve.bundle.tokens import parse_keep_ratio


def keep_ratio_ramp(keep_ratio: float, steps: int = 4) -> tuple[float, ...]:
    """Return keep ratios from 1.0 down to `keep_ratio` in `steps` even steps, at 2 decimals.

    The ramp has few values because every one brings new tensor shapes, each of which costs a
    compiled graph, or the kernels that a CPU library generates for it.
    """
    lowest = parse_keep_ratio(keep_ratio)
    between = [round(float(1 - (1 - lowest) * Fraction(i, steps)), 2) for i in range(steps)]
    return tuple(dict.fromkeys([*(k for k in between if k > keep_ratio), keep_ratio]))


def lowest_keep_ratio(
    ramp: Sequence[float], progress: float, start: float = 0.10, length: float = 0.25
) -> float:
    """Return the lowest keep ratio of `ramp` allowed at `progress` in [0, 1] (paper, section 4.2).

    Nothing is dropped before `start`; the bound on the drop ratio then rises linearly over
    `length`; the whole ramp is allowed from `start + length` on. The paper says "gradually"; the
    linear rise is our reading.
    """
    if progress >= start + length:
        return ramp[-1]
    share = max(0.0, progress - start) / length if length else 0.0
    bound = 1 - (1 - ramp[-1]) * share
    return next((k for k in reversed(ramp) if k >= bound - 1e-9), ramp[0])


def cosine(progress: float, warmup: float = 0.05, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then cosine decay to `final`."""
    if progress < warmup:
        return progress / warmup
    phase = (progress - warmup) / max(1 - warmup, 1e-9)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(phase, 1.0)))


def momentum(steps: int, longest: float = 0.9999, share: float = 0.08) -> float:
    """Return the EMA momentum for a run of `steps` optimiser steps: the paper's 0.9999, or less.

    0.9999 averages over 10,000 steps, 8 % of the paper's shortest run (100 epochs of ImageNet at
    batch 1024); a shorter run averages over the same share of its steps.
    """
    return min(longest, 1 - 1 / max(1.0, share * steps))
